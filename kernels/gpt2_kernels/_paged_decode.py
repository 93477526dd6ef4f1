"""Paged attention for one query per sequence: split keys (Flash-Decoding style), in a single launch.

A split is SPLIT keys, counted from position 0 and never by batch, so that the tree of sums depends on the sequence
alone; a sequence that would have more than MAX_PARTS splits uses multiples of SPLIT keys instead. One program attends
to one split of one sequence, for one head, or for up to 16 heads that read the same keys. It writes (sum of p v,
maximum, sum of p) to a scratch buffer and takes a ticket; the program that takes the last ticket of its sequence and
head combines the parts in order of position. A sequence of one split needs neither.

Bytes of a program at D = 64 in bfloat16: 256 keys and values of 128 bytes, 64 KiB, read once, and 272 bytes of scratch
written and read, 0.8 %. Arithmetic: 4 SPLIT D FLOPs per head, 1 per byte where every head has keys of its own (H =
Hkv). A tensor-core tile would compute 16 rows for the one that is wanted, after a trip through shared memory; instead
keys and values are loaded from memory into registers, 16 bytes per load, and multiplied there in float32: some 30 warp
instructions per key, where the memory bandwidth leaves time for 50. A split's loads depend only on the table lookup, so
a program has all its 64 KiB in flight at once; 4.3 TB/s and 0.8 us of latency need 26 KiB per SM, and two programs are
resident on each.
A float8 cache halves the bytes: four programs of 32 KiB keep as much in flight. Its scales cost nothing per key: that
of the keys is folded into the score's scale, that of the values multiplies the sum.
Where heads share keys (H > Hkv), there is more arithmetic for the same bytes: tensor cores, with tiles pipelined
through shared memory.

`paged_decode_` passes the new keys and values along with the queries, which saves the launch that would write them to
the cache first. The program of a sequence's last split writes those of its head, and reads them from the inputs:
nothing needs to wait, since no other sequence may have that slot among its keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2_kernels import _check, _overlap
from gpt2_kernels._float8 import to_float8
from gpt2_kernels._launch import launch, tickets
from gpt2_kernels._overlap import wait
from gpt2_kernels._runtime import tl, triton

# (minimum compute capability, element size, maximum head dimension) -> (SPLIT, BLOCK_N, warps, stages). Compiled for
# sm_80, sm_90 and sm_100 without spills (tests/test_offline.py), not yet timed on a GPU. The first table is for heads
# that have keys of their own; its BLOCK_N is what fits in registers.
ONE_HEAD = {
    (0, 1, 64): (256, 256, 4, 1),
    (100, 1, 128): (256, 64, 4, 1),
    (0, 1, 128): (256, 128, 4, 1),
    (0, 1, 256): (256, 32, 4, 1),
    (0, 2, 64): (256, 256, 8, 1),
    (0, 2, 128): (256, 64, 4, 1),
    (0, 2, 256): (256, 32, 4, 1),
    (0, 4, 64): (256, 128, 8, 1),
    (100, 4, 128): (256, 16, 4, 1),
    (0, 4, 128): (256, 32, 4, 1),
    (0, 4, 256): (256, 16, 4, 1),
}
SHARED_KEYS = {
    (90, 2, 128): (256, 64, 4, 3),
    (0, 2, 64): (256, 64, 4, 2),
    (0, 2, 128): (256, 64, 4, 3),
    (100, 2, 256): (256, 16, 8, 2),
    (0, 2, 256): (256, 32, 8, 2),
    (100, 4, 64): (256, 32, 8, 3),
    (0, 4, 64): (256, 32, 8, 2),
    (0, 4, 256): (256, 16, 8, 2),
}
# For a float8 cache, by the type of the queries: tiles pass through registers, where they are converted, unpipelined.
SHARED_FLOAT8_KEYS = {
    (0, 2, 64): (256, 64, 8, 1),
    (0, 2, 128): (256, 32, 8, 1),
    (100, 2, 256): (256, 16, 8, 1),
    (0, 2, 256): (256, 32, 8, 1),
    (100, 4, 64): (256, 64, 8, 1),
    (0, 4, 64): (256, 32, 8, 1),
    (0, 4, 256): (256, 16, 8, 1),
}
# Maximum parts per sequence: scratch is sized by what the table has room for, and 131,072 keys for 256 sequences of 32
# heads of D = 128 would take 2 GB. 64 parts of 8 heads are 512 programs, about as many as an H200 holds at once.
MAX_PARTS = 64
MAX_HEADS = 16  # per program, sharing keys: rows of a tensor-core tile
COMBINED = 2048  # scratch elements that a combining program reads at a time


@triton.jit(
    # What varies by batch: one compiled variant serves all batches, and any slice of their index tensors.
    do_not_specialize=["stride_table", "num_blocks", "capacity", "all_rows", "window"],
    do_not_specialize_on_alignment=["table_ptr", "context_lens_ptr", "cu_seqlens_ptr", "slots_ptr"],
)
def paged_decode_kernel(
    q_ptr,  # (Nq, H, D)
    k_cache_ptr,  # (num_blocks, BLOCK_SIZE, Hkv, D)
    v_cache_ptr,  # (num_blocks, BLOCK_SIZE, Hkv, D)
    table_ptr,  # (S, max_blocks) int32
    context_lens_ptr,  # (S,) int32
    cu_seqlens_ptr,  # (S + 1,) int32; None where sequence s has row s
    k_ptr,  # (Nq, Hkv, D), new keys for the cache, or None where it has all
    v_ptr,  # (Nq, Hkv, D)
    slots_ptr,  # (S,) int64, where they go; -1 for a sequence with none
    k_scale_ptr,  # (Hkv,) float32 for float8 caches, else None
    v_scale_ptr,  # (Hkv,)
    parts_ptr,  # (S, H, most parts, PART): D sums of p v, the maximum, the sum of p
    tickets_ptr,  # (S, groups) int32, zeros
    out_ptr,  # (Nq, H, D), contiguous
    stride_qn,
    stride_qh,
    stride_kn,
    stride_knh,
    stride_vn,
    stride_vnh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_table,
    H,
    queries_per_kv,
    num_blocks,
    capacity,  # keys that a row of the table has room for
    all_rows,  # Nq in the launch of the last sequence, else 0
    window,
    scale_log2,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_PARTS: tl.constexpr,  # None where splits of SPLIT keys never exceed it
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMBINE: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program owns a split of HEADS heads of one sequence; the last to finish combines the splits in order."""
    wait(OVERLAP)
    # Programs without keys, for texts shorter than the table, are interleaved with the others, not launched after them.
    part = tl.program_id(0)
    group = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    groups_per_kv = tl.cdiv(queries_per_kv, HEADS)
    kv_head = (group // groups_per_kv).to(tl.int64)
    member = group % groups_per_kv * HEADS + tl.arange(0, HEADS)
    head = kv_head * queries_per_kv + member  # (HEADS,)
    d = tl.arange(0, BLOCK_D)
    wanted = (member < queries_per_kv)[:, None] & (d < D)[None, :]  # (HEADS, BLOCK_D)
    out_at = out_ptr + head[:, None] * D + d[None, :]

    if cu_seqlens_ptr is None:
        row = tl.program_id(2)
        queries = 1
    else:
        row = tl.load(cu_seqlens_ptr + sequence)
        queries = tl.load(cu_seqlens_ptr + sequence + 1) - row
    if (part == 0) & (sequence == tl.num_programs(2) - 1):
        behind = (row + queries).to(tl.int64)
        while behind < all_rows:  # rows past the last sequence
            tl.store(out_at + behind * H * D, tl.zeros([HEADS, BLOCK_D], out_ptr.dtype.element_ty), mask=wanted)
            behind += 1

    context = tl.load(context_lens_ptr + sequence)
    tl.device_assert((queries == 0) | (queries == 1), "paged_attention: more queries than max_seqlen_q")
    tl.device_assert((context >= 0) & (context <= capacity), "paged_attention: context_lens outside the table")
    context = tl.minimum(tl.maximum(context, 0), capacity)  # else the last ticket would never be taken
    begin = 0
    if WINDOW:
        begin = tl.maximum(context - window, 0)
    size = SPLIT  # a constant unless the table is wide enough to need more: registers are scarce
    if MAX_PARTS is not None:
        size = SPLIT * tl.maximum(tl.cdiv(context - begin, SPLIT * (MAX_PARTS - 1)), 1)  # one less: two may be cut
    first = begin // size
    parts = tl.maximum(tl.cdiv(context, size) - first, 1)  # one empty part where there is no context
    if (queries > 0) & (part < parts):
        row64 = row.to(tl.int64)
        if k_scale_ptr is not None:
            scale_log2 = scale_log2 * tl.load(k_scale_ptr + kv_head)
        q_row = q_ptr + row64 * stride_qn
        if HEADS == 1:
            m = -float("inf")
            l = 0.0
            acc = tl.zeros([BLOCK_D], tl.float32)
        else:
            q = tl.load(q_row + head[:, None] * stride_qh + d[None, :], mask=wanted, other=0.0)  # (HEADS, BLOCK_D)
            m = tl.full([HEADS], -float("inf"), tl.float32)
            l = tl.zeros([HEADS], tl.float32)
            acc = tl.zeros([HEADS, BLOCK_D], tl.float32)
        split = first + part
        start = tl.maximum(split * size, begin // BLOCK_N * BLOCK_N)
        end = tl.minimum(split * size + size, context)
        fresh = False
        if k_ptr is not None:
            slot = tl.load(slots_ptr + sequence)
            tl.device_assert(slot < num_blocks * BLOCK_SIZE, "paged_decode_: slot outside the cache")
            tl.device_assert((slot < 0) | (context > 0), "paged_decode_: a new key that context_lens does not count")
            fresh = (slot >= 0) & (end == context) & (context > 0)
            end -= fresh.to(tl.int32)
            start = tl.where(begin < end, start, end)  # no tile where the window holds only the new key
        for n in tl.range(start, end, BLOCK_N, num_stages=STAGES):
            j = n + tl.arange(0, BLOCK_N)
            there = j < end
            if WINDOW:
                there = there & (j >= begin)
            block = tl.load(table_ptr + sequence * stride_table + j // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
            tl.device_assert(
                (block >= 0) & (block < num_blocks), "paged_attention: block outside the cache", mask=there
            )
            offset = (j % BLOCK_SIZE).to(tl.int64)  # strides may be any
            k_at = block * stride_kb + offset * stride_kt + kv_head * stride_kh
            v_at = block * stride_vb + offset * stride_vt + kv_head * stride_vh
            inside = there[:, None] & (d < D)[None, :]
            k = tl.load(k_cache_ptr + k_at[:, None] + d[None, :], mask=inside, other=0.0)  # (BLOCK_N, BLOCK_D)
            v = tl.load(v_cache_ptr + v_at[:, None] + d[None, :], mask=inside, other=0.0)
            # Every tile has a visible key: the maximum stays -inf only in a split without keys.
            if HEADS == 1:
                # q is loaded here, or the compiler would delay loading the values until it has multiplied the keys.
                tl.debug_barrier()
                q = tl.load(q_row + kv_head * stride_qh + d, mask=d < D, other=0.0).to(tl.float32) * scale_log2
                s = tl.where(there, tl.sum(k.to(tl.float32) * q[None, :], 1), -float("inf"))  # (BLOCK_N,)
                m_new = tl.maximum(m, tl.max(s, 0))
                p = tl.exp2(s - m_new)
                rescale = tl.exp2(m - m_new)
                l = l * rescale + tl.sum(p, 0)
                acc = acc * rescale + tl.sum(p[:, None] * v.to(tl.float32), 0)
            else:
                k, v = k.to(q.dtype), v.to(q.dtype)
                s = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2  # (HEADS, BLOCK_N)
                s = tl.where(there[None, :], s, -float("inf"))
                m_new = tl.maximum(m, tl.max(s, 1))
                p = tl.exp2(s - m_new[:, None])
                rescale = tl.exp2(m - m_new)
                l = l * rescale + tl.sum(p, 1)
                acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
            m = m_new
        if HEADS == 1:
            m = tl.zeros([1], tl.float32) + m
            l = tl.zeros([1], tl.float32) + l
            acc = acc[None, :]
        if k_ptr is not None:
            if fresh:  # the query's own key, after all others
                fresh_k = tl.load(k_ptr + row64 * stride_kn + kv_head * stride_knh + d, mask=d < D, other=0.0)
                fresh_v = tl.load(v_ptr + row64 * stride_vn + kv_head * stride_vnh + d, mask=d < D, other=0.0)
                if k_scale_ptr is not None:
                    fresh_k = to_float8(fresh_k, tl.load(k_scale_ptr + kv_head))
                    fresh_v = to_float8(fresh_v, tl.load(v_scale_ptr + kv_head))
                writes = (group % groups_per_kv == 0) & (d < D)
                to_block, to_offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
                k_to = to_block * stride_kb + to_offset * stride_kt + kv_head * stride_kh
                v_to = to_block * stride_vb + to_offset * stride_vt + kv_head * stride_vh
                tl.store(k_cache_ptr + k_to + d, fresh_k, mask=writes)
                tl.store(v_cache_ptr + v_to + d, fresh_v, mask=writes)
                fresh_q = tl.load(q_row + head[:, None] * stride_qh + d[None, :], mask=wanted, other=0.0)
                score = tl.sum(fresh_q.to(tl.float32) * fresh_k.to(tl.float32)[None, :], 1) * scale_log2  # (HEADS,)
                highest = tl.maximum(m, score)
                weight = tl.exp2(score - highest)
                shrink = tl.exp2(m - highest)
                l = l * shrink + weight
                acc = acc * shrink[:, None] + weight[:, None] * fresh_v.to(tl.float32)[None, :]
                m = highest
        if v_scale_ptr is not None:
            acc = acc * tl.load(v_scale_ptr + kv_head)

        out_at += row64 * H * D
        if parts == 1:
            out = acc / tl.where(l > 0.0, l, 1.0)[:, None]  # a query with no key gives 0
            tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=wanted)
        else:
            # One row of scratch per head and part; the parts of a head are adjacent.
            rows = (sequence * H + head) * tl.num_programs(0)  # (HEADS,)
            mine = parts_ptr + (rows + part) * PART
            tl.store(mine[:, None] + d[None, :], acc, mask=wanted)
            tl.store(mine + D, m, mask=member < queries_per_kv)
            tl.store(mine + D + 1, l, mask=member < queries_per_kv)
            tl.debug_barrier()  # the whole program has stored before its one ticket is taken
            ticket_at = tickets_ptr + sequence * tl.num_programs(1) + group
            # Release what was stored here, acquire what the others stored.
            if tl.atomic_add(ticket_at, 1, sem="acq_rel") == parts - 1:
                _combine(parts_ptr, rows, parts, d, member < queries_per_kv, out_at, D, COMBINE, PART)
                tl.store(ticket_at, 0)  # for the next launch


@triton.jit
def _combine(parts_ptr, rows, parts, d, real, out_at, D: tl.constexpr, COMBINE: tl.constexpr, PART: tl.constexpr):
    """Combines the parts of each head, COMBINE at a time and in order, and stores the resulting row."""
    HEADS: tl.constexpr = rows.shape[0]
    m = tl.full([HEADS], -float("inf"), tl.float32)
    l = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, d.shape[0]], tl.float32)
    for first in tl.range(0, parts, COMBINE):
        part = first + tl.arange(0, COMBINE)
        at = parts_ptr + (part[:, None] + rows[None, :]) * PART  # (COMBINE, HEADS)
        there = (part < parts)[:, None] & real[None, :]
        # .cg: from L2, where the other programs left them
        m_part = tl.load(at + D, mask=there, other=-float("inf"), cache_modifier=".cg")
        l_part = tl.load(at + D + 1, mask=there, other=0.0, cache_modifier=".cg")
        acc_part = tl.load(
            at[:, :, None] + d[None, None, :],
            mask=there[:, :, None] & (d < D)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )  # (COMBINE, HEADS, BLOCK_D)
        m_new = tl.maximum(m, tl.max(m_part, 0))
        shift = tl.where(real, m_new, 0.0)  # rows of no head: exp2(-inf) = 0
        weight = tl.exp2(m_part - shift[None, :])
        rescale = tl.exp2(m - shift)
        l = l * rescale + tl.sum(l_part * weight, 0)
        acc = acc * rescale[:, None] + tl.sum(acc_part * weight[:, :, None], 0)
        m = m_new
    out = acc / l[:, None]
    tl.store(out_at, out.to(out_at.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    scale_log2: float,
    window: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
    all_rows: int,
    fresh: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Launches the kernel: writes `out` for the rows of q, and zeros from row cu_seqlens_q[-1] up to all_rows.

    fresh: the queries' own keys and values (Nq, Hkv, D), and the cache slots (S,) that they go to.
    """
    (H, D), (num_blocks, block_size, Hkv) = q.shape[1:], k_cache.shape[:3]
    S, max_blocks = block_table.shape
    heads = 1 if H == Hkv else MAX_HEADS
    if heads == 1:
        row = _check.tile_for(ONE_HEAD, k_cache)  # keyed by the cache's dtype, which registers hold
    else:
        row = _check.tile_for(SHARED_KEYS if k_cache.dtype == q.dtype else SHARED_FLOAT8_KEYS, q)
    split, block_n, warps, stages = row
    groups = Hkv * _check.cdiv(H // Hkv, heads)
    block_d = max(16, _check.power_of_2(D))
    keys = max_blocks * block_size  # a bound known to the host, without reading context_lens
    if window:
        keys = min(keys, window + split - 1)  # the window may begin inside a split
    most = min(max(1, _check.cdiv(keys, split)), MAX_PARTS)
    part = 4 * _check.cdiv(D + 2, 4)  # a multiple of 16 bytes
    parts = torch.empty(S * H * most * part if most > 1 else 0, dtype=torch.float32, device=q.device)
    launch(
        paged_decode_kernel,
        (most, groups, S),
        q,
        k_cache,
        v_cache,
        block_table,
        context_lens,
        cu_seqlens_q,
        *(fresh or (None, None, None)),
        k_scale,
        v_scale,
        parts,
        tickets(S * groups, q.device),
        out,
        *q.stride()[:2],
        *((0, 0, 0, 0) if fresh is None else (*fresh[0].stride()[:2], *fresh[1].stride()[:2])),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_table.stride(0),
        H,
        H // Hkv,
        num_blocks,
        max_blocks * block_size,
        all_rows,
        window,
        scale_log2,
        D=D,
        BLOCK_SIZE=block_size,
        WINDOW=window > 0,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        HEADS=heads,
        SPLIT=split,
        MAX_PARTS=MAX_PARTS if keys > split * (MAX_PARTS - 1) else None,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        COMBINE=min(16, max(1, COMBINED // (heads * block_d))),
        PART=part,
        STAGES=stages,
        **_overlap.options(q.device),
        num_warps=warps,
        num_stages=stages,
    )
