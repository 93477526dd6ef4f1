"""Choosing the next token from logits: greedy, temperature, top-k, top-p, min-p, repetition penalty.

One uniform number in [0, 1) decides a row, and (seed, position) decides that number, by a counter-based generator: what
is drawn never depends on the batch, on the order of calls or on the device's own random state.
Specification: gpt2_kernels.reference.sample, which is also what computes it, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2_kernels import _check, reference


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
    row_arguments = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        positions=positions,
        history=history,
        repetition_penalty=repetition_penalty,
    )
    if logits.device.type != "cpu" or S <= 1:
        return reference.sample(logits, **row_arguments, top_logprobs=top_logprobs)
    # PyTorch's CPU loops round exp differently in the last few elements of a thread's share, so that a row's bits would
    # depend on its place in the batch. Row by row they do not.
    rows = [
        reference.sample(
            logits[i : i + 1],
            **{name: None if t is None else t[i : i + 1] for name, t in row_arguments.items()},
            top_logprobs=top_logprobs,
        )
        for i in range(S)
    ]
    tokens, logprobs = torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])
    if not top_logprobs:
        return tokens, logprobs, None
    return tokens, logprobs, (torch.cat([r[2][0] for r in rows]), torch.cat([r[2][1] for r in rows]))
