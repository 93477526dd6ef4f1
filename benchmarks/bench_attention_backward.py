"""The backward pass of causal attention alone. FLOPs: 5 matrix products, where the forward pass has 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

import gpt2_kernels as ops
from benchmarks import peers
from benchmarks.bench_fused_attention import D, name_of, plain, shapes, two_heads
from benchmarks.measure import Case, Run, against, backward


def cases(run: Run) -> Iterator[Case]:
    for B, T, H in shapes(run):
        yield Case(
            name=name_of(run, "attention backward", B, T, H),
            make=lambda B=B, T=T, H=H: (*run.random(B, T, 3, H, D).unbind(2), run.random(B, T, H, D)),
            rivals={"ours": backward(ops.attention), **peers.attention_rivals(run, backward)},
            check=against(backward(plain), two_heads),
            flops=5.0 * B * H * T * T * D,
            moved=8.0 * B * T * H * D * run.dtype.itemsize,  # q, k, v, out, its gradient; dq, dk, dv
        )
    B, T, H = shapes(run)[0]
    yield Case(
        name=name_of(run, "attention_qkvpacked backward", B, T, H),
        make=lambda: (run.random(B, T, 3, H, D), run.random(B, T, H, D)),
        rivals={"ours": backward(ops.attention_qkvpacked), "parts put together": backward(_parts(ops.attention))},
        check=against(backward(_parts(plain)), two_heads),
        flops=5.0 * B * H * T * T * D,
        moved=8.0 * B * T * H * D * run.dtype.itemsize,
    )


def _parts(attention: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    """Attention of the three parts of one projection; autograd puts their gradients together."""
    return lambda qkv: attention(*qkv.unbind(2))


def test_speed(measured) -> None:
    assert measured.right, measured.why
