"""Candidates for the launch tables, timed against the current rows: `python -m benchmarks.gpu --only tuner`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from benchmarks import bench_attention_backward, bench_fused_attention, bench_gemm, bench_paged
from benchmarks.measure import Bind, Case, Run
from gpt2_kernels import _linear_decode, _paged_decode, attention_backward, fused_attention, gemm, paged

Table = dict[tuple[int, ...], tuple[int, ...]]

# By table: tiles that compile without spills for sm_90 at D = 64 in bfloat16, (BLOCK_M, BLOCK_N, warps, stages); for
# matrix products (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), for paged decode (SPLIT, BLOCK_N, warps, stages). They are
# tried on the module's first case whose name begins with the given prefix.
CANDIDATES: dict[str, tuple[ModuleType, str, Table, list[tuple[int, ...]]]] = {
    "attention forward": (
        bench_fused_attention, "attention forward", fused_attention.TILES,
        [(128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2)],
    ),
    "attention dq": (
        bench_attention_backward, "attention backward", attention_backward.DQ_TILES,
        [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3)],
    ),
    "attention dk, dv": (
        bench_attention_backward, "attention backward", attention_backward.DKDV_TILES,
        [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2)],
    ),
    "linear": (
        bench_gemm, "linear", gemm.TILES,
        [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 4)],
    ),
    "decode product": (
        bench_gemm, "decode product", _linear_decode.TILES,
        [(64, 64, 64, 4, 4), (64, 64, 64, 4, 3), (64, 64, 128, 4, 3), (64, 32, 128, 4, 3), (64, 32, 64, 4, 4)],
    ),
    "paged decode": (
        bench_paged, "paged decode", _paged_decode.ONE_HEAD,
        [(256, 256, 8, 1), (256, 128, 8, 1), (256, 128, 4, 1), (256, 64, 4, 1), (128, 128, 4, 1), (512, 256, 8, 1)],
    ),
    "paged prefill": (
        bench_paged, "paged prefill", paged.PREFILL,
        [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 3)],
    ),
}  # fmt: skip


@contextlib.contextmanager
def row_instead(table: Table, row: tuple[int, ...]) -> Iterator[None]:
    """Makes tensors of two bytes per element, with heads up to 64 wide, use this row."""
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


def cases(run: Run) -> Iterator[Case]:
    """One case per table's operator, with the candidates as rivals of the current row: all are checked against float64
    and timed in turns. The fastest belongs in the table."""
    for name, (module, prefix, table, rows) in CANDIDATES.items():
        case = next((case for case in module.cases(run) if case.name.startswith(prefix)), None)
        if case is None:  # decode products, on a CPU
            continue
        bind = case.rivals.get("batch invariant", case.rivals["ours"])  # "ours" may be cuBLAS
        tried = rows[:1] if run.sizes == "tiny" else rows
        rivals = {"ours": bind} | {str(row): _with(table, row, bind) for row in tried}
        yield dataclasses.replace(case, name=f"{name}: {case.name}", rivals=rivals, facts=None)


def _with(table: Table, row: tuple[int, ...], bind: Bind) -> Bind:
    """Uses the row while the call is prepared and whenever it runs; a captured graph keeps it."""

    def bound(*inputs: Any) -> Any:
        with row_instead(table, row):
            call = bind(*inputs)

        def with_row() -> Any:
            with row_instead(table, row):
                return call()

        return with_row

    return bound
