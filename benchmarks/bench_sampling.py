"""Sampling a token from each row of logits. Bytes: the logits once.

PyTorch has no such operator: the rival is the usual recipe of its functions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import gpt2_kernels as ops
from benchmarks import peers
from benchmarks.measure import Case, Inputs, Run, forward
from benchmarks.timing import Call

TOP_K, TEMPERATURE = 40, 0.8


def ours(logits: Tensor, seeds: Tensor) -> Call:
    one = torch.ones(len(seeds), device=logits.device)
    options = {"temperature": TEMPERATURE * one, "top_k": (TOP_K * one).long(), "top_p": one, "min_p": 0 * one}
    return lambda: ops.sample(logits, **options, seeds=seeds, positions=seeds)[:2]


def recipe(logits: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
    """topk, softmax, multinomial and nothing more: no seed and no k per row."""
    values, indices = logits.float().topk(TOP_K)
    chosen = torch.multinomial(torch.softmax(values / TEMPERATURE, dim=-1), 1)
    tokens = indices.gather(1, chosen)[:, 0]
    return tokens, torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[:, None])[:, 0]


def flashinfer(logits: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
    sampling = peers.package("flashinfer.sampling")
    tokens = sampling.top_k_top_p_sampling_from_logits(logits.float() / TEMPERATURE, TOP_K, 1.0).long()
    return tokens, torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[:, None])[:, 0]


def check(inputs: Inputs, result: tuple[Tensor, ...]) -> float:
    """The log-probability must be the token's own, and the token one of the k likeliest."""
    logits, (tokens, logprobs) = inputs[0].double(), result
    threshold = logits.topk(TOP_K).values[:, -1]
    own = logits.gather(1, tokens[:, None])[:, 0]
    if not (own >= threshold).all():
        raise ValueError(f"sample: a token must be among the {TOP_K} likeliest")
    expected = torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0]
    return ((logprobs.double() - expected).abs().max() / expected.abs().max()).item()


def cases(run: Run) -> Iterator[Case]:
    V = run.pick(50257, 50257, 101)
    for S in run.pick((256, 1, 8, 64, 1024), (1, 8), (2,)):
        yield Case(
            name=f"sample top-k {TOP_K} {S}x{V}",
            make=lambda S=S: (run.random(S, V), torch.arange(S, device=run.device)),
            rivals={"ours": ours, "torch": forward(recipe)}
            | ({"flashinfer": forward(flashinfer)} if run.device.type == "cuda" else {}),
            check=check,
            moved=float(S * V * run.dtype.itemsize),
            units=S,
        )


def test_speed(measured) -> None:
    assert measured.right, measured.why
