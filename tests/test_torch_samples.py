"""PyTorch's own samples for the operators that ours replace, run through ours: forward and gradients against float64.

The samples are those that PyTorch tests itself with (OpInfo). A table here says what is run, what is left out and why:
a sample that is silently dropped, or for a reason that is not listed, fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_accurate, wide
from torch import Tensor

import gpt2_kernels as ops

pytest.importorskip("expecttest")  # PyTorch's samples import it
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.opinfo.core import SampleInput  # noqa: E402


class Work(NamedTuple):
    """One sample as a function of its floating-point tensors."""

    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]  # also the truth, on float64 tensors
    leaves: list[Tensor]
    # of the leaves and the incoming gradient, all float64: the size of the terms that cancel in the result and in each
    # leaf's gradient
    terms: Callable[..., list[float]] = lambda *_: [0.0] * 4


class Skip(NamedTuple):
    """A sample that ours does not take: the reason, and the call that must then raise."""

    reason: str
    call: Callable[[], Any]


def largest(*tensors: Tensor) -> float:
    """Product of the largest magnitudes."""
    return float(torch.stack([t.abs().max() if t.numel() else t.new_zeros(()) for t in tensors]).prod())


def layer_norm(sample: SampleInput) -> Work | Skip:
    shape, *weights = sample.args
    options = sample.kwargs
    leaves = [sample.input, *weights]

    def terms(x: Tensor, *rest: Tensor) -> list[float]:  # (x - mean) rstd, and what is left of the gradient without it
        axes = tuple(range(-len(shape), 0))
        rstd = ((x - x.mean(axes, keepdim=True)).square().mean(axes) + options.get("eps", 1e-5)).rsqrt()
        return [0.0, largest(rstd, *rest), largest(x, rstd, rest[-1]), 0.0]

    if len(shape) > 1:
        # The operator takes one axis: several are merged by hand.
        if options["eps"] < 0:
            return Skip("negative eps", lambda: ops.layer_norm(sample.input, weights[0][0], weights[1][0], **options))
        merged = len(shape)

        def on_one_axis(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            flat = ops.layer_norm(x.flatten(-merged), weight.flatten(), bias.flatten(), **options)
            return flat.view(x.shape)

        return Work(on_one_axis, lambda x, *rest: F.layer_norm(x, shape, *rest, **options), leaves, terms)

    def ours(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return ops.layer_norm(x, x.new_ones(shape) if weight is None else weight, bias, **options)

    return Work(ours, lambda x, *rest: F.layer_norm(x, shape, *rest, **options), leaves, terms)


def attention(sample: SampleInput) -> Work | Skip:
    leaves, options = [sample.input, *sample.args], dict(sample.kwargs)
    if options.get("attn_mask") is not None:
        return Skip("arbitrary mask", lambda: ops.scaled_dot_product_attention(*leaves, **options))
    p = options.pop("dropout_p", 0.0)

    def terms(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[float]:
        """Scores in the hundreds, whose rounding becomes that of the probability, times v or grad; probability times
        (grad v - its mean), times k or q."""
        scale = q.shape[-1] ** -0.5 / (1 - p)
        scores, shares = largest(q.abs() @ k.abs().mT) * scale, largest(grad.abs() @ v.abs().mT) * scale
        return [scores * largest(v), shares * largest(k), shares * largest(q), scores * largest(grad)]

    if not p:
        return Work(
            lambda *t: ops.scaled_dot_product_attention(*t, **options),
            lambda *t: F.scaled_dot_product_attention(*t, **options),
            leaves,
            terms,
        )
    # PyTorch drops other elements than ours. With values from the identity, the same seed shows which.
    seed, S = 7, leaves[2].shape[-2]

    def dropped(*tensors: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return ops.scaled_dot_product_attention(*tensors, dropout_p=p, **options)

    query, key, value = (t.detach() for t in leaves)
    keep = (
        dropped(query, key, torch.eye(S, dtype=value.dtype, device=value.device).expand(*value.shape[:-2], S, S)) != 0
    )

    def with_those_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if options["is_causal"]:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        return (torch.softmax(scores, -1) * keep / (1 - p)) @ v

    return Work(dropped, with_those_dropped, leaves, terms)


def gelu(sample: SampleInput) -> Work | Skip:
    """Ours is the epilogue of `linear`. A weight of 2 P, P a cyclic permutation, and an input halved: both products are
    exact in every dtype, so the sample's own values reach the GELU, and a weight read transposed would show."""
    x, options = sample.input, sample.kwargs
    activation = {"none": "gelu", "tanh": "gelu_tanh"}[options.get("approximate", "none")]
    weight = (2.0 * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).roll(1, 0)).requires_grad_()
    return Work(
        lambda x, weight: ops.linear(x * 0.5, weight, activation=activation),
        lambda x, weight: F.gelu(F.linear(x * 0.5, weight), **options),
        [x, weight],
    )


def linear(sample: SampleInput) -> Work | Skip:
    leaves = [sample.input, *sample.args]
    if leaves[1].dim() == 1 or not leaves[1].shape[1]:
        return Skip("weight of one axis or without columns", lambda: ops.linear(*leaves))
    return Work(ops.linear, F.linear, leaves)


def cross_entropy(sample: SampleInput) -> Work | Skip:
    """PyTorch keeps the classes in the second axis, ours are in the last; our loss is float32 in every dtype."""
    x, options, [targets] = sample.input, dict(sample.kwargs), sample.args

    def refused() -> Tensor:
        return ops.cross_entropy(x, targets, **sample.kwargs)

    if targets.is_floating_point():
        return Skip("probabilities as targets", refused)
    if options.get("weight") is not None:
        return Skip("weights of classes", refused)
    if options.pop("reduction", "mean") != "mean":
        return Skip("reduction other than the mean", refused)
    return Work(
        lambda x: ops.cross_entropy(x.movedim(1, -1), targets, **options),
        lambda x: F.cross_entropy(ops.reference.wide(x), targets, **options),
        [x],
        lambda x, grad: [largest(x), largest(grad)],  # logsumexp - the target's logit
    )


# PyTorch operator -> how ours runs a sample of it, the least samples run, the most samples left out and why. The counts
# are the largest of torch 2.11 to 2.15.
OPERATORS: dict[str, tuple[Callable[[SampleInput], Work | Skip], int, dict[str, int]]] = {
    "nn.functional.layer_norm": (layer_norm, 5, {"negative eps": 1}),
    "nn.functional.scaled_dot_product_attention": (attention, 24, {"arbitrary mask": 1}),
    "nn.functional.gelu": (gelu, 8, {}),
    "nn.functional.linear": (linear, 18, {"weight of one axis or without columns": 7}),
    "nn.functional.cross_entropy": (
        cross_entropy,
        6,
        {"probabilities as targets": 10, "weights of classes": 3, "reduction other than the mean": 2},
    ),
}


def samples(name: str, device: torch.device, dtype: torch.dtype) -> list[SampleInput]:
    [info] = [op for op in op_db if op.name == name and not op.variant_test_name]
    torch.manual_seed(0)
    return list(info.sample_inputs(device, dtype, requires_grad=True))


def check(work: Work, what: str) -> None:
    leaves = [t.detach().requires_grad_() for t in work.leaves]  # detach keeps the layout
    exact = wide(*leaves)
    out, theirs, truth = work.ours(*leaves), work.theirs(*leaves), work.theirs(*exact)
    grad = torch.randn_like(theirs)
    terms = work.terms(*(t.detach() for t in exact), grad.double())
    assert_accurate(out, theirs, truth, terms=terms[0], what=what)
    ours = torch.autograd.grad(out, leaves, grad)
    other = torch.autograd.grad(theirs, leaves, grad)
    truths = torch.autograd.grad(truth, exact, grad.double())
    for i, (a, b, c, size) in enumerate(zip(ours, other, truths, terms[1:])):
        assert_accurate(a, b, c, factor=3, terms=size, what=f"{what}, gradient of input {i}")


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "as given"), (torch.bfloat16, "as given"), (torch.float32, "not contiguous")],
    ids=["float32", "bfloat16", "not contiguous"],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_samples(path: torch.device, name: str, dtype: torch.dtype, layout: str) -> None:
    adapt, least, allowed = OPERATORS[name]
    run, left_out = 0, Counter[str]()
    for number, sample in enumerate(samples(name, path, dtype)):
        work = adapt(sample if layout == "as given" else sample.noncontiguous())
        if isinstance(work, Skip):
            left_out[work.reason] += 1
            with pytest.raises((ValueError, TypeError)):  # left out because it is refused, not because it is wrong
                work.call()
        else:
            check(work, f"{name}, sample {number}")
            run += 1
    print(f"{name}, {dtype}, {layout}: {run} samples run, left out: {dict(left_out) or 'none'}")
    assert run >= least
    assert left_out <= Counter(allowed)
