"""linear with its fused epilogue at GPT-2's shapes, and the MLP forward and backward. FLOPs: 2 M K N per product."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpt2_kernels as ops
from benchmarks import peers
from benchmarks.measure import Case, Run, against, both, forward


def plain_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def plain_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(plain_gelu(x, w1, b1), w2, b2)


def _ours(function: Any, batch_invariant: bool, **options: Any) -> Any:
    return lambda *inputs: function(*inputs, batch_invariant=batch_invariant, **options)


def cases(run: Run) -> Iterator[Case]:
    gpu = run.device.type == "cuda"
    M, C, V = run.pick(65536, 512, 32), run.pick(768, 768, 64), run.pick(50257, 50257, 101)
    shapes = (
        (M, C, 4 * C, "gelu_tanh"),  # MLP up-projection
        (M, 4 * C, C, None),  # MLP down-projection
        (M, C, 3 * C, None),  # QKV projection
        (M, C, C, None),  # attention output projection
        (M // 8, C, V, None),  # logits
    )
    for i, (rows, K, N, activation) in enumerate(shapes):
        plain = plain_gelu if activation else F.linear
        rivals = {
            "ours": forward(_ours(ops.linear, False, activation=activation)),
            "batch invariant": forward(_ours(ops.linear, True, activation=activation)),
            "torch": forward(plain),
        }
        if gpu or (i == 0 and run.sizes != "tiny"):
            rivals["compiled"] = peers.compiled(plain)
        if gpu and i == 0:
            rivals["compiled, max-autotune"] = peers.compiled(plain, mode="max-autotune-no-cudagraphs")
        yield Case(
            name=f"linear {rows}x{K}x{N} {activation or 'plain'}",
            make=lambda rows=rows, K=K, N=N: (run.random(rows, K), run.random(N, K), run.random(N)),
            rivals=rivals,
            check=against(forward(plain)),
            flops=2.0 * rows * K * N,
            moved=float(rows * K + K * N + rows * N) * run.dtype.itemsize,
            facts=lambda K=K, N=N, activation=activation: {"same_bits": _same_bits(run, K, N, activation)},
        )
    for rows, K, N in _decoded(run):
        yield Case(
            name=f"decode product {rows}x{K}x{N}",
            make=lambda rows=rows, K=K, N=N: (run.random(rows, K), run.random(N, K), run.random(N)),
            rivals={
                "ours": forward(functools.partial(ops.linear, decode=True)),
                "a prompt's": forward(ops.linear),
                "torch": forward(F.linear),
            },
            check=against(forward(F.linear)),
            flops=2.0 * rows * K * N,
            moved=float(rows * K + K * N + rows * N) * run.dtype.itemsize,
        )
    mlp = {
        "ours": both(_ours(ops.gelu_mlp, False)),
        "batch invariant": both(_ours(ops.gelu_mlp, True)),
        "torch": both(plain_mlp),
    }
    if gpu:
        mlp["compiled"] = peers.compiled(plain_mlp, both)
    shapes_of_mlp = ((M, C), (4 * C, C), (4 * C,), (C, 4 * C), (C,), (M, C))
    yield Case(
        name=f"gelu_mlp forward + backward {M}x{C}",
        make=lambda: tuple(run.random(*shape) for shape in shapes_of_mlp),
        rivals=mlp,
        check=against(both(plain_mlp)),
        flops=3 * 16.0 * M * C * C,
    )


def _decoded(run: Run) -> list[tuple[int, int, int]]:
    """Products of decode steps, (sequences, K, N): those of a layer of the 124M model, at batch 1 and at more."""
    if run.device.type != "cuda":  # on a CPU they are the products above
        return []
    layer = [(768, 2304), (768, 768), (768, 3072), (3072, 768), (768, 50257)]
    gpu = [(rows, K, N) for rows in (1, 64, 256) for K, N in layer]
    return run.pick(gpu, [], [(3, 256, 64)])


def _same_bits(run: Run, K: int, N: int, activation: str | None) -> bool:
    """Whether rows have the same bits alone as among others: 1, 3 and 64 of 300."""
    x, weight, bias = run.random(300, K), run.random(N, K), run.random(N)
    whole = ops.linear(x, weight, bias, activation=activation)
    return all(torch.equal(whole[:n], ops.linear(x[:n], weight, bias, activation=activation)) for n in (1, 3, 64))


def test_speed(measured) -> None:
    assert measured.right, measured.why
