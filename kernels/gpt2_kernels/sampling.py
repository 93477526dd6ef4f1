"""Choosing the next token from logits: greedy, temperature, top-k, top-p, min-p, repetition penalty.

    w_i = exp((x_i - max x) / temperature)       the likeliest token weighs 1
    top-k   keeps x_i >= a,  a the largest score that at least k scores reach
    top-p   keeps x_i >= b,  b the largest such that what reaches it weighs top_p of the whole, or of what top-k left
    min-p   keeps w_i >= min_p
    draw    the first id whose running sum of kept weights exceeds u * total

One uniform number u in [0, 1) decides a row, and (seed, position) decides u, through a counter-based generator: the
draw never depends on the batch, the order of calls or the device's random state.

The vocabulary is not sorted: a and b are found by bisection, usually in registers (see gpt2_kernels._thresholds).

Bytes, for S rows: S V s read from memory, once, and S V more of history where there is one; the 100 KB of a GPT-2 row
in bfloat16 then stay in its SM's L1 cache, or in L2. The cost is instructions: on sm_90, per score, 14 in the first
pass (19 with a search), 14 to count what lies above a border, 19 to draw, 25 to count above three borders; and 120 to
190 per thread and step of the search in registers. Thousands of cycles of an SM, which issues 128 a cycle, for a row of
V = 50257 in bfloat16, searches of ten steps (counted in compiled code, not timed):
    greedy                         1 pass            6
    temperature alone              2 passes         14
    top-k                          3 passes         26
    top-k and top-p                3 passes         34
    top-p alone                    4 passes         35
    a border beyond the registers  a pass for each factor of 4: 10 more each
Reading from memory takes less: 2 of them. Specification: gpt2_kernels.reference.sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2_kernels import _check, _native, _overlap, _runtime, reference
from gpt2_kernels._launch import launch
from gpt2_kernels._operator import register
from gpt2_kernels._overlap import wait
from gpt2_kernels._runtime import tl, triton
from gpt2_kernels._thresholds import find_border, key_of, load_tile, reaching, scores_of, tile_places, value_of

MAX_PASSES = 32  # up to this many likeliest tokens are found by one pass over the row each; more by a stable sort

# One program owns one row, in tiles of (ROWS, LANES), one lane per thread. Compiled without spills for sm_80, sm_90 and
# sm_100, which (8, 1024) and (16, 512) were not; not yet timed on a GPU.
ROWS, LANES = 8, 512
MAX_VOCABULARY = 2**31 - 1 - 2 * ROWS * LANES  # ids are int32, and the last tile and the one after it pass the end

# Low bits of a float32 that its values in another dtype never use.
UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def _next_largest(
    logits_ptr, history_ptr, penalty, V, previous,
    ROWS: tl.constexpr, LANES: tl.constexpr, HAS_HISTORY: tl.constexpr,
):  # fmt: skip
    """The largest (key, then lowest id) below `previous`, packed into an int64: one pass over the row."""
    best = tl.full((LANES,), -0x7FFFFFFFFFFFFFFF, tl.int64)
    for start in range(0, V, ROWS * LANES):
        ids = start + tile_places(ROWS, LANES)
        x = scores_of(logits_ptr, history_ptr, penalty, start, V, ROWS, LANES, HAS_HISTORY)
        packed = (key_of(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids)
        packed = tl.where((ids < V) & (packed < previous), packed, -0x7FFFFFFFFFFFFFFF)
        best = tl.maximum(best, tl.max(packed, 0))
    return tl.max(best, 0)


@triton.jit
def _first_at(
    logits_ptr, history_ptr, penalty, V, top, start,
    ROWS: tl.constexpr, LANES: tl.constexpr, HAS_HISTORY: tl.constexpr,
):  # fmt: skip
    """The lowest token of a tile whose score is `top`."""
    x = scores_of(logits_ptr, history_ptr, penalty, start, V, ROWS, LANES, HAS_HISTORY)
    return tl.min(tl.min(tl.where(x == top, start + tile_places(ROWS, LANES), 0x7FFFFFFF), 0), 0)


@triton.jit
def _kept(x, top, scale, threshold, min_p):
    """The weights of the kept tokens, 0 for the rest."""
    w = tl.exp2((x - top) * scale)
    return tl.where((x >= threshold) & (w >= tl.minimum(min_p, 1.0)), w, 0.0)  # a min_p above 1 would keep nothing


@triton.jit
def _draw(
    logits_ptr, history_ptr, penalty, V, top, scale, threshold, min_p, seed, position,
    ROWS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, HAS_HISTORY: tl.constexpr,
):  # fmt: skip
    """The token at which the running sum of kept weights, by id, exceeds u * total: first its tile, then its place."""
    t = tl.arange(0, TILES)
    sums = tl.zeros((TILES,), tl.float64)
    for start in range(0, V, ROWS * LANES):
        x = scores_of(logits_ptr, history_ptr, penalty, start, V, ROWS, LANES, HAS_HISTORY)
        # float64 across lanes: in float32 a token's share of a sum of 50,000 would be rounded away, and the CPU would
        # draw another token. Within a lane few are summed, and conversions cost as much as exponentials.
        w = tl.sum(_kept(x, top, scale, threshold, min_p), 0).to(tl.float64)  # (LANES,)
        sums = tl.where(t == start // (ROWS * LANES), tl.sum(w, 0), sums)
    # The first word of Philox-4x32-10 (Salmon et al., 2011) at counter (position, 0, 0, 0).
    word, _, _, _ = tl.randint4x(seed, position.to(tl.int32))
    point = (word >> 8).to(tl.float64) * 5.9604644775390625e-08 * tl.sum(sums, 0)  # 2^-24
    # The sums of a parallel scan are each rounded differently, so they need not be monotonic. The first that exceeds
    # the point is still well defined; only a token of nonzero weight is drawn, and the last such if none exceeds it.
    chosen = tl.min(tl.where((sums > 0) & (tl.cumsum(sums, 0) > point), t, TILES), 0)
    chosen = tl.where(chosen < TILES, chosen, tl.max(tl.where(sums > 0, t, 0), 0))
    start = chosen * (ROWS * LANES)
    ids = start + tl.arange(0, ROWS * LANES)
    x = scores_of(logits_ptr, history_ptr, penalty, start, V, ROWS, LANES, HAS_HISTORY)
    w = tl.reshape(_kept(x, top, scale, threshold, min_p), (ROWS * LANES,)).to(tl.float64)
    running = tl.sum(tl.where(t < chosen, sums, 0.0), 0) + tl.cumsum(w, 0)
    token = tl.min(tl.where((w > 0) & (running > point), ids, 0x7FFFFFFF), 0)
    return tl.where(token < V, token, tl.max(tl.where(w > 0, ids, 0), 0))


@triton.jit(do_not_specialize=["logits_ptr", "history_ptr", "stride_logits", "stride_history", "V", "M"])
def sample_kernel(
    logits_ptr,  # (S, V)
    history_ptr,  # (S, V), or None
    penalty_ptr,  # (S,), or None
    temperature_ptr,  # (S,)
    top_k_ptr,  # (S,)
    top_p_ptr,  # (S,)
    min_p_ptr,  # (S,)
    seeds_ptr,  # (S,)
    positions_ptr,  # (S,)
    tokens_ptr,  # (S,)
    logprobs_ptr,  # (S,)
    log_totals_ptr,  # (S,)
    top_ids_ptr,  # (S, M)
    top_values_ptr,  # (S, M)
    stride_logits,
    stride_history,
    V,
    M,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,  # at least V / (ROWS * LANES), a power of two
    SHIFT: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program owns one row: a sum per lane over the tiles, then a tree over the lanes.

    Addresses are not specialised, so no load is wider than one score: rows of 50257 are not aligned, and wider loads
    for those that happen to be would sum in another order and give the same row other bits.
    """
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    penalty = 1.0
    if HAS_HISTORY:
        history_ptr += row * stride_history
        penalty = tl.load(penalty_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    limited = (k > 0) & (k < V)
    searches = (temperature > 0) & (limited | (top_p < 1.0))
    lowest = -3.4028234663852886e38  # the least finite float32: with it, -inf - lowest is no NaN

    largest = tl.full((LANES,), lowest, tl.float32)  # of the unpenalised logits; total: the sum of exp(logit - largest)
    total = tl.zeros((LANES,), tl.float32)
    best = tl.full((LANES,), -float("inf"), tl.float32)  # the largest score, and the start of its first tile
    best_start = tl.zeros((LANES,), tl.int32)
    first = tl.full((ROWS, LANES), -float("inf"), tl.float32)  # the three largest scores
    second = tl.full((ROWS, LANES), -float("inf"), tl.float32)
    third = tl.full((ROWS, LANES), -float("inf"), tl.float32)
    ahead = load_tile(logits_ptr, 0, V, -float("inf"), ROWS, LANES)
    for start in range(0, V, ROWS * LANES):
        x = ahead.to(tl.float32)
        # Prefetch the next tile: only these loads go to memory, and they take longest.
        ahead = load_tile(logits_ptr, start + ROWS * LANES, V, -float("inf"), ROWS, LANES)
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp2((largest - new) * 1.4426950408889634)
        total += tl.sum(tl.exp2((x - new[None, :]) * 1.4426950408889634), 0)
        largest = new
        if HAS_HISTORY:
            x = scores_of(logits_ptr, history_ptr, penalty, start, V, ROWS, LANES, HAS_HISTORY)
        new = tl.max(x, 0)
        best_start = tl.where(new > best, start, best_start)
        best = tl.maximum(best, new)
        if searches:
            lesser = tl.minimum(first, x)
            first = tl.maximum(first, x)
            third = tl.maximum(third, tl.minimum(second, lesser))
            second = tl.maximum(second, lesser)
    overall = tl.max(largest, 0)
    log_total = overall + tl.log(tl.sum(total * tl.exp2((largest - overall) * 1.4426950408889634), 0))
    top = tl.max(best, 0)

    # A NaN or +inf among the logits makes their log-sum-exp NaN; if all are -inf it is -inf.
    usual = (tl.abs(log_total) < float("inf")) & (tl.abs(top) < float("inf"))
    token = 0
    if not usual:
        packed = _next_largest(logits_ptr, history_ptr, penalty, V, 0x7FFFFFFFFFFFFFFF, ROWS, LANES, HAS_HISTORY)
        token = 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)
    elif temperature > 0:
        # 1e-35 is indistinguishable from greedy for float32 logits, and its inverse is finite.
        scale = 1.4426950408889634 / tl.maximum(temperature, 1e-35)
        border = (key_of(tl.zeros_like(top) + lowest) >> SHIFT).to(tl.int64)
        complete = V <= 3 * ROWS * LANES  # whether the lanes' registers hold every kept score
        kept_weight = 0.0
        if limited:
            border, kept_weight, complete = find_border(
                logits_ptr, history_ptr, penalty, V, top, scale, first, second, third, border, k.to(tl.float32),
                False, True, SHIFT, ROWS, LANES, HAS_HISTORY,
            )  # fmt: skip
        if top_p < 1.0:  # Holtzman et al., 2019
            if not limited:
                n1, n2, n3, kept_weight, w2, w3 = reaching(
                    logits_ptr, history_ptr, penalty, V, top, scale, lowest, lowest, lowest, ROWS, LANES, HAS_HISTORY
                )
            border, kept_weight, complete = find_border(
                logits_ptr, history_ptr, penalty, V, top, scale, first, second, third, border, top_p * kept_weight,
                complete, False, SHIFT, ROWS, LANES, HAS_HISTORY,
            )  # fmt: skip
        token = _draw(
            logits_ptr, history_ptr, penalty, V, top, scale, value_of(border << SHIFT), tl.load(min_p_ptr + row),
            tl.load(seeds_ptr + row), tl.load(positions_ptr + row), ROWS, LANES, TILES, HAS_HISTORY,
        )  # fmt: skip
    else:
        start = tl.min(tl.where(best == top, best_start, 0x7FFFFFFF), 0)
        token = _first_at(logits_ptr, history_ptr, penalty, V, top, start, ROWS, LANES, HAS_HISTORY)
    tl.store(tokens_ptr + row, token)
    tl.store(logprobs_ptr + row, tl.load(logits_ptr + token).to(tl.float32) - log_total)
    tl.store(log_totals_ptr + row, log_total)

    packed = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for i in range(M):
        packed = _next_largest(logits_ptr, None, 1.0, V, packed, ROWS, LANES, False)
        tl.store(top_ids_ptr + row * M + i, 0x7FFFFFFF - (packed & 0x7FFFFFFF))
        tl.store(top_values_ptr + row * M + i, value_of(packed >> 32) - log_total)


def _sample_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    history: Tensor | None,
    repetition_penalty: Tensor | None,
    top_logprobs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S, V = logits.shape
    tokens, logprobs, top_ids, top_values = _fake(
        logits, temperature, top_k, top_p, min_p, seeds, positions, history, repetition_penalty, top_logprobs
    )
    if not S:
        return tokens, logprobs, top_ids, top_values
    logits = _check.unit_last_stride(logits)
    seen = None if history is None else _check.unit_last_stride(history).view(torch.uint8)
    log_totals = torch.empty_like(logprobs)
    passes = top_logprobs if top_logprobs <= MAX_PASSES else 0
    lanes = min(LANES, max(32, _check.power_of_2(V)))
    rows = min(ROWS, _check.power_of_2(_check.cdiv(V, lanes)))
    launch(
        sample_kernel,
        (S,),
        logits,
        seen,
        None if repetition_penalty is None else repetition_penalty.contiguous(),
        temperature.contiguous(),
        top_k.contiguous(),
        top_p.contiguous(),
        min_p.contiguous(),
        seeds.contiguous(),
        positions.contiguous(),
        tokens,
        logprobs,
        log_totals,
        top_ids,
        top_values,
        logits.stride(0),
        0 if seen is None else seen.stride(0),
        V,
        passes,
        ROWS=rows,
        LANES=lanes,
        TILES=_check.power_of_2(_check.cdiv(V, rows * lanes)),
        SHIFT=0 if history is not None else UNUSED_BITS[logits.dtype],  # penalised scores use every bit
        HAS_HISTORY=history is not None,
        **_overlap.options(logits.device),
        num_warps=lanes // 32,
    )
    if passes < top_logprobs:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        top_ids.copy_(ids[:, :top_logprobs])
        torch.sub(values[:, :top_logprobs].float(), log_totals[:, None], out=top_values)
    return tokens, logprobs, top_ids, top_values


def _on_cpu(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    history: Tensor | None,
    repetition_penalty: Tensor | None,
    top_logprobs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _runtime.native(logits):
        rows = (temperature, top_k, top_p, min_p, seeds, positions)
        seen = None if history is None else history.contiguous()
        penalty = None if repetition_penalty is None else repetition_penalty.contiguous()
        return _native.ops().sample(
            _check.unit_last_stride(logits), *(r.contiguous() for r in rows), seen, penalty, top_logprobs
        )
    outputs = _fake(
        logits, temperature, top_k, top_p, min_p, seeds, positions, history, repetition_penalty, top_logprobs
    )
    # PyTorch sums one long row with several threads but many rows with one thread each, and the two summation orders
    # give different bits. One row at a time is always summed in the same order.
    for i in range(logits.shape[0]):
        token, logprob, top = reference.sample(
            logits[i : i + 1],
            temperature=temperature[i : i + 1],
            top_k=top_k[i : i + 1],
            top_p=top_p[i : i + 1],
            min_p=min_p[i : i + 1],
            seeds=seeds[i : i + 1],
            positions=positions[i : i + 1],
            history=None if history is None else history[i : i + 1],
            repetition_penalty=None if repetition_penalty is None else repetition_penalty[i : i + 1],
            top_logprobs=top_logprobs,
        )
        for output, value in zip(outputs, (token, logprob, *(top or ()))):
            output[i] = value[0]
    return outputs


def _fake(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    history: Tensor | None,
    repetition_penalty: Tensor | None,
    top_logprobs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S = logits.shape[0]
    return (
        logits.new_empty(S, dtype=torch.int64),
        logits.new_empty(S, dtype=torch.float32),
        logits.new_empty(S, top_logprobs, dtype=torch.int64),
        logits.new_empty(S, top_logprobs, dtype=torch.float32),
    )


register(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds,"
    " Tensor positions, Tensor? history, Tensor? repetition_penalty, int top_logprobs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    triton_impl=_sample_triton,
    cpu_impl=_on_cpu,
    fake=_fake,
    cpu="native",
)


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    history: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    top_logprobs: int = 0,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """One token per row of logits (S, V): (tokens (S,) int64, logprobs (S,) float32, top).

    Per row, all (S,): temperature float32, 0 is greedy, ties go to the lowest id; top_k int64, 0 is off, ties at the
    threshold stay; top_p float32 in (0, 1], keeps the fewest tokens that reach it, and ties; min_p float32 in [0, 1],
    relative to the likeliest token's probability; seeds and positions int64. history (S, V) bool marks the tokens that
    repetition_penalty (S,) float32 makes less likely. Log-probabilities are the model's own: those of the logits as
    given, before any of these options. top is None, or the ids and log-probabilities (S, top_logprobs) of the likeliest
    tokens, by log-probability, ties by id; more than 32 of them cost a sort.
    A logit of -inf is never drawn. A row with no finite logit, a +inf or a NaN takes its first maximum (a NaN, if there
    is one), and its log-probabilities are meaningless.
    Raises ValueError on a shape, dtype or device that does not fit. Has no gradient.
    """
    op = "sample"
    _check.rank(op, "logits", logits, "(S, V)")
    _check.same_kind(op, "logits", logits)
    _check.no_gradient(op, logits=logits)
    S, V = logits.shape
    if not 1 <= V <= MAX_VOCABULARY:
        _check.fail(op, f"logits must have 1..{MAX_VOCABULARY} columns", (S, V))
    floats = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    integers = {"top_k": top_k, "seeds": seeds, "positions": positions}
    for name, tensor in (floats | integers).items():
        if tensor is not None:
            _check.shape(op, name, tensor, (S,), "(S,)")
            _check.index(op, name, tensor, torch.float32 if name in floats else torch.int64, logits)
    if (history is None) != (repetition_penalty is None):
        _check.fail(op, "history and repetition_penalty go together", "one of them")
    if history is not None:
        _check.shape(op, "history", history, (S, V), "(S, V)")
        _check.index(op, "history", history, torch.bool, logits)
    if not 0 <= top_logprobs <= V:
        _check.fail(op, f"top_logprobs must lie in 0..{V}", top_logprobs)
    tokens, logprobs, top_ids, top_values = torch.ops.gpt2_kernels.sample(
        logits, temperature, top_k, top_p, min_p, seeds, positions, history, repetition_penalty, top_logprobs
    )
    return tokens, logprobs, (top_ids, top_values) if top_logprobs else None
