"""Fused causal softmax attention, forward (FlashAttention, Dao et al., 2022; Dao, 2023).

    s = scale * q k^T + mask,   lse = logsumexp(s),   out = dropout(exp(s - lse)) v

Layout: q (B, Tq, H, D), k and v (B, Tk, Hkv, D), any strides with a dense last axis, so the three parts of GPT-2's qkv
projection can be passed as views. Packed variable-length sequences are B = 1 with cu_seqlens.
The T x T score matrix is never materialised: the kernel loops over blocks of keys and keeps a running maximum and sum
per query (online softmax, Milakov & Gimelshein, 2018).
FLOPs, causal, Tq = Tk = T: 2 B H T^2 D; twice that without the mask. Bytes, for element size s: 4 B T H D s. At D = 64
there are 256 FLOP per exponential, so on Hopper the exponentials take as long as the tensor-core work.
Specification: gpt2_kernels.reference.attention. The backward pass is attention_backward.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2_kernels import _check, reference
from gpt2_kernels._attention import dropout_keep, key_range, tile, variant
from gpt2_kernels._launch import launch
from gpt2_kernels._operator import autocast, distinct, register
from gpt2_kernels._runtime import statistics_dtype, tl, triton

LOG2_E = 1.4426950408889634

# (minimum compute capability, element size, maximum head dimension) -> (BLOCK_M, BLOCK_N, warps, stages). Nothing
# spills in any case of benchmarks.compile_report; not yet timed on a GPU.
TILES = {
    (0, 2, 64): (128, 64, 8, 3),
    (0, 2, 128): (128, 32, 8, 2),
    (0, 2, 256): (64, 32, 8, 2),
    (0, 4, 64): (64, 32, 8, 2),
    (0, 4, 128): (32, 16, 8, 2),
    (0, 4, 256): (16, 16, 8, 2),
    (0, 8, 256): (16, 16, 4, 2),  # the interpreter's gradcheck
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
    past,  # position of query 0
    Tk,
    window,
    scale_log2,
    seed,
    head,
    threshold,
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
    """One online-softmax pass over keys first..last - 1; `first` is a multiple of BLOCK_N."""
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
        if DROPOUT:  # applies to the probabilities, not to their sum
            p = tl.where(dropout_keep(seed, head, i - past, start, threshold, BLOCK_N), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION, out_dtype=ACC)
        m = m_new
    return m, l, acc


@triton.jit(do_not_specialize=["B", "Tq", "Tk", "threshold"])
def attention_kernel(
    q_ptr,  # (B, Tq, H, D), or packed (1, Nq, H, D)
    k_ptr,  # (B, Tk, Hkv, D), or packed (1, Nk, Hkv, D)
    v_ptr,  # as k
    out_ptr,  # as q, contiguous
    lse_ptr,  # (B, H, Tq) or (1, H, Nq), contiguous, natural log
    cu_q_ptr,  # (B + 1,) int32 where PACKED: first row of each sequence, and the end of the last
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
    B,  # sequences
    Tq,  # rows of q in memory, for each b
    Tk,
    H,
    queries_per_kv,
    window,
    scale_log2,
    threshold,
    keep_scale,  # 1 / (1 - dropout_p)
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
    lse_ptr += h * Tq
    if PACKED:
        q_first = tl.load(cu_q_ptr + b)
        k_first = tl.load(cu_k_ptr + b)
        Tq = tl.load(cu_q_ptr + b + 1) - q_first
        Tk = tl.load(cu_k_ptr + b + 1) - k_first
        if tile * BLOCK_M >= Tq:
            return
        row = q_first.to(tl.int64)  # row of the first query in q, out and lse
        q_ptr += row * stride_qt
        k_ptr += k_first.to(tl.int64) * stride_kt
        v_ptr += k_first.to(tl.int64) * stride_vt
        lse_ptr += row
    else:
        row = b * Tq
        q_ptr += b * stride_qb
        k_ptr += b * stride_kb
        v_ptr += b * stride_vb
        lse_ptr += b * H * Tq

    out_ptr += (row * H + h) * D
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    d_inside = (d < D)[None, :]
    rows = t.to(tl.int64)
    q_inside = (t < Tq)[:, None] & d_inside
    q = tl.load(q_ptr + h * stride_qh + rows[:, None] * stride_qt + d[None, :], mask=q_inside, other=0.0)
    k_tile = k_ptr + kv_head * stride_kh + n[:, None] * stride_kt + d[None, :]
    v_tile = v_ptr + kv_head * stride_vh + n[:, None] * stride_vt + d[None, :]
    m = tl.full([BLOCK_M], -float("inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    else:
        seed = 0

    past = Tk - Tq
    i = t + past
    low = tile * BLOCK_M + past  # position of the first query
    begin, full_begin, full_end, end = key_range(low, low + BLOCK_M - 1, Tk, window, CAUSAL, WINDOW, BLOCK_N)
    if WINDOW:
        m, l, acc = _attend_blocks(
            q, m, l, acc, k_tile, v_tile, stride_kt, stride_vt, begin, full_begin, i, past, Tk, window, scale_log2,
            seed, head, threshold, d_inside,
            True, CAUSAL, WINDOW, DROPOUT, D == BLOCK_D, PRECISION, ACC, BLOCK_N, STAGES,
        )  # fmt: skip
    m, l, acc = _attend_blocks(
        q, m, l, acc, k_tile, v_tile, stride_kt, stride_vt, full_begin, full_end, i, past, Tk, window, scale_log2,
        seed, head, threshold, d_inside, False, CAUSAL, WINDOW, DROPOUT, D == BLOCK_D, PRECISION, ACC, BLOCK_N, STAGES,
    )  # fmt: skip
    m, l, acc = _attend_blocks(
        q, m, l, acc, k_tile, v_tile, stride_kt, stride_vt, full_end, end, i, past, Tk, window, scale_log2,
        seed, head, threshold, d_inside, True, CAUSAL, WINDOW, DROPOUT, D == BLOCK_D, PRECISION, ACC, BLOCK_N, STAGES,
    )  # fmt: skip

    some = l > 0.0  # false for a row with no key: out 0, lse -inf
    inverse = 1.0 / tl.where(some, l, 1.0)
    if DROPOUT:
        inverse *= keep_scale
    lse = tl.where(some, (m + tl.log2(tl.where(some, l, 1.0))) * 0.6931471805599453, -float("inf"))
    out = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * (H * D) + d[None, :], out, mask=q_inside)
    tl.store(lse_ptr + rows, lse, mask=t < Tq)


def _attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    H = q.shape[2]
    packed = cu_seqlens_q is not None
    B = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    q, k, v = (_check.unit_last_stride(t) for t in (q, k, v))
    # No program owns the rows past the last sequence: they keep out 0 and lse -inf.
    out = (torch.zeros if packed else torch.empty)(q.shape, dtype=q.dtype, device=q.device)
    lse = _lse_like(q).fill_(-torch.inf) if packed else _lse_like(q)
    if out.numel() and B and max_seqlen_q:
        block_m, block_n, warps, stages = tile(TILES, q, seed)
        launch(
            attention_kernel,
            (_check.cdiv(max_seqlen_q, block_m) * B * H,),
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            seed,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            B,
            q.shape[1],
            k.shape[1],
            H,
            H // k.shape[2],
            window,
            scale * LOG2_E,
            int(dropout_p * 2**24),
            1.0 / (1.0 - dropout_p),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            STAGES=stages,
            num_warps=warps,
            num_stages=stages,
            **variant(q, packed, causal, window, seed),
        )
    return out, lse


def _lse_like(q: Tensor) -> Tensor:
    """(B, H, Tq) float32 for q (B, Tq, H, D); float64 for float64."""
    B, Tq, H, _ = q.shape
    return q.new_empty((B, H, Tq), dtype=statistics_dtype(q.dtype))


def _attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        _check_packing(cu_seqlens_q, q.shape[1], max_seqlen_q, "cu_seqlens_q")
        _check_packing(cu_seqlens_k, k.shape[1], max_seqlen_k, "cu_seqlens_k")
        out, lse = reference.attention_varlen(
            q[0], k[0], v[0], cu_seqlens_q, cu_seqlens_k,
            causal=causal, scale=scale, window=window, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
        return out[None], lse[None]
    if not _check.cpu_flash_serves(q, k, causal, window, seed):
        return reference.attention(q, k, v, causal=causal, scale=scale, window=window, dropout_p=dropout_p, seed=seed)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_check.dense_heads_first(q, k, v), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _check_packing(cu_seqlens: Tensor, rows: int, max_seqlen: int, name: str) -> None:
    """Checks the contents of an index tensor; only on the CPU path, where reading them costs no synchronisation."""
    cu = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(cu, cu[1:])]
    if cu[0] != 0 or cu[-1] > rows or any(n < 0 for n in lengths):
        _check.fail("attention_varlen", f"{name} must rise from 0 to at most {rows}", cu)
    if max(lengths, default=0) > max_seqlen:
        _check.fail("attention_varlen", f"sequences of {name} must not be longer than {max_seqlen}", max(lengths))


def _fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _lse_like(q)


register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, bool causal, float scale, int window, float dropout_p, Tensor? seed) -> (Tensor, Tensor)",
    triton_impl=_attention_triton,
    cpu_impl=_attention_cpu,
    fake=_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.gpt2_kernels.attention(q, k, v, *options)
        cu_seqlens_q, cu_seqlens_k, *ctx.options, seed = options
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seed)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seed = ctx.saved_tensors
        none = (None,) * 9
        if grad is None:
            if grad_lse is None:
                return None, None, None, *none
            grad = torch.zeros_like(out)
        grads = torch.ops.gpt2_kernels.attention_backward(
            grad, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.options, seed
        )
        return *grads, *none


class _AttentionQKVPacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, causal: bool, scale: float, window: int, dropout_p: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        T = qkv.shape[1]
        options = causal, scale, window, dropout_p
        out, lse = torch.ops.gpt2_kernels.attention(*qkv.unbind(2), None, None, T, T, *options, seed)
        ctx.options = options
        ctx.save_for_backward(qkv, out, lse, seed)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        qkv, out, lse, seed = ctx.saved_tensors
        dqkv = None
        if grad is not None or grad_lse is not None:
            grad = torch.zeros_like(out) if grad is None else grad
            dqkv = torch.ops.gpt2_kernels.attention_qkvpacked_backward(
                grad, grad_lse, qkv, out, lse, *ctx.options, seed
            )
        return dqkv, None, None, None, None, None


def _apply(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(*distinct(q, k, v, *options))
    return torch.ops.gpt2_kernels.attention(q, k, v, *options)


def _seed(op: str, dropout_p: float, q: Tensor) -> Tensor | None:
    """The dropout seed, drawn from torch's generator on the device of q; None without dropout."""
    if not 0.0 <= dropout_p < 1.0:
        _check.fail(op, "dropout_p must lie in [0, 1)", dropout_p)
    return torch.randint(2**63 - 1, (1,), device=q.device) if dropout_p else None


@autocast("lower")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """dropout(softmax(scale * q k^T + mask)) v: q (B, Tq, H, D), k and v (B, Tk, Hkv, D) -> (B, Tq, H, D).

    H is a multiple of Hkv (grouped-query attention); D lies in 1..256; scale is 1/sqrt(D) unless given. The last query
    is aligned with the last key: with causal, query i sees key j if j <= i + Tk - Tq; window w keeps the nearest w of
    them, its own included. Tq = 3, Tk = 5, causal:

        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 1

    dropout_p in [0, 1) drops that fraction of the probabilities, with a seed drawn from torch's generator on the device
    of q. return_lse adds the logsumexp of each row of scores, float32 (B, H, Tq), natural log. A row with no visible
    key gives 0 and -inf. Differentiable in q, k and v, through the logsumexp too; gradients are bitwise reproducible.
    Raises ValueError on a shape, dtype, device or option that does not fit. Source: Dao, 2023, arXiv:2307.08691.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check.rank("attention", name, tensor, "(B, T, H, D)")
    _check.same_kind("attention", "q", q, k=k, v=v)
    _check.shape("attention", "k", k, (q.shape[0], *k.shape[1:3], q.shape[3]), "(B, Tk, Hkv, D)")
    _check.shape("attention", "v", v, tuple(k.shape), "(B, Tk, Hkv, D)")
    _check.heads("attention", q.shape[2], k.shape[2], q.shape[3])
    scale, window = _check.attention_options("attention", q.shape[3], scale, window)
    seed = _seed("attention", dropout_p, q)
    out, lse = _apply(q, k, v, None, None, q.shape[1], k.shape[1], causal, scale, window, dropout_p, seed)
    return (out, lse) if return_lse else out


@autocast("lower")
def attention_qkvpacked(
    qkv: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` on the three parts of one projection: qkv (B, T, 3, H, D) -> (B, T, H, D).

    Bitwise equal to attention(*qkv.unbind(2)), with one gradient that the kernels write where the projection reads it:
    autograd would assemble it from the parts' gradients in a pass over 6 B T H D elements. Options as in `attention`.
    Raises ValueError on a shape, dtype or option that does not fit.
    """
    op = "attention_qkvpacked"
    _check.rank(op, "qkv", qkv, "(B, T, 3, H, D)")
    _check.shape(op, "qkv", qkv, (*qkv.shape[:2], 3, *qkv.shape[3:]), "(B, T, 3, H, D)")
    _check.same_kind(op, "qkv", qkv)
    _check.heads(op, qkv.shape[3], qkv.shape[3], qkv.shape[4])
    scale, window = _check.attention_options(op, qkv.shape[4], scale, window)
    options = causal, scale, window, dropout_p, _seed(op, dropout_p, qkv)
    if torch.is_grad_enabled() and qkv.requires_grad:
        out, lse = _AttentionQKVPacked.apply(qkv, *options)
    else:
        T = qkv.shape[1]
        out, lse = torch.ops.gpt2_kernels.attention(*qkv.unbind(2), None, None, T, T, *options)
    return (out, lse) if return_lse else out


@autocast("lower")
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over S sequences of any lengths, packed without padding: q (Nq, H, D), k and v (Nk, Hkv, D).

    Sequence s owns rows cu_seqlens_q[s] to cu_seqlens_q[s + 1] of q and of the result, and likewise for cu_seqlens_k, k
    and v; both are (S + 1,) int32, rising from 0; max_seqlen_q and max_seqlen_k are at least the longest sequence of
    each. Within a sequence the last query is aligned with the last key. Rows past the last sequence give 0, and -inf in
    the logsumexp (H, Nq) that return_lse adds. Differentiable in q, k and v. Raises ValueError on a shape, dtype,
    device or option that does not fit; out-of-range offsets raise on the CPU, where they are read.
    """
    op = "attention_varlen"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check.rank(op, name, tensor, "(N, H, D)")
    _check.same_kind(op, "q", q, k=k, v=v)
    _check.shape(op, "k", k, (*k.shape[:2], q.shape[2]), "(Nk, Hkv, D)")
    _check.shape(op, "v", v, tuple(k.shape), "(Nk, Hkv, D)")
    _check.heads(op, q.shape[1], k.shape[1], q.shape[2])
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check.rank(op, name, tensor, "(S + 1,)")
        _check.index(op, name, tensor, torch.int32, q)
    if cu_seqlens_q.shape[0] < 1:
        _check.fail(op, "cu_seqlens_q must have at least one element", tuple(cu_seqlens_q.shape))
    _check.shape(op, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "(S + 1,)")
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if length < 0:
            _check.fail(op, f"{name} must be at least 0", length)
    scale, window = _check.attention_options(op, q.shape[2], scale, window)
    cu = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    seed = _seed(op, dropout_p, q)
    out, lse = _apply(
        q[None], k[None], v[None], *cu, max_seqlen_q, max_seqlen_k, causal, scale, window, dropout_p, seed
    )
    return (out[0], lse[0]) if return_lse else out[0]
