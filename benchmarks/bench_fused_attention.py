"""Causal attention, forward, head dimension 64. FLOPs: two matrix products, half masked away: 2 B H T^2 D."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import gpt2_kernels as ops
from benchmarks import peers
from benchmarks.measure import Case, Run, against, forward

D = 64


def shapes(run: Run) -> list[tuple[int, int, int]]:
    """(B, T, H): on a GPU 16k tokens at every length, GPT-2's own shape first, then the largest GPT-2's 25 heads."""
    gpu = [(16, 1024, 12), (1, 16384, 12), (4, 4096, 12), (8, 2048, 12), (32, 512, 12), (128, 128, 12), (2, 8192, 12)]
    return run.pick([*gpu, (16, 1024, 25)], [(1, 128, 12), (1, 512, 12), (1, 1024, 12)], [(1, 32, 2)])


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For tensors (B, T, H, D), in their own dtype."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def two_heads(t: Tensor) -> Tensor:
    """The part compared with float64, whose scores for all heads would not fit; heads are independent."""
    return t[:1, ..., :2, :]


def name_of(run: Run, what: str, B: int, T: int, H: int) -> str:
    return f"{what} B={B} T={T} H={H} D={D} {str(run.dtype).removeprefix('torch.')}"


def cases(run: Run) -> Iterator[Case]:
    for B, T, H in shapes(run):
        yield Case(
            name=name_of(run, "attention forward", B, T, H),
            make=lambda B=B, T=T, H=H: run.random(B, T, 3, H, D).unbind(2),  # views of a fused projection
            rivals={"ours": forward(ops.attention), **peers.attention_rivals(run, forward)},
            check=against(forward(plain), two_heads),
            flops=2.0 * B * H * T * T * D,
            moved=4.0 * B * T * H * D * run.dtype.itemsize,  # q, k, v and the output
        )


def test_speed(measured) -> None:
    assert measured.right, measured.why
