"""The threshold above which a row's scores are kept: top-k and top-p search, without a sort.

A border is the largest threshold such that the scores that reach it number at least k, or weigh at least top_p of all.
It is found by bisection over float32 mapped to order-preserving 32-bit integers (keys); bfloat16 and float16 logits
have far fewer values, and only those are searched. Count and weight never grow as the threshold rises, rounding
included: a higher threshold zeroes addends of one fixed summation tree, and a rounded sum never grows when an addend
shrinks. So bisection is well defined. Always, `low` reaches the goal (or is the floor) and `high` does not; with at
most one score from `low` up to `high`, the border is known.

What makes it short is a tournament: in the pass that computes a row's maximum and log-sum-exp, each of 4096 lanes keeps
the three largest scores that it sees. These are in registers, where a search step needs no pass over the row. The
border found among them is never above the row's, since the row has more scores to reach the goal with. One pass over
the row counts what reaches it: if the lanes hold all of that, it is the row's border. They do not when some lane saw
four of n such scores, with a probability of about n^4 / (24 * 4096^3): 4 % for n = 500. Then the search continues over
the row, three thresholds per pass.
"""

from __future__ import annotations

from gpt2_kernels._runtime import tl, triton


@triton.jit
def key_of(x):
    """float32 -> int32 in the same order; 0.0 and -0.0 are equal, NaN is the largest, as in torch.argmax."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 that has this key."""
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def tile_places(ROWS: tl.constexpr, LANES: tl.constexpr):
    """Token offsets within a tile, row-major, so that a lane sees every LANES-th token."""
    return tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]  # (ROWS, LANES)


@triton.jit
def load_tile(ptr, start, V, other, ROWS: tl.constexpr, LANES: tl.constexpr):
    """A tile of a row. Row offsets are added to the address last, and so are part of the instruction."""
    ptrs = (ptr + start + tl.arange(0, LANES))[None, :] + tl.arange(0, ROWS)[:, None] * LANES
    return tl.load(ptrs, mask=start + tile_places(ROWS, LANES) < V, other=other)


@triton.jit
def scores_of(
    logits_ptr, history_ptr, penalty, start, V, ROWS: tl.constexpr, LANES: tl.constexpr, HAS_HISTORY: tl.constexpr
):  # fmt: skip
    """Scores from token `start` on, float32, penalised where seen (Keskar et al., 2019); -inf past the vocabulary."""
    x = load_tile(logits_ptr, start, V, -float("inf"), ROWS, LANES).to(tl.float32)
    if HAS_HISTORY:
        if penalty != 1.0:
            seen = load_tile(history_ptr, start, V, 0, ROWS, LANES) != 0
            # Rounded as in PyTorch, or scores that tie there would not tie here.
            x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + penalty), x * penalty), x)
    return x


@triton.jit
def reaching(
    logits_ptr, history_ptr, penalty, V, top, scale, t1, t2, t3,
    ROWS: tl.constexpr, LANES: tl.constexpr, HAS_HISTORY: tl.constexpr,
):  # fmt: skip
    """The count and weight of the row's scores that reach t1 <= t2 <= t3: one pass, a sum per lane, then a tree."""
    n1 = tl.zeros((LANES,), tl.int32)
    n2 = tl.zeros((LANES,), tl.int32)
    n3 = tl.zeros((LANES,), tl.int32)
    w1 = tl.zeros((LANES,), tl.float32)
    w2 = tl.zeros((LANES,), tl.float32)
    w3 = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, ROWS * LANES):
        x = scores_of(logits_ptr, history_ptr, penalty, start, V, ROWS, LANES, HAS_HISTORY)
        w = tl.exp2((x - top) * scale)
        n1 += tl.sum((x >= t1).to(tl.int32), 0)
        n2 += tl.sum((x >= t2).to(tl.int32), 0)
        n3 += tl.sum((x >= t3).to(tl.int32), 0)
        w1 += tl.sum(tl.where(x >= t1, w, 0.0), 0)
        w2 += tl.sum(tl.where(x >= t2, w, 0.0), 0)
        w3 += tl.sum(tl.where(x >= t3, w, 0.0), 0)
    return tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0), tl.sum(w1, 0), tl.sum(w2, 0), tl.sum(w3, 0)


@triton.jit
def _count(first, second, third, threshold):
    """How many of the lanes' largest scores reach a threshold."""
    reached = (first >= threshold).to(tl.int32) + (second >= threshold).to(tl.int32) + (third >= threshold).to(tl.int32)
    return tl.sum(tl.sum(reached, 0), 0)


@triton.jit
def find_border(
    logits_ptr, history_ptr, penalty, V, top, scale, first, second, third, floor, goal, complete,
    BY_COUNT: tl.constexpr, SHIFT: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, HAS_HISTORY: tl.constexpr,
):  # fmt: skip
    """The largest key, at least `floor`, such that the scores that reach it number (or weigh) at least `goal`.

    Returns it, the weight that reaches it, and whether `first`, `second` and `third`, the lanes' largest scores, hold
    all scores that do; `complete` says that they hold all that reach `floor`. Keys lack the SHIFT low bits no score
    uses.
    """
    limit = (key_of(top) >> SHIFT).to(tl.int64) + 1
    w_first = tl.exp2((first - top) * scale)
    w_second = tl.exp2((second - top) * scale)
    w_third = tl.exp2((third - top) * scale)
    low, high = floor, limit
    threshold = value_of(low << SHIFT)
    n_low = _count(first, second, third, threshold)
    n_high = n_low * 0
    # Start at the least of the lanes' largest scores: usually just below what is kept, it saves some ten steps.
    middle = (key_of(tl.min(tl.max(first, 0), 0)) >> SHIFT).to(tl.int64)
    middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
    while (high - low > 1) & (n_low - n_high > 1):
        threshold = value_of(middle << SHIFT)
        n = _count(first, second, third, threshold)
        if BY_COUNT:
            reached = n.to(tl.float32) >= goal
        else:
            w = tl.where(first >= threshold, w_first, 0.0) + tl.where(second >= threshold, w_second, 0.0)
            w += tl.where(third >= threshold, w_third, 0.0)
            reached = tl.sum(tl.sum(w, 0), 0) >= goal
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
        n_low, n_high = tl.where(reached, n, n_low), tl.where(reached, n_high, n)
        middle = (low + high) >> 1

    threshold = value_of(low << SHIFT)
    weight = goal  # unused where the lanes were complete: top-p is the last search
    if not complete:
        n, n2, n3, weight, w2, w3 = reaching(
            logits_ptr, history_ptr, penalty, V, top, scale, threshold, threshold, threshold, ROWS, LANES, HAS_HISTORY
        )
        complete = n == n_low
        if not complete:
            high, n_low, n_high = limit, n, n * 0  # the lanes undercount: only `low` is certain
        while (high - low > 1) & (n_low - n_high > 1) & (not complete):
            width = high - low
            k1 = low + tl.maximum(width >> 2, 1)
            k2 = low + tl.maximum(width >> 1, 1)
            k3 = low + tl.maximum(3 * width >> 2, 1)
            n1, n2, n3, w1, w2, w3 = reaching(
                logits_ptr, history_ptr, penalty, V, top, scale,
                value_of(k1 << SHIFT), value_of(k2 << SHIFT), value_of(k3 << SHIFT), ROWS, LANES, HAS_HISTORY,
            )  # fmt: skip
            if BY_COUNT:
                r1, r2, r3 = n1.to(tl.float32) >= goal, n2.to(tl.float32) >= goal, n3.to(tl.float32) >= goal
            else:
                r1, r2, r3 = w1 >= goal, w2 >= goal, w3 >= goal
            high = tl.where(r3, high, tl.where(r2, k3, tl.where(r1, k2, k1)))
            n_high = tl.where(r3, n_high, tl.where(r2, n3, tl.where(r1, n2, n1)))
            low = tl.where(r3, k3, tl.where(r2, k2, tl.where(r1, k1, low)))
            n_low = tl.where(r3, n3, tl.where(r2, n2, tl.where(r1, n1, n_low)))
            weight = tl.where(r3, w3, tl.where(r2, w2, tl.where(r1, w1, weight)))
    return low, weight, complete
