"""What the forward and backward attention kernels share: which keys a tile of queries sees, and dropout.

Whether a pair (query i, key j) of a head is dropped depends on (seed, head, i, j) alone, through a counter-based
generator: any tile of the mask can be regenerated, so none is stored, and compile, recompute and graph capture agree.
Specification: gpt2_kernels.reference.visible, dropout_keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gpt2_kernels import _check
from gpt2_kernels._runtime import accumulator, tl, triton


@triton.jit
def key_range(low, high, Tk, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """For queries at positions low..high among Tk keys: (begin, full_begin, full_end, end).

    Keys [begin, end) are visible to some of them; the whole blocks [full_begin, full_end) to all of them, so no mask is
    needed there. All but end are multiples of BLOCK_N.
    """
    begin = 0
    full_begin = 0
    full_end = Tk // BLOCK_N * BLOCK_N
    end = Tk
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(high + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(low + 1, 0) // BLOCK_N * BLOCK_N)
    if WINDOW:
        begin = tl.maximum(low - window + 1, 0) // BLOCK_N * BLOCK_N
        full_end = tl.maximum(full_end, begin)
        full_begin = tl.minimum(tl.cdiv(tl.maximum(high - window + 1, 0), BLOCK_N) * BLOCK_N, full_end)
    return begin, full_begin, full_end, end


@triton.jit
def dropout_keep(seed, head, i, first_key, threshold, BLOCK_N: tl.constexpr):
    """(len(i), BLOCK_N) int1: which keys from first_key (a multiple of 4) on the queries i keep.

    One Philox call yields four words, for four consecutive keys: about 25 integer instructions per score.
    """
    quad = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    a, b, c, d = tl.philox(seed, quad[None, :], i[:, None], head, 0)  # (len(i), BLOCK_N / 4) each
    keep = tl.join(
        tl.join(_above(a, threshold), _above(c, threshold)), tl.join(_above(b, threshold), _above(d, threshold))
    )  # (len(i), BLOCK_N / 4, 2, 2), whose last two axes order a, b, c, d
    return tl.reshape(keep, [i.shape[0], BLOCK_N]) != 0


@triton.jit
def _above(word, threshold):
    """24 of the 32 bits are compared; one byte per result keeps the exchange between threads small."""
    return ((word >> 8).to(tl.int32) >= threshold).to(tl.int8)


def tile(table: Mapping[tuple[int, int, int], _check.Tile], q: Tensor, seed: Tensor | None) -> _check.Tile:
    """The row of a launch table for q (B, T, H, D); dropout needs the registers of a head twice as wide."""
    D = q.shape[-1]
    return _check.tile_for(table, q, D if seed is None else min(2 * D, 256))


def variant(q: Tensor, packed: bool, causal: bool, window: int, seed: Tensor | None) -> dict[str, Any]:
    """The constexprs that all attention kernels share, apart from the tile."""
    D = q.shape[-1]
    return {
        "D": D,
        "PACKED": packed,
        "CAUSAL": causal,
        "WINDOW": window > 0,
        "DROPOUT": seed is not None,
        "PRECISION": "tf32" if q.element_size() == 2 else "ieee",
        "ACC": accumulator(q.dtype),
        "BLOCK_D": max(16, _check.power_of_2(D)),
    }
