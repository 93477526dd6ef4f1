"""The loss over GPT-2's vocabulary: from given logits (bytes: read once), and from hidden states, with gradients.

FLOPs of the second: three matrix products (logits, dx and dweight), 6 R V C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpt2_kernels as ops
from benchmarks import peers
from benchmarks.measure import Case, Run, against, forward
from benchmarks.timing import Call


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)


def plain_linear(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return plain(F.linear(x, weight), targets)


def with_gradients(function: Callable[..., Tensor]) -> Callable[..., Call]:
    """The loss, and the gradients of all inputs but the targets."""

    def bind(*inputs: Tensor) -> Call:
        leaves = [t.detach().requires_grad_() for t in inputs[:-1]]

        def call() -> Any:
            with torch.enable_grad():
                loss = function(*leaves, inputs[-1])
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]

        return call

    return bind


def cases(run: Run) -> Iterator[Case]:
    gpu = run.device.type == "cuda"
    R, C, V = run.pick(16384, 128, 32), run.pick(768, 768, 64), run.pick(50257, 50257, 101)

    def targets() -> Tensor:
        return torch.randint(V, (R,), device=run.device)

    rivals = {"ours": with_gradients(ops.linear_cross_entropy), "torch": with_gradients(plain_linear)}
    if gpu:
        rivals["compiled"] = peers.compiled(plain_linear, with_gradients)
        rivals["liger"] = with_gradients(peers.liger("liger_fused_linear_cross_entropy"))
    yield Case(
        name=f"linear_cross_entropy with gradients {R}x{C}x{V}",
        make=lambda: (run.random(R, C), 0.05 * run.random(V, C), targets()),
        rivals=rivals,
        check=against(with_gradients(plain_linear)),
        flops=6.0 * R * V * C,
        facts=lambda: {
            "logits_bytes": R * V * run.dtype.itemsize,
            "gradient_bytes": (R + V) * C * run.dtype.itemsize,
        },
    )
    given = {"ours": forward(ops.cross_entropy), "torch": forward(plain)}
    if run.sizes != "tiny":
        given["compiled"] = peers.compiled(plain)
    if gpu:
        given["liger"] = forward(peers.liger("liger_cross_entropy"))
    yield Case(
        name=f"cross_entropy forward {R}x{V}",
        make=lambda: (run.random(R, V), targets()),
        rivals=given,
        check=against(forward(plain)),
        moved=float(R * V * run.dtype.itemsize),
    )


def test_speed(measured) -> None:
    assert measured.right, measured.why
