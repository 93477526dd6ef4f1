"""What each query looks at: the probabilities of attention, rebuilt from the logsumexp that its forward pass returns.

    p = exp(scale * q k^T - lse), 0 where the mask hides a key

Layout: q (B, Tq, H, D), k (B, Tk, Hkv, D), any strides with a dense last axis; lse (B, H, Tq) float32, natural log;
p (B, heads, rows, Tk) float32. The logsumexp is already the whole row's, so every element stands alone: no maximum, no
sum, no second softmax, and a few heads and rows cost no more than their share.
FLOPs: 2 B heads rows Tk D, and none for a tile in which every key is hidden. Bytes: 4 B heads rows Tk written; q and k
are read again for each tile, out of L2. At D = 64 that is 32 FLOP a byte: bound by the stores in half precision, by the
FMA units in float32, which is multiplied in full precision.
Specification: gpt2_kernels.reference.attention_map.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from gpt2_kernels import _check, reference
from gpt2_kernels._launch import launch
from gpt2_kernels._operator import autocast, register
from gpt2_kernels._runtime import tl, triton

# With top_m, at most this many probabilities exist at once (more only where a single row is longer): 16 MiB, and 32 MiB
# for the same beside their keys.
BUFFER = 1 << 22

# (minimum compute capability, element size, maximum head dimension) -> (BLOCK_M, BLOCK_N, warps). Compiled for sm_80,
# sm_90 and sm_100 without spills (tests/test_offline.py); not yet timed on a GPU.
TILES = {
    (0, 2, 256): (64, 64, 4),
    (0, 4, 128): (32, 32, 8),
    (0, 4, 256): (16, 64, 8),
}

Fill = Callable[..., Tensor]  # (q, k, lse, heads, rows, causal, scale, window) -> (B, heads, rows, Tk)


@triton.jit(do_not_specialize=["heads", "R", "Tq", "Tk", "window"])
def attention_map_kernel(
    q_ptr,  # (B, Tq, H, D)
    k_ptr,  # (B, Tk, Hkv, D)
    lse_ptr,  # (B, H, Tq), contiguous, natural log
    heads_ptr,  # (heads,) int64
    rows_ptr,  # (R,) int64
    p_ptr,  # (B, heads, R, Tk), contiguous
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    heads,
    R,
    H,
    Tq,
    Tk,
    queries_per_kv,
    window,
    scale,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_M rows by BLOCK_N keys of one head; each element is one sum over D."""
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(Tk, BLOCK_N)
    tiles_m = tl.cdiv(R, BLOCK_M)
    first = pid % tiles_n * BLOCK_N
    r = pid // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    which = pid // (tiles_n * tiles_m)
    b = (which // heads).to(tl.int64)
    h = tl.load(heads_ptr + which % heads)  # int64
    t = tl.load(rows_ptr + r, mask=r < R, other=0)  # (BLOCK_M,) int64
    t = tl.where((h >= 0) & (h < H), t, -1)  # no row of a head that does not exist exists
    h = tl.where((h >= 0) & (h < H), h, 0)  # nor are its keys read
    there = (t >= 0) & (t < Tq)
    tl.device_assert(there, "attention_map: heads or rows outside the tensor", mask=r < R)
    there = there & (r < R)

    j = first + tl.arange(0, BLOCK_N)
    i = t + (Tk - Tq)  # positions of the queries among the keys
    # The rows are any: their extremes tell whether a key of this tile is visible to one of them.
    some = True
    if CAUSAL:
        some = tl.max(tl.where(there, i, -1), 0) >= first
    if WINDOW:
        some = some & (tl.min(tl.where(there, i, Tk), 0) - window < first + BLOCK_N - 1)
    p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if some:
        d = tl.arange(0, BLOCK_D)
        d_inside = (d < D)[None, :]
        q_rows = q_ptr + b * stride_qb + h * stride_qh + t[:, None] * stride_qt
        k_rows = k_ptr + b * stride_kb + h // queries_per_kv * stride_kh + j.to(tl.int64)[:, None] * stride_kt
        q = tl.load(q_rows + d[None, :], mask=there[:, None] & d_inside, other=0.0)  # (BLOCK_M, BLOCK_D)
        k = tl.load(k_rows + d[None, :], mask=(j < Tk)[:, None] & d_inside, other=0.0)  # (BLOCK_N, BLOCK_D)
        lse = tl.load(lse_ptr + (b * H + h) * Tq + t, mask=there, other=0.0)
        keep = (lse > -float("inf"))[:, None]  # a row without keys: exp(s + inf) is no share of anything
        if CAUSAL:
            keep = keep & (j[None, :] <= i[:, None])
        if WINDOW:
            keep = keep & (j[None, :] > i[:, None] - window)
        s = tl.dot(q, k.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        # The difference first, which is near 0 where a share is large: scaled to base 2 apart, each would be rounded.
        p = tl.where(keep, tl.exp2((s * scale - lse[:, None]) * 1.4426950408889634), 0.0)
    p = tl.where(there[:, None], p, float("nan"))  # a row that does not exist has no shares
    row = (b * heads + which % heads) * R + r  # of p, int64
    vectors = Tk // 4 * 4
    if (vectors == Tk) & (first + BLOCK_N <= Tk):
        # 16 bytes at a time: the compiler sees that rows start at multiples of four, and that keys need no mask.
        tl.store(p_ptr + row[:, None] * vectors + j[None, :], p, mask=(r < R)[:, None])
    else:
        tl.store(p_ptr + row[:, None] * Tk + j[None, :], p, mask=(r < R)[:, None] & (j < Tk)[None, :])


def _launch(
    q: Tensor, k: Tensor, lse: Tensor, heads: Tensor, rows: Tensor, causal: bool, scale: float, window: int
) -> Tensor:
    B, Tq, H, D = q.shape
    Tk, Hkv = k.shape[1:3]
    q, k, lse = _check.unit_last_stride(q), _check.unit_last_stride(k), lse.contiguous()
    R = rows.shape[0]
    p = torch.empty((B, heads.shape[0], R, Tk), dtype=torch.float32, device=q.device)
    if p.numel():
        block_m, block_n, warps = _check.tile_for(TILES, q)
        launch(
            attention_map_kernel,
            (_check.cdiv(Tk, block_n) * _check.cdiv(R, block_m) * heads.shape[0] * B,),
            q,
            k,
            lse,
            heads,
            rows,
            p,
            *q.stride()[:3],
            *k.stride()[:3],
            heads.shape[0],
            R,
            H,
            Tq,
            Tk,
            H // Hkv,
            window,
            scale,
            D=D,
            CAUSAL=causal,
            WINDOW=window > 0,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=max(16, _check.power_of_2(D)),
            num_warps=warps,
        )
    return p


def _on_cpu(
    q: Tensor, k: Tensor, lse: Tensor, heads: Tensor, rows: Tensor, causal: bool, scale: float, window: int
) -> Tensor:
    p = reference.attention_map(q, k, lse, heads=heads, rows=rows, causal=causal, scale=scale, window=window)
    assert isinstance(p, Tensor)
    return p.contiguous()


def _resolve(name: str, chosen: Tensor | None, size: int, like: Tensor) -> Tensor:
    """(n,) int64 indices from 0 up. Values are read on a CPU alone, where reading them costs no synchronisation."""
    if chosen is None:
        return torch.arange(size, device=like.device)
    if chosen.device.type == "cpu" and chosen.numel():
        for value in (int(chosen.min()), int(chosen.max())):
            if not -size <= value < size:
                _check.fail("attention_map", f"{name} must lie in {-size}..{size - 1}", value)
    return torch.where(chosen < 0, chosen + size, chosen)


def _whole(fill: Fill) -> Fill:
    def attention_map(
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        heads: Tensor | None,
        rows: Tensor | None,
        causal: bool,
        scale: float,
        window: int,
    ) -> Tensor:
        heads, rows = _resolve("heads", heads, q.shape[2], q), _resolve("rows", rows, q.shape[1], q)
        return fill(q, k, lse, heads, rows, causal, scale, window)

    return attention_map


def _pieces(batch: int, heads: int, rows: int, keys: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts (batch, heads, rows, keys) into blocks of at most BUFFER elements, of whole rows."""
    steps = []
    left = max(1, BUFFER // max(1, keys))
    for size in (rows, heads, batch):
        steps.append(max(1, min(size, left)))
        left = max(1, left // steps[-1])
    step_r, step_h, step_b = steps
    for b, h, r in itertools.product(range(0, batch, step_b), range(0, heads, step_h), range(0, rows, step_r)):
        yield slice(b, b + step_b), slice(h, h + step_h), slice(r, r + step_r)


def _largest(fill: Fill) -> Callable[..., tuple[Tensor, Tensor]]:
    def attention_map_top(
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        heads: Tensor | None,
        rows: Tensor | None,
        top_m: int,
        causal: bool,
        scale: float,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        heads, rows = _resolve("heads", heads, q.shape[2], q), _resolve("rows", rows, q.shape[1], q)
        B, Tk = k.shape[:2]
        shape = (B, heads.shape[0], rows.shape[0], top_m)
        keys = torch.empty(shape, dtype=torch.int64, device=q.device)
        shares = torch.empty(shape, dtype=torch.float32, device=q.device)
        from_the_end = torch.arange(Tk - 1, -1, -1, device=q.device)
        for b, h, r in _pieces(*shape[:3], Tk):
            p = fill(q[b], k[b], lse[b], heads[h], rows[r], causal, scale, window)
            # The bits of a float >= 0 are ordered as its value is. With the key below them, counted from the end, no
            # two are equal: topk, which promises nothing about ties, then gives the lower key first.
            ranked = p.view(torch.int32).to(torch.int64)
            ranked <<= 32
            ranked += from_the_end
            best = ranked.topk(top_m, dim=-1).values
            keys[b, h, r] = Tk - 1 - (best & 0xFFFFFFFF)
            shares[b, h, r] = (best >> 32).to(torch.int32).view(torch.float32)
        return keys, shares

    return attention_map_top


def _fake_whole(q: Tensor, k: Tensor, lse: Tensor, heads: Tensor | None, rows: Tensor | None, *_: object) -> Tensor:
    chosen = (q.shape[2] if heads is None else heads.shape[0], q.shape[1] if rows is None else rows.shape[0])
    return q.new_empty((q.shape[0], *chosen, k.shape[1]), dtype=torch.float32)


def _fake_largest(
    q: Tensor, k: Tensor, lse: Tensor, heads: Tensor | None, rows: Tensor | None, top_m: int, *_: object
) -> tuple[Tensor, Tensor]:
    shares = _fake_whole(q, k, lse, heads, rows)[..., :1].expand(-1, -1, -1, top_m)
    return q.new_empty(shares.shape, dtype=torch.int64), q.new_empty(shares.shape, dtype=torch.float32)


register(
    "attention_map(Tensor q, Tensor k, Tensor lse, Tensor? heads, Tensor? rows, bool causal, float scale, int window)"
    " -> Tensor",
    triton_impl=_whole(_launch),
    cpu_impl=_whole(_on_cpu),
    fake=_fake_whole,
)
register(
    "attention_map_top(Tensor q, Tensor k, Tensor lse, Tensor? heads, Tensor? rows, SymInt top_m, bool causal,"
    " float scale, int window) -> (Tensor, Tensor)",
    triton_impl=_largest(_launch),
    cpu_impl=_largest(_on_cpu),
    fake=_fake_largest,
)


def _indices(op: str, name: str, chosen: int | Iterable[int] | Tensor | None, size: int, like: Tensor) -> Tensor | None:
    """A choice as given -> (n,) int64 on the device of `like`, or None for all. The values of a tensor stay unread."""
    if chosen is None:
        return None
    if isinstance(chosen, Tensor):
        if chosen.dim() != 1 or chosen.dtype not in (torch.int32, torch.int64):
            _check.fail(op, f"{name} must be (n,) int32 or int64", f"{tuple(chosen.shape)} {chosen.dtype}")
        _check.index(op, name, chosen, chosen.dtype, like)
        return chosen.long().contiguous()
    numbers = list(chosen) if isinstance(chosen, Iterable) else [chosen]
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool):
            _check.fail(op, f"{name} must be an int, ints, or a tensor of them", repr(number))
        if not -size <= number < size:
            _check.fail(op, f"{name} must lie in {-size}..{size - 1}", number)
    return torch.tensor([n + size if n < 0 else n for n in numbers], dtype=torch.int64, device=like.device)


@autocast("lower")
def _as_attention_took_them(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


def attention_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    heads: int | Iterable[int] | Tensor | None = None,
    rows: int | Iterable[int] | Tensor | None = None,
    top_m: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The probabilities of `attention`, exactly as it used them: q (B, Tq, H, D), k (B, Tk, Hkv, D) -> float32
    (B, heads, rows, Tk).

        out, lse = attention(q, k, v, return_lse=True)
        keys, shares = attention_map(q, k, lse, heads=3, rows=-1, top_m=5)   # what head 3 read for the last token

    lse is what `attention` returned, float32 (B, H, Tq), for the same causal, scale and window. heads and rows choose
    among H and Tq, in the order given: an int (its axis stays, of size 1), ints, or an (n,) int32 or int64 tensor on
    the device of q; negative ones count from the end; None takes all. With top_m in 1..Tk, instead of the whole rows
    the m likeliest keys int64 and their probabilities float32, both (B, heads, rows, top_m), largest first and the
    lower key first among equals; a key that the row does not see has probability 0. Then at most 2^22 probabilities
    exist at once. A row with no key (lse = -inf) gives 0. No gradient.
    Raises ValueError on a shape, dtype, device or option that does not fit; a tensor's index out of range is an error
    on the CPU, and on a GPU NaN, or a device assertion under TRITON_DEBUG=1.
    """
    op = "attention_map"
    _check.no_gradient(op, q=q, k=k, lse=lse)
    q, k = _as_attention_took_them(q, k)
    for name, tensor in (("q", q), ("k", k)):
        _check.rank(op, name, tensor, "(B, T, H, D)")
    _check.same_kind(op, "q", q, k=k)
    B, Tq, H, D = q.shape
    _check.shape(op, "k", k, (B, *k.shape[1:3], D), "(B, Tk, Hkv, D)")
    _check.heads(op, H, k.shape[2], D)
    _check.shape(op, "lse", lse, (B, H, Tq), "(B, H, Tq)")
    _check.index(op, "lse", lse, torch.float32, q)
    scale, window = _check.attention_options(op, D, scale, window)
    if top_m is not None and not 1 <= top_m <= k.shape[1]:
        _check.fail(op, f"top_m must lie in 1..{k.shape[1]}", top_m)
    chosen = _indices(op, "heads", heads, H, q), _indices(op, "rows", rows, Tq, q)
    if top_m is None:
        return torch.ops.gpt2_kernels.attention_map(q, k, lse, *chosen, causal, scale, window)
    return torch.ops.gpt2_kernels.attention_map_top(q, k, lse, *chosen, top_m, causal, scale, window)
