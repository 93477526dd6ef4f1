"""Fused causal softmax attention (FlashAttention, Dao et al., 2022; Dao, 2023).

    s = scale * q k^T + mask,   lse = logsumexp(s),   out = exp(s - lse) v

Layout: q (B, Tq, H, D), k and v (B, Tk, Hkv, D), any strides with a dense last axis, so that the three parts of GPT-2's
qkv projection are passed as views. The T x T matrix is never stored: keys come in blocks, and a running maximum and
sum are kept for each query (online softmax, Milakov & Gimelshein, 2018).
FLOPs, causal, Tq = Tk = T: 2 B H T^2 D. Bytes of element size s: 4 B T H D s. At D = 64 there are 256 FLOP for each
exponential, so on Hopper the exponentials cost as much time as the matrix units.
Specification: gpt2_kernels.reference.attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2_kernels import _check, reference
from gpt2_kernels._runtime import register, tl, triton

LOG2_E = 1.4426950408889634

# (element size, head dimension up to) -> (BLOCK_M, BLOCK_N, warps, stages). Compiled for sm_80, sm_90 and sm_100
# without spills (tests/test_offline.py); not yet timed on a GPU.
TILES = {
    (2, 64): (128, 64, 8, 3),
    (2, 128): (128, 32, 8, 2),
    (2, 256): (64, 32, 8, 2),
    (4, 64): (64, 32, 8, 2),
    (4, 128): (32, 32, 8, 2),
    (4, 256): (16, 32, 8, 2),
}


@triton.jit
def _attend_blocks(
    q,  # (BLOCK_M, BLOCK_D)
    m,  # (BLOCK_M,) running maximum, base 2
    l,  # (BLOCK_M,) running sum
    acc,  # (BLOCK_M, BLOCK_D)
    k_tile,  # (BLOCK_N, BLOCK_D) pointers to the keys 0..BLOCK_N - 1
    v_tile,
    stride_k,
    stride_v,
    first,
    last,
    i,  # (BLOCK_M,) positions of the queries among the keys
    Tk,
    window,
    scale_log2,
    d_inside,  # (1, BLOCK_D)
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One online-softmax pass over keys first..last - 1, a multiple of BLOCK_N apart from the end of the sequence."""
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
        s = tl.dot(q, k.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MASKED:
            keep = (j < Tk)[None, :]
            if CAUSAL:
                keep = keep & (j[None, :] <= i[:, None])
            if WINDOW:
                keep = keep & (j[None, :] > i[:, None] - window)
            s = tl.where(keep, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        if MASKED:
            # A row that has seen no key yet: subtract 0, so that exp2(-inf) = 0 and not exp2(-inf + inf) = NaN.
            shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        else:
            shift = m_new
        p = tl.exp2(s * scale_log2 - shift[:, None])
        rescale = tl.exp2(m - shift)
        l = l * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        m = m_new
    return m, l, acc


@triton.jit
def attention_kernel(
    q_ptr,  # (B, Tq, H, D)
    k_ptr,  # (B, Tk, Hkv, D)
    v_ptr,  # (B, Tk, Hkv, D)
    out_ptr,  # (B, Tq, H, D), contiguous
    lse_ptr,  # (B, H, Tq), contiguous, natural log
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    B,
    Tq,
    Tk,
    H,
    queries_per_kv,
    window,
    scale_log2,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program owns BLOCK_M queries of one head and adds keys from the first visible up; long rows start first."""
    pid = tl.program_id(0)
    tile = tl.cdiv(Tq, BLOCK_M) - 1 - pid // (B * H)
    b = (pid % (B * H) // H).to(tl.int64)
    h = (pid % H).to(tl.int64)
    kv_head = h // queries_per_kv

    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # query rows
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    d_inside = (d < D)[None, :]
    rows = t.to(tl.int64)
    q_inside = (t < Tq)[:, None] & d_inside
    q = tl.load(
        q_ptr + b * stride_qb + h * stride_qh + rows[:, None] * stride_qt + d[None, :], mask=q_inside, other=0.0
    )
    k_tile = k_ptr + b * stride_kb + kv_head * stride_kh + n[:, None] * stride_kt + d[None, :]
    v_tile = v_ptr + b * stride_vb + kv_head * stride_vh + n[:, None] * stride_vt + d[None, :]
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Keys [begin, end) concern this tile, and of them [full_begin, full_end) every row sees every one: no mask there.
    i = t + (Tk - Tq)
    low = tile * BLOCK_M + Tk - Tq  # position of the first query
    high = low + BLOCK_M - 1  # and of the last
    begin = 0
    end = Tk
    full_begin = 0
    full_end = Tk // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(high + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(low + 1, 0) // BLOCK_N * BLOCK_N)
    if WINDOW:
        begin = tl.maximum(low - window + 1, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(high - window + 1, 0), BLOCK_N) * BLOCK_N
        full_end = tl.maximum(full_end, begin)
        full_begin = tl.minimum(full_begin, full_end)
        m, l, acc = _attend_blocks(
            q, m, l, acc, k_tile, v_tile, stride_kt, stride_vt, begin, full_begin, i, Tk, window, scale_log2, d_inside,
            True, CAUSAL, WINDOW, D == BLOCK_D, PRECISION, BLOCK_N, STAGES,
        )  # fmt: skip
    m, l, acc = _attend_blocks(
        q, m, l, acc, k_tile, v_tile, stride_kt, stride_vt, full_begin, full_end, i, Tk, window, scale_log2, d_inside,
        False, CAUSAL, WINDOW, D == BLOCK_D, PRECISION, BLOCK_N, STAGES,
    )  # fmt: skip
    m, l, acc = _attend_blocks(
        q, m, l, acc, k_tile, v_tile, stride_kt, stride_vt, full_end, end, i, Tk, window, scale_log2, d_inside,
        True, CAUSAL, WINDOW, D == BLOCK_D, PRECISION, BLOCK_N, STAGES,
    )  # fmt: skip

    some = l > 0.0  # false for a row with no key: out 0, lse -inf
    inverse = 1.0 / tl.where(some, l, 1.0)
    lse = tl.where(some, (m + tl.log2(tl.where(some, l, 1.0))) * 0.6931471805599453, -float("inf"))
    out = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + ((b * Tq + rows[:, None]) * H + h) * D + d[None, :], out, mask=q_inside)
    tl.store(lse_ptr + (b * H + h) * Tq + rows, lse, mask=t < Tq)


def _attention_triton(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    B, Tq, H, D = q.shape
    Tk, Hkv = k.shape[1:3]
    q, k, v = (_check.unit_last_stride(t) for t in (q, k, v))
    out = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    if out.numel():
        block_m, block_n, warps, stages = _check.tile_for(TILES, q)
        attention_kernel[(triton.cdiv(Tq, block_m) * B * H,)](
            q,
            k,
            v,
            out,
            lse,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            B,
            Tq,
            Tk,
            H,
            H // Hkv,
            window,
            scale * LOG2_E,
            D=D,
            CAUSAL=causal,
            WINDOW=window > 0,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=max(16, triton.next_power_of_2(D)),
            STAGES=stages,
            num_warps=warps,
            num_stages=stages,
        )
    return out, lse


def _plain(q: Tensor, k: Tensor, causal: bool, window: int) -> bool:
    """Whether PyTorch's own CPU flash attention computes this, to our accuracy: it knows neither windows nor grouped
    heads, aligns the causal mask top-left, and keeps float16 scores in float16."""
    same_length = q.shape[1] == k.shape[1] or not causal
    not_empty = q.numel() > 0 and k.numel() > 0
    if q.device.type != "cpu":
        return False
    return not window and q.shape[2] == k.shape[2] and same_length and not_empty and q.dtype != torch.float16


def _dense_heads_first(*tensors: Tensor) -> list[Tensor]:
    """(B, H, T, D) views with a dense last axis, which PyTorch's CPU flash attention takes for granted unchecked."""
    return [_check.unit_last_stride(t).transpose(1, 2) for t in tensors]


def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int) -> tuple[Tensor, Tensor]:
    if not _plain(q, k, causal, window):
        return reference.attention(q, k, v, causal=causal, scale=scale, window=window)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_dense_heads_first(q, k, v), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int) -> tuple[Tensor, Tensor]:
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Tq), dtype=torch.float32)


register(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float scale, int window) -> (Tensor, Tensor)",
    triton_impl=_attention_triton,
    cpu_impl=_attention_cpu,
    fake=_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.gpt2_kernels.attention(q, k, v, causal, scale, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = causal, scale, window
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        causal, scale, window = ctx.options
        if _plain(q, k, causal, window):
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *_dense_heads_first(grad, q, k, v, out), lse, 0.0, causal, scale=scale
            )
            dq, dk, dv = (g.transpose(1, 2) for g in grads)
        else:
            dq, dk, dv = reference.attention_backward(
                grad, q, k, v, out, lse, causal=causal, scale=scale, window=window
            )
        return dq, dk, dv, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v, in one kernel: q (B, Tq, H, D), k and v (B, Tk, Hkv, D) -> (B, Tq, H, D).

    H is a multiple of Hkv (grouped-query attention); D lies in 1..256; scale is 1/sqrt(D) unless given. The last query
    is aligned with the last key: with causal, query i sees key j where j <= i + Tk - Tq; window w keeps the nearest w
    of them, itself included. Tq = 3, Tk = 5, causal:

        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 1

    With return_lse also the logsumexp of each row of scores, float32 (B, H, Tq), natural log. A row with no key gives 0
    and -inf. Differentiable in q, k and v; the logsumexp carries no gradient.
    Raises ValueError on a shape, dtype, device or option that does not fit. Source: Dao, 2023, arXiv:2307.08691.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check.rank("attention", name, tensor, "(B, T, H, D)")
    _check.same_kind("attention", "q", q, k=k, v=v)
    _check.shape("attention", "k", k, (q.shape[0], *k.shape[1:3], q.shape[3]), "(B, Tk, Hkv, D)")
    _check.shape("attention", "v", v, tuple(k.shape), "(B, Tk, Hkv, D)")
    _check.heads("attention", q.shape[2], k.shape[2], q.shape[3])
    scale, window = _check.attention_options("attention", q.shape[3], scale, window)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _Attention.apply(q, k, v, causal, scale, window)
    else:
        out, lse = torch.ops.gpt2_kernels.attention(q, k, v, causal, scale, window)
    return (out, lse) if return_lse else out
