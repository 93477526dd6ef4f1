"""The matmul of `linear` for generated tokens (split-K): few rows, so reading the weights is all the work.

y = activation(x weight^T + bias) + residual for x (M, K), weight (N, K): 2 N K bytes in bfloat16 whatever M is up to a
few hundred. `linear_kernel`'s tiles of 128 columns are 6 programs for a projection of GPT-2 124M, each of which loops
over all of K: 6 of 132 SMs read 1.2 to 4.7 MB, at the pace of their loads. Here tiles are 64 columns wide and K is cut
into splits of at least LEAST_K, into about PROGRAMS pieces where the weight is large enough:

    124M        tiles x splits    K of a split
    c_attn      36 x 4            192
    c_proj      12 x 6            128
    c_fc        48 x 3            256
    c_proj      12 x 12           256
    wte         786 x 1           768

The number of splits depends on N and K alone, never on M or the GPU, and the parts of a tile are added in order of K by
the program that takes the tile's last ticket, as in `_paged_decode`: batch-invariant. The bits are not those of
`linear_kernel`, which does not split K: a token's place in a text, prompt or not, decides which of the two computes it.
Parts take 4 M N bytes of scratch per split, written and read in L2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt2_kernels import _check, _overlap
from gpt2_kernels._gelu import gelu
from gpt2_kernels._launch import launch, tickets
from gpt2_kernels._overlap import prefetch, wait
from gpt2_kernels._runtime import tl, triton

# (minimum compute capability, element size) -> (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages); never keyed by M. Compiled
# without spills (benchmarks.compile_report) but for two instructions of 64 splits on sm_100; not yet timed on a GPU.
TILES = {
    (0, 2): (64, 64, 64, 4, 4),
    (0, 4): (16, 64, 32, 4, 3),
}
PROGRAMS = 144  # approximate, per tile of rows: an H200 has 132 SMs
LEAST_K = 128  # per split: two steps along K
PREFETCH = 4  # BLOCK_K each: all of a split of GPT-2's layers, 32 KB; more would queue before the loads, or not fit L2
TOGETHER = 3  # parts that a combining program loads at a time


@triton.jit(do_not_specialize=["M"])
def linear_decode_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K), or (K, N) where WEIGHT_KN
    bias_ptr,  # (N,) or None
    residual_ptr,  # (M, N) or None
    y_ptr,  # (M, N), contiguous
    parts_ptr,  # (splits, M, N) float32, where there are several
    tickets_ptr,  # (tiles,) int32, zeros
    M,
    N,
    K,
    stride_x,
    stride_weight,
    stride_residual,
    ACTIVATION: tl.constexpr,
    WEIGHT_KN: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program owns SPLIT_K of K of one tile of y; a tile's last to finish adds the parts in order and stores y."""
    tiles_m = tl.cdiv(M, BLOCK_M)  # tiles of the same columns run together, and read the weights once from memory
    tile = tl.program_id(0)
    split = tl.program_id(1)
    m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    k = split * SPLIT_K + tl.arange(0, BLOCK_K)
    rows = m.to(tl.int64)[:, None]
    x_tile = x_ptr + rows * stride_x + k[None, :]  # (BLOCK_M, BLOCK_K)
    if WEIGHT_KN:
        weight_tile = weight_ptr + k.to(tl.int64)[:, None] * stride_weight + n[None, :]  # (BLOCK_K, BLOCK_N)
    else:
        weight_tile = weight_ptr + n.to(tl.int64)[:, None] * stride_weight + k[None, :]  # (BLOCK_N, BLOCK_K)
    if OVERLAP and not WEIGHT_KN:  # weights need not wait for the previous kernel: prefetch the first into L2
        for start in tl.static_range(0, PREFETCH_K, 2 * BLOCK_K):
            # A 128-byte line is BLOCK_K of a row: one address per thread, two lines of each row.
            at = tl.minimum(split * SPLIT_K + start + BLOCK_K * tl.arange(0, 2), K - 1)
            prefetch(weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride_weight + at[None, :])
    wait(OVERLAP)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, tl.minimum(SPLIT_K, K - split * SPLIT_K), BLOCK_K):
        # Rows past M are not read: for one text, that is nearly all.
        x_there = (m < M)[:, None]
        if not EVEN_K:
            x_there = x_there & (start + k < K)[None, :]
        x = tl.load(x_tile + start, mask=x_there, other=0.0)
        if WEIGHT_KN:
            there = (n < N)[None, :]
            if not EVEN_K:
                there = there & (start + k < K)[:, None]
            weight = tl.load(weight_tile + tl.cast(start, tl.int64) * stride_weight, mask=there, other=0.0)
            acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        else:
            there = (n < N)[:, None]
            if not EVEN_K:
                there = there & (start + k < K)[None, :]
            weight = tl.load(weight_tile + start, mask=there, other=0.0)
            acc = tl.dot(x, weight.T, acc, input_precision=PRECISION)

    inside = (m < M)[:, None] & (n < N)[None, :]
    at = rows * N + n[None, :]
    if SPLITS == 1:
        _store(acc, bias_ptr, residual_ptr, y_ptr, at, rows * stride_residual, n, N, inside, ACTIVATION)
    else:
        size = tl.cast(M, tl.int64) * N  # elements of one split's parts
        tl.store(parts_ptr + split * size + at, acc, mask=inside)
        tl.debug_barrier()  # the whole program has stored before its one ticket is taken
        # Release what was stored here, acquire what the others stored.
        if tl.atomic_add(tickets_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for first in tl.range(0, SPLITS, TOGETHER):  # that many loads in flight at a time
                for part in tl.static_range(TOGETHER):
                    there = inside & (first + part < SPLITS)
                    # .cg: from L2, where the other programs left them
                    total += tl.load(
                        parts_ptr + (first + part) * size + at, mask=there, other=0.0, cache_modifier=".cg"
                    )
            _store(total, bias_ptr, residual_ptr, y_ptr, at, rows * stride_residual, n, N, inside, ACTIVATION)
            tl.store(tickets_ptr + tile, 0)  # for the next launch


@triton.jit
def _store(y, bias_ptr, residual_ptr, y_ptr, at, residual_rows, n, N, inside, ACTIVATION: tl.constexpr):
    """The epilogue of a tile, from bias to store."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != 0:
        y = gelu(y, ACTIVATION)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + residual_rows + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def splits_of(N: int, K: int, block_n: int, block_k: int) -> tuple[int, int]:
    """(splits, K of a split but the last), a multiple of block_k."""
    tiles = _check.cdiv(N, block_n)
    wanted = max(1, min((2 * PROGRAMS + tiles) // (2 * tiles), K // LEAST_K))  # rounded to the nearest
    split_k = _check.cdiv(_check.cdiv(K, wanted), block_k) * block_k
    return _check.cdiv(K, split_k), split_k


def product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """One launch: x (M, K) and residual (M, N) with dense last axes, weight (N, K) with either axis dense."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if not (M and N):
        return y
    weight_kn = _check.transposed(weight)
    weight = weight.T if weight_kn else _check.unit_last_stride(weight)
    block_m, block_n, block_k, warps, stages = _check.product_tile(TILES, x)
    splits, split_k = splits_of(N, K, block_n, block_k)
    tiles = _check.cdiv(M, block_m) * _check.cdiv(N, block_n)
    several: tuple[Any, Any] = (None, None)
    if splits > 1:
        parts = torch.empty((splits, M, N), dtype=torch.float32, device=x.device)
        several = parts, tickets(tiles, x.device)
    launch(
        linear_decode_kernel,
        (tiles, splits),
        x,
        weight,
        None if bias is None else bias.contiguous(),
        residual,
        y,
        *several,
        M,
        N,
        K,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        ACTIVATION=_check.ACTIVATIONS[activation or None],
        WEIGHT_KN=weight_kn,
        EVEN_K=K % block_k == 0,
        # tf32 keeps 11 bits of a float32; torch's matmul also defaults to the full 24
        PRECISION="tf32" if x.element_size() == 2 else "ieee",
        SPLITS=splits,
        SPLIT_K=split_k,
        TOGETHER=TOGETHER,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PREFETCH_K=min(split_k, PREFETCH * block_k),
        **_overlap.options(x.device),
        num_warps=warps,
        num_stages=stages,
    )
    return y
