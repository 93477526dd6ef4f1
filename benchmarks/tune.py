"""Times the candidates of the launch tables: `python -m benchmarks.gpu --only tables`.

A candidate replaces the row that would serve; whatever is timed has first to give the result of the row that stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

import gpt2_kernels as ops
from benchmarks.timing import kernel_times
from gpt2_kernels import _paged_decode, attention_backward, fused_attention, gemm, paged

Table = dict[tuple[int, ...], tuple[int, ...]]

# Tiles that compile without spills for sm_90 at D = 64 in bfloat16, by table: (BLOCK_M, BLOCK_N, warps, stages);
# for linear (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), for decode (SPLIT, BLOCK_N, warps, stages).
CANDIDATES: dict[str, tuple[Table, list[tuple[int, ...]]]] = {
    "attention forward": (
        fused_attention.TILES,
        [(128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2)],
    ),
    "attention dq": (
        attention_backward.DQ_TILES,
        [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3)],
    ),
    "attention dk, dv": (
        attention_backward.DKDV_TILES,
        [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2)],
    ),
    "linear": (
        gemm.TILES,
        [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 4)],
    ),
    "paged decode": (
        _paged_decode.ONE_HEAD,
        [(256, 256, 8, 1), (256, 128, 8, 1), (256, 128, 4, 1), (256, 64, 4, 1), (128, 128, 4, 1), (512, 256, 8, 1)],
    ),
    "paged prefill": (paged.PREFILL, [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 3)]),
}  # fmt: skip


@contextlib.contextmanager
def row_instead(table: Table, row: tuple[int, ...]) -> Iterator[None]:
    """Tensors of two bytes an element, with heads up to 64 wide, take this row."""
    kept = dict(table)
    table.clear()
    # Rows are tried in order, and no GPU is below capability 0.
    table[(0, 2, 64) if any(len(key) == 3 for key in kept) else (0, 2)] = row
    table.update({key: value for key, value in kept.items() if key[1:] != (2, 64) and key not in table})
    try:
        yield
    finally:
        table.clear()
        table.update(kept)


def sweep(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    """Candidates take turns with each other and with the standing row, so that a drift of the clock meets all alike."""
    for name, (table, rows) in CANDIDATES.items():
        call = _call(name, device, smoke)
        expected, calls, result = call(), {"standing": call}, {"name": name, "not_run": {}}
        for row in rows[: 1 if smoke else None]:
            candidate = functools.partial(_with_row, table, row, call)
            try:
                for a, b in zip(candidate(), expected):
                    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
                calls[str(row)] = candidate
            except Exception as error:  # noqa: BLE001 - the other candidates are still worth their time
                result["not_run"][str(row)] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        times = kernel_times(calls, device, 3 if smoke else 20)
        yield {**result, "microseconds": {row: dataclasses.asdict(t) for row, t in times.items()}}


def _with_row(table: Table, row: tuple[int, ...], call: Callable[[], Any]) -> Any:
    with row_instead(table, row):
        return call()


def _call(name: str, device: torch.device, smoke: bool) -> Callable[[], Any]:
    """A call whose time the table decides, at GPT-2's shape."""
    B, T, H, D = (1, 32, 2, 64) if smoke else (16, 1024, 12, 64)
    q, k, v = torch.randn(B, T, 3, H, D, device=device).bfloat16().unbind(2)
    if name == "attention forward":
        return lambda: [ops.attention(q, k, v)]
    if name.startswith("attention"):
        options = (None, None, T, T, True, D**-0.5, 0, 0.0, None)
        out, lse = torch.ops.gpt2_kernels.attention(q, k, v, *options)
        grad = torch.randn_like(out)
        return lambda: torch.ops.gpt2_kernels.attention_backward(grad, None, q, k, v, out, lse, *options)
    if name == "linear":
        x, weight, bias = (
            torch.randn(*shape, device=device).bfloat16() for shape in ((B * T, 768), (3072, 768), (3072,))
        )
        return lambda: [ops.linear(x, weight, bias, activation="gelu_tanh")]
    size, decode = 16, name == "paged decode"
    blocks = T // size
    k_cache, v_cache = (t.reshape(B * blocks, size, H, D).transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    table = torch.randperm(B * blocks, device=device).to(torch.int32).view(B, blocks)
    lens = torch.full((B,), T, dtype=torch.int32, device=device)
    queries = 1 if decode else T
    cu = queries * torch.arange(B + 1, dtype=torch.int32, device=device)
    packed = torch.randn(B * queries, H, D, device=device).bfloat16()
    return lambda: [ops.paged_attention(packed, k_cache, v_cache, table, lens, cu, queries)]
