"""Fused causal softmax attention, backward (FlashAttention-2, Dao, 2023): two kernels, deterministic by construction.

    p = exp(s - lse),   dv = (p z)^T do,   dp = (do v^T) z,   delta = sum(do * out) - dlse
    ds = p (dp - delta),   dq = scale ds k,   dk = scale ds^T q           z: dropout's 0 or 1 / (1 - dropout_p)

The first kernel tiles over queries and computes delta and dq; the second tiles over keys and computes dk and dv, with
the scores transposed, so that p^T and ds^T never leave registers. One program sums each result, in a fixed order: no
atomics, bitwise reproducible.
FLOPs, causal, Tq = Tk = T: (3 + 4) B H T^2 D; a single kernel that adds dq with atomics would need 5. Bytes, for
element size s: first kernel 6 B T H D s, second 6 B T H D s. Two exponentials per visible pair.
Specification: gpt2_kernels.reference.attention_backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt2_kernels import _check, reference
from gpt2_kernels._attention import dropout_keep, key_range, tile, variant
from gpt2_kernels._launch import launch
from gpt2_kernels._operator import register
from gpt2_kernels._runtime import tl, triton

# (minimum compute capability, element size, maximum head dimension) -> (BLOCK_M queries, BLOCK_N keys, warps, stages).
# Nothing spills in any case of benchmarks.compile_report; not yet timed on a GPU.
DQ_TILES = {
    (0, 2, 64): (64, 64, 4, 2),
    (0, 2, 128): (64, 32, 8, 2),
    (0, 2, 256): (32, 32, 4, 2),
    (0, 4, 64): (32, 32, 8, 2),
    (0, 4, 128): (32, 16, 8, 2),
    (0, 4, 256): (16, 16, 8, 2),
    (0, 8, 256): (16, 16, 4, 2),  # the interpreter's gradcheck
}
DKDV_TILES = {
    (90, 2, 64): (64, 128, 8, 2),
    (0, 2, 64): (32, 128, 8, 2),
    (90, 2, 128): (32, 64, 8, 2),
    (0, 2, 128): (32, 32, 8, 2),
    (0, 2, 256): (32, 32, 8, 2),
    (0, 4, 64): (32, 32, 8, 2),
    (0, 4, 128): (32, 16, 8, 2),
    (0, 4, 256): (16, 16, 8, 3),
    (0, 8, 256): (16, 16, 4, 2),
}


@triton.jit
def _dq_blocks(
    q,  # (BLOCK_M, BLOCK_D)
    do,  # (BLOCK_M, BLOCK_D)
    lse2,  # (BLOCK_M,) base 2
    delta,  # (BLOCK_M,)
    dq,  # (BLOCK_M, BLOCK_D)
    k_tile,  # (BLOCK_N, BLOCK_D) pointers to the keys 0..BLOCK_N - 1
    v_tile,
    stride_k,
    stride_v,
    first,
    last,
    i,  # (BLOCK_M,) positions of the queries among the keys
    past,  # position of query 0
    Tk,
    window,
    scale_log2,
    seed,
    head,
    threshold,
    keep_scale,
    d_inside,  # (1, BLOCK_D)
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds the contribution of keys first..last - 1 to dq; `first` is a multiple of BLOCK_N."""
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        start = tl.multiple_of(start, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        offset = tl.cast(start, tl.int64)
        if MASKED:
            load = (j < Tk)[:, None] & d_inside
            k = tl.load(k_tile + offset * stride_k, mask=load, other=0.0)
            v = tl.load(v_tile + offset * stride_v, mask=load, other=0.0)
        elif EVEN_D:
            k = tl.load(k_tile + offset * stride_k)
            v = tl.load(v_tile + offset * stride_v)
        else:
            k = tl.load(k_tile + offset * stride_k, mask=d_inside, other=0.0)
            v = tl.load(v_tile + offset * stride_v, mask=d_inside, other=0.0)
        s = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=ACC)  # (BLOCK_M, BLOCK_N)
        p = tl.exp2(s * scale_log2 - lse2[:, None])
        if MASKED:
            keep = (j < Tk)[None, :]
            if CAUSAL:
                keep = keep & (j[None, :] <= i[:, None])
            if WINDOW:
                keep = keep & (j[None, :] > i[:, None] - window)
            p = tl.where(keep, p, 0.0)  # a row with no key has lse -inf: its p is infinite before this
        dp = tl.dot(do, v.T, input_precision=PRECISION, out_dtype=ACC)
        if DROPOUT:
            dp = tl.where(dropout_keep(seed, head, i - past, start, threshold, BLOCK_N), dp * keep_scale, 0.0)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION, out_dtype=ACC)
    return dq


@triton.jit(do_not_specialize=["B", "Tq", "Tk", "threshold"])
def attention_dq_kernel(
    q_ptr,  # (B, Tq, H, D), or packed (1, Nq, H, D)
    k_ptr,  # (B, Tk, Hkv, D), or packed (1, Nk, Hkv, D)
    v_ptr,  # as k
    out_ptr,  # as q, contiguous
    do_ptr,  # as q
    lse_ptr,  # (B, H, Tq) or (1, H, Nq), contiguous, natural log
    dlse_ptr,  # as lse, or None
    delta_ptr,  # as lse: written here, for the dk and dv kernel
    dq_ptr,  # (B, Tq, H, D), heads dense
    cu_q_ptr,  # (B + 1,) int32 where PACKED
    cu_k_ptr,
    seed_ptr,  # (1,) int64 where DROPOUT
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dq,
    B,
    Tq,
    Tk,
    H,
    queries_per_kv,
    window,
    scale,
    threshold,
    keep_scale,
    D: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program owns BLOCK_M queries of one head and loops over the keys that they see; long rows start first."""
    pid = tl.program_id(0)
    tile = tl.num_programs(0) // (B * H) - 1 - pid // (B * H)
    head = pid % (B * H)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    kv_head = h // queries_per_kv
    statistics = h * Tq
    if PACKED:
        q_first = tl.load(cu_q_ptr + b)
        k_first = tl.load(cu_k_ptr + b)
        Tq = tl.load(cu_q_ptr + b + 1) - q_first
        Tk = tl.load(cu_k_ptr + b + 1) - k_first
        if tile * BLOCK_M >= Tq:
            return
        row = q_first.to(tl.int64)
        q_ptr += row * stride_qt
        k_ptr += k_first.to(tl.int64) * stride_kt
        v_ptr += k_first.to(tl.int64) * stride_vt
        out_ptr += row * stride_ot
        do_ptr += row * stride_dot
        statistics += row
    else:
        row = b * Tq
        q_ptr += b * stride_qb
        k_ptr += b * stride_kb
        v_ptr += b * stride_vb
        out_ptr += b * stride_ob
        do_ptr += b * stride_dob
        statistics += b * H * Tq

    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    d_inside = (d < D)[None, :]
    rows = t.to(tl.int64)
    t_inside = t < Tq
    inside = t_inside[:, None] & d_inside
    q = tl.load(q_ptr + h * stride_qh + rows[:, None] * stride_qt + d[None, :], mask=inside, other=0.0)
    do = tl.load(do_ptr + h * stride_doh + rows[:, None] * stride_dot + d[None, :], mask=inside, other=0.0)
    out = tl.load(out_ptr + h * stride_oh + rows[:, None] * stride_ot + d[None, :], mask=inside, other=0.0)
    delta = tl.sum(out.to(ACC) * do.to(ACC), 1)
    statistics += rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + statistics, mask=t_inside, other=0.0)
    tl.store(delta_ptr + statistics, delta, mask=t_inside)
    lse2 = tl.load(lse_ptr + statistics, mask=t_inside, other=0.0) * 1.4426950408889634
    k_tile = k_ptr + kv_head * stride_kh + n[:, None] * stride_kt + d[None, :]
    v_tile = v_ptr + kv_head * stride_vh + n[:, None] * stride_vt + d[None, :]
    scale_log2 = scale * 1.4426950408889634
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    else:
        seed = 0

    past = Tk - Tq
    i = t + past
    low = tile * BLOCK_M + past  # position of the first query
    begin, full_begin, full_end, end = key_range(low, low + BLOCK_M - 1, Tk, window, CAUSAL, WINDOW, BLOCK_N)
    if WINDOW:
        dq = _dq_blocks(
            q, do, lse2, delta, dq, k_tile, v_tile, stride_kt, stride_vt, begin, full_begin, i, past, Tk, window,
            scale_log2, seed, head, threshold, keep_scale, d_inside,
            True, CAUSAL, WINDOW, DROPOUT, D == BLOCK_D, PRECISION, ACC, BLOCK_N, STAGES,
        )  # fmt: skip
    dq = _dq_blocks(
        q, do, lse2, delta, dq, k_tile, v_tile, stride_kt, stride_vt, full_begin, full_end, i, past, Tk, window,
        scale_log2, seed, head, threshold, keep_scale, d_inside,
        False, CAUSAL, WINDOW, DROPOUT, D == BLOCK_D, PRECISION, ACC, BLOCK_N, STAGES,
    )  # fmt: skip
    dq = _dq_blocks(
        q, do, lse2, delta, dq, k_tile, v_tile, stride_kt, stride_vt, full_end, end, i, past, Tk, window,
        scale_log2, seed, head, threshold, keep_scale, d_inside,
        True, CAUSAL, WINDOW, DROPOUT, D == BLOCK_D, PRECISION, ACC, BLOCK_N, STAGES,
    )  # fmt: skip
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + (row + rows[:, None]) * stride_dq + h * D + d[None, :], dq, mask=inside)


@triton.jit
def _dkdv_blocks(
    k,  # (BLOCK_N, BLOCK_D)
    v,  # (BLOCK_N, BLOCK_D)
    dk,  # (BLOCK_N, BLOCK_D)
    dv,  # (BLOCK_N, BLOCK_D)
    q_tile,  # (BLOCK_M, BLOCK_D) pointers to the queries 0..BLOCK_M - 1
    do_tile,
    lse_ptr,  # of query 0
    delta_ptr,
    stride_q,
    stride_do,
    first,
    last,
    j,  # (BLOCK_N,) the keys
    Tq,
    Tk,
    window,
    scale_log2,
    seed,
    head,
    threshold,
    keep_scale,
    d_inside,  # (1, BLOCK_D)
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds the contribution of queries first..last - 1 to dk and dv; `first` is a multiple of BLOCK_M."""
    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        start = tl.multiple_of(start, BLOCK_M)
        t = start + tl.arange(0, BLOCK_M)
        offset = tl.cast(start, tl.int64)
        # A query past the last is a row of zeros: do = 0 and delta = 0, so it adds nothing.
        load = (t < Tq)[:, None]
        if not EVEN_D:
            load = load & d_inside
        q = tl.load(q_tile + offset * stride_q, mask=load, other=0.0)
        do = tl.load(do_tile + offset * stride_do, mask=load, other=0.0)
        lse2 = tl.load(lse_ptr + t, mask=t < Tq, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + t, mask=t < Tq, other=0.0)
        s = tl.dot(k, q.T, input_precision=PRECISION, out_dtype=ACC)  # (BLOCK_N, BLOCK_M)
        p = tl.exp2(s * scale_log2 - lse2[None, :])
        if MASKED:
            # Keys past the last have rows of their own in dk and dv, which are not stored.
            i = t + (Tk - Tq)
            if CAUSAL:
                keep = j[:, None] <= i[None, :]
            else:
                keep = (t < Tq)[None, :]
            if WINDOW:
                keep = keep & (j[:, None] > i[None, :] - window)
            p = tl.where(keep, p, 0.0)
        dropped = p
        if DROPOUT:
            kept = tl.trans(dropout_keep(seed, head, t, tl.min(j, 0), threshold, BLOCK_N))
            dropped = tl.where(kept, p * keep_scale, 0.0)
        # dv's matmul before dp's: the other order keeps 50 more registers alive.
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(v, do.T, input_precision=PRECISION, out_dtype=ACC)
        if DROPOUT:
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit(do_not_specialize=["B", "Tq", "Tk", "threshold"])
def attention_dkdv_kernel(
    q_ptr,  # (B, Tq, H, D), or packed (1, Nq, H, D)
    k_ptr,  # (B, Tk, Hkv, D), or packed (1, Nk, Hkv, D)
    v_ptr,  # as k
    do_ptr,  # as q
    lse_ptr,  # (B, H, Tq) or (1, H, Nq), contiguous, natural log
    delta_ptr,  # as lse
    dk_ptr,  # (B, Tk, Hkv, D), heads dense
    dv_ptr,  # as dk, strides too
    cu_q_ptr,  # (B + 1,) int32 where PACKED
    cu_k_ptr,
    seed_ptr,  # (1,) int64 where DROPOUT
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dkv,
    B,
    Tq,
    Tk,
    Hkv,
    queries_per_kv,
    window,
    scale,
    threshold,
    keep_scale,
    D: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program owns BLOCK_N keys of one head and loops, query head by query head, over the queries that see them, in
    order; keys that many queries see start first."""
    pid = tl.program_id(0)
    tile = pid // (B * Hkv)
    b = (pid % (B * Hkv) // Hkv).to(tl.int64)
    kv_head = (pid % Hkv).to(tl.int64)
    H = Hkv * queries_per_kv
    head_rows = Tq.to(tl.int64)  # stride of lse between heads
    if PACKED:
        q_first = tl.load(cu_q_ptr + b)
        k_first = tl.load(cu_k_ptr + b)
        Tq = tl.load(cu_q_ptr + b + 1) - q_first
        Tk = tl.load(cu_k_ptr + b + 1) - k_first
        if tile * BLOCK_N >= Tk:
            return
        key_row = k_first.to(tl.int64)
        q_ptr += q_first.to(tl.int64) * stride_qt
        do_ptr += q_first.to(tl.int64) * stride_dot
        k_ptr += key_row * stride_kt
        v_ptr += key_row * stride_vt
        statistics = q_first.to(tl.int64)
    else:
        key_row = b * Tk
        q_ptr += b * stride_qb
        do_ptr += b * stride_dob
        k_ptr += b * stride_kb
        v_ptr += b * stride_vb
        statistics = b * H * head_rows

    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    d_inside = (d < D)[None, :]
    keys = j.to(tl.int64)
    inside = (j < Tk)[:, None] & d_inside
    k = tl.load(k_ptr + kv_head * stride_kh + keys[:, None] * stride_kt + d[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + kv_head * stride_vh + keys[:, None] * stride_vt + d[None, :], mask=inside, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    scale_log2 = scale * 1.4426950408889634
    if DROPOUT:
        seed = tl.load(seed_ptr)
    else:
        seed = 0

    # Queries [begin, end) see a key of this tile, and [full_begin, full_end) see every one: no mask there.
    low = tile * BLOCK_N - (Tk - Tq)  # the query whose own key is the tile's first
    high = low + BLOCK_N - 1
    begin = 0
    end = Tq
    full_begin = 0
    full_end = Tq
    if CAUSAL:
        begin = tl.maximum(low, 0) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(high, 0), BLOCK_M) * BLOCK_M
    if WINDOW:
        end = tl.minimum(end, tl.maximum(high + window, 0))
        full_end = tl.maximum(tl.minimum(Tq, low + window) // BLOCK_M * BLOCK_M, begin)
        full_begin = tl.minimum(full_begin, full_end)
    for g in tl.range(0, queries_per_kv):
        h = kv_head * queries_per_kv + g
        q_tile = q_ptr + h * stride_qh + m[:, None] * stride_qt + d[None, :]
        do_tile = do_ptr + h * stride_doh + m[:, None] * stride_dot + d[None, :]
        lse_row = lse_ptr + statistics + h * head_rows
        delta_row = delta_ptr + statistics + h * head_rows
        head = (b * H + h).to(tl.int32)
        if CAUSAL:
            dk, dv = _dkdv_blocks(
                k, v, dk, dv, q_tile, do_tile, lse_row, delta_row, stride_qt, stride_dot, begin,
                tl.minimum(full_begin, Tq), j, Tq, Tk, window, scale_log2, seed, head, threshold, keep_scale, d_inside,
                True, CAUSAL, WINDOW, DROPOUT, D == BLOCK_D, PRECISION, ACC, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
        dk, dv = _dkdv_blocks(
            k, v, dk, dv, q_tile, do_tile, lse_row, delta_row, stride_qt, stride_dot, full_begin,
            full_end, j, Tq, Tk, window, scale_log2, seed, head, threshold, keep_scale, d_inside,
            False, CAUSAL, WINDOW, DROPOUT, D == BLOCK_D, PRECISION, ACC, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
        if WINDOW:
            dk, dv = _dkdv_blocks(
                k, v, dk, dv, q_tile, do_tile, lse_row, delta_row, stride_qt, stride_dot, full_end,
                end, j, Tq, Tk, window, scale_log2, seed, head, threshold, keep_scale, d_inside,
                True, CAUSAL, WINDOW, DROPOUT, D == BLOCK_D, PRECISION, ACC, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
    at = (key_row + keys[:, None]) * stride_dkv + kv_head * D + d[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def _launch(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Writes dq, dk and dv, with any row stride, except rows past the last sequence: no program owns them."""
    H, Hkv = q.shape[2], k.shape[2]
    packed = cu_seqlens_q is not None
    B = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    grad, q, k, v, out = (_check.unit_last_stride(t) for t in (grad, q, k, v, out))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    options = variant(q, packed, causal, window, seed)
    threshold, keep_scale = int(dropout_p * 2**24), 1.0 / (1.0 - dropout_p)
    if dq.numel() and B and max_seqlen_q:
        block_m, block_n, warps, stages = tile(DQ_TILES, q, seed)
        launch(
            attention_dq_kernel,
            (_check.cdiv(max_seqlen_q, block_m) * B * H,),
            q,
            k,
            v,
            out,
            grad,
            lse,
            grad_lse,
            delta,
            dq,
            cu_seqlens_q,
            cu_seqlens_k,
            seed,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            *grad.stride()[:3],
            dq.stride(1),
            B,
            q.shape[1],
            k.shape[1],
            H,
            H // Hkv,
            window,
            scale,
            threshold,
            keep_scale,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            STAGES=stages,
            num_warps=warps,
            num_stages=stages,
            **options,
        )
    if dk.numel() and B and max_seqlen_k:
        block_m, block_n, warps, stages = tile(DKDV_TILES, q, seed)
        launch(
            attention_dkdv_kernel,
            (_check.cdiv(max_seqlen_k, block_n) * B * Hkv,),
            q,
            k,
            v,
            grad,
            lse,
            delta,
            dk,
            dv,
            cu_seqlens_q,
            cu_seqlens_k,
            seed,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *grad.stride()[:3],
            dk.stride(1),
            B,
            q.shape[1],
            k.shape[1],
            Hkv,
            H // Hkv,
            window,
            scale,
            threshold,
            keep_scale,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            STAGES=stages,
            num_warps=warps,
            num_stages=stages,
            **options,
        )


def _backward_triton(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.empty if options[0] is None else torch.zeros  # rows past the last sequence have gradient 0
    dq, dk, dv = (empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, k))
    _launch(dq, dk, dv, grad, grad_lse, q, k, v, out, lse, *options)
    return dq, dk, dv


def _qkvpacked_triton(
    grad: Tensor, grad_lse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> Tensor:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    (dq, dk, dv), (q, k, v), T = dqkv.unbind(2), qkv.unbind(2), qkv.shape[1]
    _launch(dq, dk, dv, grad, grad_lse, q, k, v, out, lse, None, None, T, T, *options)
    return dqkv


def _backward_cpu(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for s, (rows, keys) in enumerate(zip(reference.spans(cu_seqlens_q), reference.spans(cu_seqlens_k))):
            dlse = None if grad_lse is None else grad_lse[:, :, rows]
            dq[:, rows], dk[:, keys], dv[:, keys] = reference.attention_backward(
                grad[:, rows], dlse, q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows],
                causal=causal, scale=scale, window=window, dropout_p=dropout_p, seed=seed, first=s,
            )  # fmt: skip
        return dq, dk, dv
    dq, dk, dv = _dense_cpu(grad, grad_lse, q, k, v, out, lse, causal, scale, window, dropout_p, seed)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _dense_cpu(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    if grad_lse is None and _check.cpu_flash_serves(q, k, causal, window, seed):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_check.dense_heads_first(grad, q, k, v, out), lse, 0.0, causal, scale=scale
        )
        return tuple(g.transpose(1, 2) for g in grads)
    return reference.attention_backward(
        grad, grad_lse, q, k, v, out, lse, causal=causal, scale=scale, window=window, dropout_p=dropout_p, seed=seed
    )


def _qkvpacked_cpu(
    grad: Tensor, grad_lse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> Tensor:
    q, k, v = qkv.unbind(2)
    return torch.stack(_dense_cpu(grad, grad_lse, q, k, v, out, lse, *options), 2)


def _fake(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


register(
    "attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale,"
    " int window, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    triton_impl=_backward_triton,
    cpu_impl=_backward_cpu,
    fake=_fake,
)
register(
    "attention_qkvpacked_backward(Tensor grad, Tensor? grad_lse, Tensor qkv, Tensor out, Tensor lse, bool causal,"
    " float scale, int window, float dropout_p, Tensor? seed) -> Tensor",
    triton_impl=_qkvpacked_triton,
    cpu_impl=_qkvpacked_cpu,
    fake=lambda grad, grad_lse, qkv, *others: qkv.new_empty(qkv.shape),
)
