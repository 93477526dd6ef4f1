"""LayerNorm, with and without the residual addition, forward and backward. Bytes: each row read and written once."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

import gpt2_kernels as ops
from benchmarks import peers
from benchmarks.measure import Case, Run, against, backward, both, forward

WIDTHS = (768, 1024, 1280, 1600)  # of the four GPT-2 models


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def plain_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    added = x + residual
    return plain(added, weight, bias), added


def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return peers.liger("liger_layer_norm")(x, weight, bias, 1e-5)


def cases(run: Run) -> Iterator[Case]:
    gpu, size = run.device.type == "cuda", run.dtype.itemsize
    R = run.pick(65536, 2048, 16)
    for C in run.pick(WIDTHS, (768, 1600), (64,)):

        def parameters(C: int = C) -> tuple[Tensor, Tensor]:
            return run.random(C), run.random(C)

        ours_to_others = {"torch": plain, **({"liger": liger} if gpu else {})}
        with_compiler = run.sizes != "tiny" and (gpu or C == 768)  # compiling takes about ten seconds on a CPU
        yield Case(
            name=f"layer_norm forward {R}x{C}",
            make=lambda C=C, p=parameters: (run.random(R, C), *p()),
            rivals={"ours": forward(ops.layer_norm), **{n: forward(f) for n, f in ours_to_others.items()}}
            | ({"compiled": peers.compiled(plain)} if with_compiler else {}),
            check=against(forward(plain)),
            moved=2.0 * R * C * size,
        )
        yield Case(
            name=f"add_layer_norm forward {R}x{C}",
            make=lambda C=C, p=parameters: (run.random(R, C), run.random(R, C), *p()),
            rivals={"ours": forward(ops.add_layer_norm), "torch": forward(plain_add)}
            | ({"compiled": peers.compiled(plain_add)} if with_compiler else {}),
            check=against(forward(plain_add)),
            moved=4.0 * R * C * size,
        )
        yield Case(
            name=f"layer_norm backward {R}x{C}",
            make=lambda C=C, p=parameters: (run.random(R, C), *p(), run.random(R, C)),
            rivals={"ours": backward(ops.layer_norm), **{n: backward(f) for n, f in ours_to_others.items()}}
            | ({"compiled": peers.compiled(plain, backward)} if with_compiler else {}),
            check=against(backward(plain)),
            moved=3.0 * R * C * size,  # x and dy read, dx written
        )
    few, narrow = run.pick(4096, 256, 16), run.pick(768, 768, 64)
    yield Case(
        name=f"layer_norm forward + backward {few}x{narrow}, host included",
        make=lambda: (run.random(few, narrow), run.random(narrow), run.random(narrow), run.random(few, narrow)),
        rivals={"ours": both(ops.layer_norm), "torch": both(plain), **({"liger": both(liger)} if gpu else {})},
        check=against(both(plain)),
        moved=5.0 * few * narrow * size,
        clock="wall",
    )


def test_speed(measured) -> None:
    assert measured.right, measured.why
