"""The random numbers of dropout, inside kernels.

A pair (query i, key j) of a head is kept or dropped by (seed, head, i, j) alone, through a counter-based generator:
any tile of the mask can be made anew, so backward stores none, and compile, recompute and graph capture agree.
Specification: gpt2_kernels.reference.dropout_keep.
"""

from gpt2_kernels._runtime import tl, triton


@triton.jit
def dropout_keep(seed, head, i, first_key, threshold, BLOCK_N: tl.constexpr):
    """(len(i), BLOCK_N) int1: which of the keys from first_key on, a multiple of 4, the queries i keep.

    One Philox call makes four words, for four keys in a row: about 25 integer instructions a score.
    """
    quad = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    a, b, c, d = tl.philox(seed, quad[None, :], i[:, None], head, 0)  # (len(i), BLOCK_N / 4) each
    keep = tl.join(
        tl.join(_above(a, threshold), _above(c, threshold)), tl.join(_above(b, threshold), _above(d, threshold))
    )  # (len(i), BLOCK_N / 4, 2, 2), whose last two axes count a, b, c, d
    return tl.reshape(keep, [i.shape[0], BLOCK_N]) != 0


@triton.jit
def _above(word, threshold):
    """24 of the 32 bits are compared; a byte for each answer keeps the exchange between threads small."""
    return ((word >> 8).to(tl.int32) >= threshold).to(tl.int8)
