"""Choosing the next token from logits: greedy, temperature, top-k, top-p, min-p, repetition penalty.

One uniform number in [0, 1) decides a row, and (seed, position) decides that number, by a counter-based generator: what
is drawn never depends on the batch, on the order of calls or on the device's own random state.
Specification: gpt2_kernels.reference.sample, which is also what computes it, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2_kernels import _check, reference
from gpt2_kernels._runtime import OPS

OPS["sample"] = "torch only"


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
    """One token for each row of logits (S, V): (tokens (S,) int64, logprobs (S,) float32, top).

    Per row, all (S,): temperature float32, 0 is greedy; top_k int64, 0 is off, ties at the threshold stay; top_p
    float32 in (0, 1], the fewest tokens that reach it; min_p float32 in [0, 1], times the likeliest token's
    probability; seeds and positions int64. history (S, V) bool marks the tokens that repetition_penalty (S,) float32
    makes less likely. Log-probabilities are the model's own: of the logits as given, before any of these. top is None,
    or the ids and log-probabilities (S, top_logprobs) of the likeliest tokens.
    Raises ValueError on a shape, dtype or device that does not fit.
    """
    op = "sample"
    _check.rank(op, "logits", logits, "(S, V)")
    _check.same_kind(op, "logits", logits)
    S, V = logits.shape
    if V < 1:
        _check.fail(op, "logits must have at least one column", (S, V))
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
    if logits.device.type == "cpu" and S > 1:
        # PyTorch sums one long row with several threads and many rows with a thread each, and the two orders of
        # addition give other bits. One row at a time is always summed in the same order.
        rows = [
            sample(
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
            for i in range(S)
        ]
        top = [r[2] for r in rows if r[2] is not None]
        return (
            torch.cat([r[0] for r in rows]),
            torch.cat([r[1] for r in rows]),
            (torch.cat([ids for ids, _ in top]), torch.cat([values for _, values in top])) if top else None,
        )
    return reference.sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        positions=positions,
        history=history,
        repetition_penalty=repetition_penalty,
        top_logprobs=top_logprobs,
    )
