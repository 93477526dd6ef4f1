"""What the model makes of a text: how likely each of its tokens was, what may come next, and what each attended to.

All of it is exact and comes from the model's own operators: attention from `gpt2_kernels.attention_map`, that is, from
the fused forward's logsumexp. Tokens are lists of ids, 1..n_positions of them; results are plain Python.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import gpt2_kernels as ops
from gpt2.model import GPT2
from gpt2.request import Logprob

ROWS = 64  # of logits, or of averaged attention, that exist at once: a row of logits is 200 KB at 50257 tokens
WHOLE = 128  # up to this length attention to every token is given; beyond it, each row's TOP_M largest shares
TOP_M = 32
LIKELIEST = 1000  # next tokens whose probabilities are given
TEMPERATURES = tuple(round(0.05 * step, 2) for step in range(2, 41))  # 0.1 .. 2.0


@dataclasses.dataclass(frozen=True)
class Next:
    """The distribution of the next token, in a form that a reader can reshape exactly without all of it.

    At temperature t, one of TEMPERATURES, with the top k tokens (0 is all of them), token i has the probability
    exp(l[i] / t - z), where z is t's entry in log_sums if k is 0, and logsumexp(l[:k] / t) otherwise.
    """

    tokens: list[int]  # likeliest first
    logprobs: list[float]
    log_sums: list[float]  # for each of TEMPERATURES: logsumexp over the whole vocabulary of logprob / temperature


@dataclasses.dataclass(frozen=True)
class Attention:
    """Row i: the tokens that token i attends to, largest share first, and their shares."""

    keys: list[list[int]]
    shares: list[list[float]]
    whole: bool  # every token that row i can see is there; else only its TOP_M


@torch.no_grad()
def score(model: GPT2, tokens: list[int], top: int = 0) -> list[Logprob]:
    """Log-probability of each token but the first, given those before it, and the `top` likeliest at its place."""
    return _score(model, tokens, model.hidden(_row(model, tokens))[0], top)


@torch.no_grad()
def look(model: GPT2, tokens: list[int]) -> tuple[list[Logprob], Next]:
    """`score` of the tokens, and what may come after them."""
    hidden = model.hidden(_row(model, tokens))[0]  # (T, C)
    logprobs = torch.log_softmax(model.logits(hidden[-1:])[0].double(), dim=-1)  # (V,)
    values, ids = logprobs.topk(min(LIKELIEST, len(logprobs)))
    temperatures = torch.tensor(TEMPERATURES, dtype=torch.float64, device=logprobs.device)
    log_sums = torch.logsumexp(logprobs / temperatures[:, None], dim=-1)
    return _score(model, tokens, hidden, 0), Next(ids.tolist(), values.tolist(), log_sums.tolist())


def _score(model: GPT2, tokens: list[int], hidden: Tensor, top: int) -> list[Logprob]:
    found = []
    for first in range(0, len(tokens) - 1, ROWS):
        targets = torch.tensor(tokens[first + 1 : first + 1 + ROWS], device=model.device)
        logprobs = torch.log_softmax(model.logits(hidden[first : first + len(targets)]).float(), dim=-1)
        own = logprobs.gather(1, targets[:, None])[:, 0].tolist()
        values, ids = (part.tolist() for part in logprobs.topk(top))
        found += [Logprob(t, p, tuple(zip(i, v))) for t, p, i, v in zip(targets.tolist(), own, ids, values)]
    return found


@torch.no_grad()
def attention(model: GPT2, tokens: list[int], layer: int | None = None, head: int | None = None) -> Attention:
    """What each token attends to in one layer and head; None averages over all layers, or over all heads."""
    T = len(tokens)
    top_m = min(T, TOP_M if T > WHOLE else T)
    layers = model.config.n_layer if layer is None else 1
    mean = torch.zeros((T, T) if layers > 1 or head is None else (0, 0), device=model.device)
    result: list[Tensor] = []

    def watch(at: int, q: Tensor, k: Tensor, scale: float, lse: Tensor) -> None:
        if layer is not None and at != layer:
            return
        if not mean.numel():  # one head of one layer: its largest shares, without the map
            result[:] = (part[0, 0] for part in ops.attention_map(q, k, lse, heads=head, top_m=top_m, scale=scale))
            return
        for first in range(0, T, ROWS):
            rows = range(first, min(first + ROWS, T))
            shares = ops.attention_map(q, k, lse, heads=head, rows=rows, scale=scale)  # (1, heads, rows, T)
            assert isinstance(shares, Tensor)
            mean[first : first + ROWS] += shares[0].mean(0) / layers

    model.hidden(_row(model, tokens), watch=watch)
    if not result:
        ranked = mean.sort(dim=-1, descending=True, stable=True)
        result = [ranked.indices[:, :top_m], ranked.values[:, :top_m]]
    keys, shares = ([row[: i + 1] for i, row in enumerate(part.tolist())] for part in result)  # later tokens have 0
    return Attention(keys, shares, whole=top_m == T)


def _row(model: GPT2, tokens: list[int]) -> Tensor:
    return torch.tensor([tokens], device=model.device)
