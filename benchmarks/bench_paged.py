"""Attention over a paged cache, in shuffled blocks of 16 tokens.

Decode has one query per sequence; bytes: every key and value once. Prefill has all queries; FLOPs as for attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpt2_kernels as ops
from benchmarks import peers
from benchmarks.measure import Case, Inputs, Run, error

H, D, SIZE = 12, 64, 16


def make(run: Run, S: int, context: int, queries: int = 1) -> Inputs:
    """Arguments of paged_attention: q, caches, their block table in shuffled order, lengths, cu_seqlens.

    A sequence's queries are those of its last tokens.
    """
    blocks = -(-context // SIZE)
    k_cache, v_cache = (run.random(S * blocks, H, SIZE, D).transpose(1, 2) for _ in range(2))
    table = torch.randperm(S * blocks, device=run.device).to(torch.int32).view(S, blocks)
    lens = torch.full((S,), context, dtype=torch.int32, device=run.device)
    cu = queries * torch.arange(S + 1, dtype=torch.int32, device=run.device)
    return run.random(S * queries, H, D), k_cache, v_cache, table, lens, cu


def contiguous(cache: Tensor, table: Tensor, context: int) -> Tensor:
    """A cache's rows as (S, H, context, D)."""
    rows = cache.transpose(1, 2)[table.long()]  # (S, blocks, H, size, D)
    return rows.transpose(1, 2).flatten(2, 3)[:, :, :context]


def ours(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, cu: Tensor) -> Callable[[], Any]:
    queries = len(q) // len(table)
    return lambda: ops.paged_attention(q, k, v, table, lens, cu, queries)


def in_order(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, cu: Tensor) -> Callable[[], Any]:
    """The same kernel on blocks that are stored in order, to show what shuffling costs."""
    order = table.flatten().long()
    k, v = (c.transpose(1, 2)[order].transpose(1, 2) for c in (k, v))
    return ours(q, k, v, torch.arange(order.numel(), device=q.device).to(torch.int32).view_as(table), lens, cu)


def last_tokens(k: Tensor, v: Tensor, table: Tensor, lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values (S, H, D) of each sequence's last token, in the cache already, and their slots."""
    at = lens.long() - 1
    blocks = table.long().gather(1, at[:, None] // SIZE)[:, 0]
    return k[blocks, at % SIZE], v[blocks, at % SIZE], blocks * SIZE + at % SIZE


def with_append(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, cu: Tensor) -> Callable[[], Any]:
    new_k, new_v, slots = last_tokens(k, v, table, lens)
    return lambda: ops.paged_decode_(q, new_k, new_v, k, v, slots, table, lens)


def append_before(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, cu: Tensor) -> Callable[[], Any]:
    new_k, new_v, slots = last_tokens(k, v, table, lens)

    def call() -> Tensor:
        ops.append_kv_(new_k, new_v, k, v, slots)
        return ops.paged_attention(q, k, v, table, lens, cu, 1)

    return call


def torch_contiguous(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, cu: Tensor) -> Callable[[], Any]:
    """PyTorch has no paged attention: its keys and values are made contiguous before the clock starts."""
    k, v = (contiguous(c, table, int(lens[0])).contiguous() for c in (k, v))
    return lambda: F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]


def flashinfer(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, cu: Tensor) -> Callable[[], Any]:
    k, v = k.contiguous(), v.contiguous()  # its NHD layout: (num_blocks, size, H, D) in memory
    wrapper = peers.flashinfer_decode(table, lens, H, D, SIZE, q.dtype)
    return lambda: wrapper.run(q, (k, v))


def check(inputs: Inputs, result: Tensor) -> float:
    """The error of the first four sequences."""
    q, k_cache, v_cache, table, lens, _ = inputs
    k, v = (contiguous(c, table[:4], int(lens[0])).double() for c in (k_cache, v_cache))
    weights = torch.softmax(D**-0.5 * q[:4, :, None].double() @ k.transpose(-1, -2), dim=-1)
    return error([result[:4]], [(weights @ v)[:, :, 0]])


def check_prefill(inputs: Inputs, result: Tensor) -> float:
    """The error of two heads of the first sequence."""
    q, k_cache, v_cache, table, lens, _ = inputs
    T = int(lens[0])
    k, v = (contiguous(c, table[:1], T)[:, :2].double() for c in (k_cache, v_cache))
    first = q[:T, :2].double().transpose(0, 1)[None]
    expected = F.scaled_dot_product_attention(first, k, v, is_causal=True)
    return error([result[:T, :2]], [expected[0].transpose(0, 1)])


def prefill_contiguous(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, cu: Tensor) -> Callable[[], Any]:
    T = int(lens[0])
    k, v = (contiguous(c, table, T).contiguous() for c in (k, v))
    heads_first = q.view(len(table), T, H, D).transpose(1, 2)
    return lambda: F.scaled_dot_product_attention(heads_first, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)


def cases(run: Run) -> Iterator[Case]:
    gpu = run.device.type == "cuda"
    # 384 x 2048 keys and values are 2.4 GB; (1, 1024) and (2, 1024) show latency, the others how a step grows.
    shapes = [(384, 2048), (1, 1024), (2, 1024), (256, 512), (8, 1024), (64, 1024), (1024, 128), (256, 1024)]
    for S, context in run.pick(shapes, [(1, 1024), (8, 128), (8, 1024), (64, 512)], [(2, 40)]):
        moved = 2.0 * S * context * H * D * run.dtype.itemsize
        yield Case(
            name=f"paged decode batch={S} context={context}",
            make=lambda S=S, context=context: make(run, S, context),
            rivals={"ours": ours, "blocks in order": in_order, "torch, contiguous": torch_contiguous}
            | ({"flashinfer": flashinfer} if gpu else {}),
            check=check,
            moved=moved,
            flops=4.0 * S * context * H * D,
            units=S,
        )
        if gpu and S >= 256:
            yield Case(
                name=f"paged decode fp8 batch={S} context={context}",
                make=lambda S=S, context=context: make(run, S, context),
                rivals={"ours": _fp8, "half precision": ours},
                check=check,
                moved=moved / run.dtype.itemsize,
                units=S,
                limit=0.1,  # three bits of mantissa: 1/16 of each key and value, averaged
            )
    for S, context in run.pick([(1, 1024), (256, 512)], [(8, 128)], [(2, 40)]):
        yield Case(
            name=f"paged decode_ batch={S} context={context}",
            make=lambda S=S, context=context: make(run, S, context),
            rivals={"ours": with_append, "append_kv_ before": append_before},
            check=check,
            moved=2.0 * S * context * H * D * run.dtype.itemsize,
            units=S,
        )
    for S, T in run.pick([(16, 1024)], [(1, 512)], [(2, 32)]):
        yield Case(
            name=f"paged prefill batch={S} T={T}",
            make=lambda S=S, T=T: make(run, S, T, queries=T),
            rivals={"ours": ours, "torch, contiguous": prefill_contiguous},
            check=check_prefill,
            flops=2.0 * S * H * T * T * D,
            units=S * T,
        )


def _fp8(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, cu: Tensor) -> Callable[[], Any]:
    scales, caches = [], []
    for cache in (k, v):
        scale = cache.float().abs().amax(dim=(0, 1, 3)) / torch.finfo(torch.float8_e4m3fn).max  # per head
        caches.append((cache.transpose(1, 2) / scale[:, None, None]).to(torch.float8_e4m3fn).transpose(1, 2))
        scales.append(scale)
    return lambda: ops.paged_attention(q, *caches, table, lens, cu, 1, k_scale=scales[0], v_scale=scales[1])


def test_speed(measured) -> None:
    assert measured.right, measured.why
