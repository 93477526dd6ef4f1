"""Attention over a paged key-value cache (PagedAttention, Kwon et al., 2023), for decode and prefill alike.

Queries of S sequences are packed, (Nq, H, D): sequence s owns rows cu_seqlens_q[s] up to cu_seqlens_q[s + 1], which are
the last positions of its context_lens[s] keys. Its keys are in the blocks listed in its row of the block table.
Bytes of a decode step, for element size s: 2 Hkv D s per key in the context, 1 FLOP per byte at H = Hkv: reading the
cache is the bottleneck on a GPU; everything else is small.

A query's result depends on its own row and its own keys alone: tiles are cut by key position, never by batch, so a row
has the same bits in every batch and for every block size.
Specification: gpt2_kernels.reference.paged_attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_kernels import _check, _native, _paged_decode, _runtime, reference
from gpt2_kernels._launch import launch
from gpt2_kernels._operator import register
from gpt2_kernels._runtime import tl, triton

LOG2_E = 1.4426950408889634

# (minimum compute capability, element size, maximum head dimension) -> (BLOCK_M, BLOCK_N, warps, stages) of prefill,
# whatever the batch: compiled for sm_80, sm_90 and sm_100 without spills (tests/test_offline.py), not yet timed on a
# GPU. Full float32 matmuls run on the CUDA cores, hence more warps there.
PREFILL = {
    (0, 2, 64): (64, 64, 4, 2),
    (0, 2, 256): (32, 32, 4, 2),
    (0, 4, 64): (32, 32, 8, 2),
    (0, 4, 128): (32, 16, 4, 2),
    (0, 4, 256): (16, 16, 8, 2),
}
# For a float8 cache: tiles pass through registers, where they are converted, without pipelining.
FLOAT8_PREFILL = {
    (0, 2, 64): (64, 64, 4, 1),
    (0, 2, 256): (32, 32, 4, 1),
    (0, 4, 64): (32, 32, 8, 1),
    (0, 4, 128): (16, 16, 4, 1),
    (0, 4, 256): (16, 16, 8, 1),
}

TORCH_TILE = 64  # queries of a prompt that PyTorch computes at a time, as the fallback
MAX_SEQUENCES = 65535  # per launch: the limit of a grid's second and third axes


@triton.jit(
    # What varies by batch: one compiled variant serves all batches, and any slice of their index tensors.
    do_not_specialize=["stride_table", "num_blocks", "window"],
    do_not_specialize_on_alignment=["table_ptr", "context_lens_ptr", "cu_seqlens_ptr"],
)
def paged_attention_kernel(
    q_ptr,  # (Nq, H, D)
    k_cache_ptr,  # (num_blocks, block_size, Hkv, D)
    v_cache_ptr,  # (num_blocks, block_size, Hkv, D)
    table_ptr,  # (S, max_blocks) int32
    context_lens_ptr,  # (S,) int32
    cu_seqlens_ptr,  # (S + 1,) int32
    k_scale_ptr,  # (Hkv,) float32 for float8 caches, else None
    v_scale_ptr,  # (Hkv,)
    out_ptr,  # (Nq, H, D), contiguous
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_table,
    H,
    queries_per_kv,
    block_size,
    num_blocks,
    window,
    scale_log2,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program owns BLOCK_M queries of one head of one sequence and loops over its keys in order of position.

    Heads, some of which may share keys, start side by side; the last tiles, which have the most keys, start first.
    """
    h = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    tile = tl.num_programs(2) - 1 - tl.program_id(2)
    first_row = tl.load(cu_seqlens_ptr + sequence)
    queries = tl.load(cu_seqlens_ptr + sequence + 1) - first_row
    context = tl.load(context_lens_ptr + sequence)
    tl.device_assert(queries <= tl.num_programs(2) * BLOCK_M, "paged_attention: more queries than max_seqlen_q")
    if tile * BLOCK_M < queries:
        kv_head = h // queries_per_kv
        if k_scale_ptr is not None:
            scale_log2 = scale_log2 * tl.load(k_scale_ptr + kv_head)
        t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        i = t + (context - queries)  # position of each query
        d = tl.arange(0, BLOCK_D)
        n = tl.arange(0, BLOCK_N)
        d_inside = (d < D)[None, :]
        q_inside = (t < queries)[:, None] & d_inside
        rows = (first_row + t).to(tl.int64)
        q = tl.load(q_ptr + rows[:, None] * stride_qn + h * stride_qh + d[None, :], mask=q_inside, other=0.0)
        m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        begin = 0
        end = tl.minimum(context, tile * BLOCK_M + BLOCK_M + context - queries)
        if WINDOW:
            begin = tl.maximum(tile * BLOCK_M + context - queries - window + 1, 0) // BLOCK_N * BLOCK_N
        for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            j = start + n
            there = j < context
            block = tl.load(table_ptr + sequence * stride_table + j // block_size, mask=there, other=0).to(tl.int64)
            tl.device_assert(
                (block >= 0) & (block < num_blocks), "paged_attention: block outside the cache", mask=there
            )
            offset = (j % block_size).to(tl.int64)  # strides may be any
            inside = there[:, None] & d_inside
            k_at = block * stride_kb + offset * stride_kt + kv_head * stride_kh
            v_at = block * stride_vb + offset * stride_vt + kv_head * stride_vh
            k = tl.load(k_cache_ptr + k_at[:, None] + d[None, :], mask=inside, other=0.0)
            v = tl.load(v_cache_ptr + v_at[:, None] + d[None, :], mask=inside, other=0.0)
            k, v = k.to(q.dtype), v.to(q.dtype)  # float8 is exact in each of them
            s = tl.dot(q, k.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
            keep = there[None, :] & (j[None, :] <= i[:, None])
            if WINDOW:
                keep = keep & (j[None, :] > i[:, None] - window)
            s = tl.where(keep, s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
            # A row that has seen no key yet: subtract 0, so that exp2(-inf) = 0 and not exp2(-inf + inf) = NaN.
            shift = tl.where(m_new == -float("inf"), 0.0, m_new)
            p = tl.exp2(s * scale_log2 - shift[:, None])
            rescale = tl.exp2(m - shift)
            l = l * rescale + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
            m = m_new
        if v_scale_ptr is not None:
            acc = acc * tl.load(v_scale_ptr + kv_head)
        out = acc / tl.where(l > 0.0, l, 1.0)[:, None]  # a query with no key gives 0
        tl.store(out_ptr + (rows[:, None] * H + h) * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=q_inside)


def _prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    scale_log2: float,
    window: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Launches the kernel, which writes to `out` the rows of q that belong to a sequence."""
    H, D = q.shape[1:]
    table = PREFILL if k_cache.dtype == q.dtype else FLOAT8_PREFILL
    block_m, block_n, warps, stages = _check.tile_for(table, q)
    launch(
        paged_attention_kernel,
        (H, context_lens.shape[0], _check.cdiv(max_seqlen_q, block_m)),
        q,
        k_cache,
        v_cache,
        block_table,
        context_lens,
        cu_seqlens_q,
        k_scale,
        v_scale,
        out,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_table.stride(0),
        H,
        H // k_cache.shape[2],
        k_cache.shape[1],
        k_cache.shape[0],
        window,
        scale_log2,
        D=D,
        WINDOW=window > 0,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=max(16, _check.power_of_2(D)),
        STAGES=stages,
        num_warps=warps,
        num_stages=stages,
    )


def _paged_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    _check.float8_gpu("paged_attention", k_cache)
    q, block_table = _check.unit_last_stride(q), _check.unit_last_stride(block_table)
    k_scale, v_scale = (None if scale is None else scale.contiguous() for scale in (k_scale, v_scale))
    context_lens, cu_seqlens_q = context_lens.contiguous(), cu_seqlens_q.contiguous()
    if max_seqlen_q == 1 and q.numel() and context_lens.numel():
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # the kernel writes all of it
    else:
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # rows past the last sequence stay 0
    if out.numel() == 0 or max_seqlen_q == 0:
        return out
    sequences, scale_log2 = context_lens.shape[0], scale * LOG2_E
    for first in range(0, sequences, MAX_SEQUENCES):  # sequences are independent
        last = first + MAX_SEQUENCES
        table, lens, cu = block_table, context_lens, cu_seqlens_q
        if sequences > MAX_SEQUENCES:  # slices cost the host a microsecond each
            table, lens, cu = table[first:last], lens[first:last], cu[first : last + 1]
        if max_seqlen_q == 1:
            rows = q.shape[0] if last >= sequences else 0
            _paged_decode.decode(q, k_cache, v_cache, table, lens, cu, scale_log2, window, k_scale, v_scale, out, rows)
        else:
            _prefill(q, k_cache, v_cache, table, lens, cu, max_seqlen_q, scale_log2, window, k_scale, v_scale, out)
    return out


def _decode_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    _check.float8_gpu("paged_decode_", k_cache)
    q, k, v, block_table = (_check.unit_last_stride(t) for t in (q, k, v, block_table))
    k_scale, v_scale = (None if scale is None else scale.contiguous() for scale in (k_scale, v_scale))
    slots, lens = slots.contiguous(), context_lens.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows: tuple[Tensor, ...] = (q, k, v, slots, block_table, lens, out)
    for first in range(0, out.shape[0] if out.numel() else 0, MAX_SEQUENCES):
        part = rows
        if out.shape[0] > MAX_SEQUENCES:
            part = tuple(t[first : first + MAX_SEQUENCES] for t in rows)
        q, k, v, slots, block_table, lens, some = part
        _paged_decode.decode(
            q, k_cache, v_cache, block_table, lens, None, scale * LOG2_E, window, k_scale, v_scale, some, 0,
            fresh=(k, v, slots),
        )  # fmt: skip
    return out


def _decode_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    torch.ops.gpt2_kernels.append_kv_(k, v, k_cache, v_cache, slots, k_scale, v_scale)
    starts = torch.arange(q.shape[0] + 1, dtype=torch.int32)
    return _paged_cpu(q, k_cache, v_cache, block_table, context_lens, starts, 1, scale, window, k_scale, v_scale)


def _paged_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    if _runtime.native(k_cache):
        q = _check.unit_last_stride(q)
        return _native.ops().paged_attention(
            q, k_cache, v_cache, block_table, context_lens, cu_seqlens_q, scale, window
        )
    _check_indices(k_cache, block_table, context_lens, cu_seqlens_q, q.shape[0])
    if max_seqlen_q > 1:
        cache = k_cache, v_cache, block_table, context_lens
        return _prefill_torch(q, *cache, cu_seqlens_q, scale, window, k_scale, v_scale)
    return reference.paged_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        context_lens,
        cu_seqlens_q,
        scale=scale,
        window=window,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _prefill_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    window: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """`reference.paged_attention` in tiles of positions: TORCH_TILE queries over all keys up to the tile's end.

    The bits of PyTorch's matmuls depend on the shapes. Here a position is always the same row of the same zero-padded
    shapes, whichever part of its prompt is being computed, so a token has the same bits in every batch.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts, lengths = cu_seqlens_q.tolist(), context_lens.tolist()
    for s, (row, length) in enumerate(zip(starts, lengths)):
        if starts[s + 1] == row:
            continue
        begin = length - (starts[s + 1] - row)  # position of the first query
        padding = (0, 0, 0, 0, 0, -length % TORCH_TILE)
        k = F.pad(reference.gathered(k_cache, block_table[s], length, k_scale), padding)
        v = F.pad(reference.gathered(v_cache, block_table[s], length, v_scale), padding)
        queries = F.pad(q[row : starts[s + 1]], (0, 0, 0, 0, begin % TORCH_TILE, -length % TORCH_TILE))
        first = begin - begin % TORCH_TILE
        for end in range(first + TORCH_TILE, len(k) + 1, TORCH_TILE):
            tile = queries[end - TORCH_TILE - first : end - first]
            y, _ = reference.attention(tile[None], k[None, :end], v[None, :end], scale=scale, window=window)
            low, high = max(end - TORCH_TILE, begin), min(end, length)
            out[row + low - begin : row + high - begin] = y[0, low - end + TORCH_TILE : high - end + TORCH_TILE]
    return out


def _check_indices(k_cache: Tensor, block_table: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor, Nq: int) -> None:
    """Checks the contents of the index tensors; only on the CPU path, where reading them costs no synchronisation."""
    op, (num_blocks, block_size) = "paged_attention", k_cache.shape[:2]
    cu, lens = cu_seqlens_q.tolist(), context_lens.tolist()
    if cu[0] != 0 or cu[-1] > Nq or any(b < a for a, b in zip(cu, cu[1:])):
        _check.fail(op, f"cu_seqlens_q must rise from 0 to at most {Nq}", cu)
    for s, length in enumerate(lens):
        if not 0 <= length <= block_table.shape[1] * block_size:
            _check.fail(op, f"context_lens must lie in 0..{block_table.shape[1] * block_size}", length)
        used = block_table[s, : -(-length // block_size)]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < num_blocks:
            _check.fail(op, f"block_table must lie in 0..{num_blocks - 1}", [int(used.min()), int(used.max())])


def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


register(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor context_lens,"
    " Tensor cu_seqlens_q, SymInt max_seqlen_q, float scale, int window, Tensor? k_scale=None,"
    " Tensor? v_scale=None) -> Tensor",
    triton_impl=_paged_triton,
    cpu_impl=_paged_cpu,
    fake=_fake,
    cpu="native",
)
register(
    "paged_decode_(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots,"
    " Tensor block_table, Tensor context_lens, float scale, int window, Tensor? k_scale=None, Tensor? v_scale=None)"
    " -> Tensor",
    triton_impl=_decode_triton,
    cpu_impl=_decode_cpu,
    fake=lambda q, *others: q.new_empty(q.shape),
    cpu="native",
)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed queries over a paged cache: q (Nq, H, D) -> (Nq, H, D).

    k_cache, v_cache (num_blocks, block_size, Hkv, D), any strides with a dense last axis; block_table (S, max_blocks)
    int32; context_lens (S,) int32, the queries included; cu_seqlens_q (S + 1,) int32, first row of each sequence;
    max_seqlen_q at least the most queries of any sequence, where 1 means decode: decode and prefill have a tile each.
    The queries are the last positions of their sequence. The caches have the dtype of q, or are float8_e4m3fn and are
    dequantised by k_scale and v_scale, both (Hkv,) float32; on a GPU that needs compute capability 8.9. window w keeps
    the nearest w keys of a query, its own included. A query with no key gives 0. No gradient. Decode programs
    synchronise through counters that belong to the stream: a CUDA graph that contains one must not run concurrently
    with other decodes, or `linear`'s, launched or captured on the stream where it was captured.
    Raises ValueError on a shape, dtype, device or option that does not fit; an index outside the cache is an error on
    the CPU and a device assertion under TRITON_DEBUG=1 on a GPU. Source: Kwon et al., 2023, arXiv:2309.06180.
    """
    op = "paged_attention"
    _check.rank(op, "q", q, "(Nq, H, D)")
    _check.paged(op, q, k_cache, v_cache, k_scale, v_scale, block_table, context_lens)
    _check.shape(op, "cu_seqlens_q", cu_seqlens_q, (block_table.shape[0] + 1,), "(S + 1,)")
    _check.index(op, "cu_seqlens_q", cu_seqlens_q, torch.int32, q)
    if max_seqlen_q < 0:
        _check.fail(op, "max_seqlen_q must be at least 0", max_seqlen_q)
    scale, window = _check.attention_options(op, q.shape[2], scale, window)
    _check.no_gradient(op, q=q, k_cache=k_cache, v_cache=v_cache)
    return torch.ops.gpt2_kernels.paged_attention(
        q, k_cache, v_cache, block_table, context_lens, cu_seqlens_q, max_seqlen_q, scale, window, k_scale, v_scale
    )


def paged_decode_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`append_kv_` and `paged_attention` of one new token per sequence, in one launch: q (S, H, D) -> (S, H, D).

    k, v (S, Hkv, D) are written to slots (S,) int64 of the cache, each the slot of its sequence's last position,
    context_lens[s] - 1; -1 for a sequence with no new token, whose last position is in the cache already. A slot that
    is written belongs to its sequence alone: no other may attend to it in this call. Everything else is as in those
    two. No gradient. Raises ValueError as they do.
    """
    op = "paged_decode_"
    _check.rank(op, "q", q, "(S, H, D)")
    _check.paged(op, q, k_cache, v_cache, k_scale, v_scale, block_table, context_lens)
    S = q.shape[0]
    _check.shape(op, "block_table", block_table, (S, block_table.shape[1]), "(S, max_blocks)")
    _check.same_kind(op, "q", q, k=k, v=v)
    for name, tensor in (("k", k), ("v", v)):
        _check.shape(op, name, tensor, (S, *k_cache.shape[2:]), "(S, Hkv, D)")
    _check.shape(op, "slots", slots, (S,), "(S,)")
    _check.index(op, "slots", slots, torch.int64, q)
    scale, window = _check.attention_options(op, q.shape[2], scale, window)
    _check.no_gradient(op, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    return torch.ops.gpt2_kernels.paged_decode_(
        q, k, v, k_cache, v_cache, slots, block_table, context_lens, scale, window, k_scale, v_scale
    )
