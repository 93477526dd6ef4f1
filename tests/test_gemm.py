"""linear and gelu_mlp against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerance import DTYPES, assert_accurate, wide
from torch import Tensor
from torch.library import opcheck

import gpt2_kernels as ops
from gpt2_kernels import _native

SHAPES = [
    (1, 96, 80),  # one row: decode
    (5, 64, 64),  # K a multiple of the tile
    (130, 72, 136),  # one past a row tile, ragged everywhere
    (9, 1, 3),  # K = 1
]


def inputs(device: torch.device, dtype: torch.dtype, M: int, K: int, N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(M, K, device=device).to(dtype)
    weight = (torch.randn(N, K, device=device) / K**0.5).to(dtype)
    bias = torch.randn(N, device=device).to(dtype)
    residual = torch.randn(M, N, device=device).to(dtype)
    return x, weight, bias, residual


def torch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    y = F.linear(x, weight, bias)
    if activation:
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(path: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias, _ = inputs(path, dtype, *shape)
    truth = torch_linear(x.double(), weight.double(), bias.double())
    assert_accurate(ops.linear(x, weight, bias), torch_linear(x, weight, bias), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_epilogue(path: torch.device, activation: str, dtype: torch.dtype) -> None:
    x, weight, bias, residual = inputs(path, dtype, 20, 64, 70)
    x = x * 4  # far enough out that both tails of the GELU are met
    truth = torch_linear(x.double(), weight.double(), bias.double(), activation, residual.double())
    theirs = torch_linear(x, weight, bias, activation, residual)
    assert_accurate(ops.linear(x, weight, bias, activation=activation, residual=residual), theirs, truth)


def test_the_two_gelus_differ(path: torch.device) -> None:
    x, weight, bias, _ = inputs(path, torch.float32, 20, 64, 70)
    erf, tanh = (ops.linear(x, weight, bias, activation=a) for a in ("gelu", "gelu_tanh"))
    assert 1e-5 < (erf - tanh).abs().max() < 1e-2


def test_gelu_at_the_ends(path: torch.device) -> None:
    """exp of a large argument must end in 0 or x, never in NaN."""
    x = torch.tensor([[-1e4], [-50.0], [0.0], [50.0], [1e4]], device=path)
    one = torch.ones(1, 1, device=path)
    for activation in ("gelu", "gelu_tanh"):
        y = ops.linear(x, one, activation=activation)
        assert torch.equal(y, x.clamp_min(0)), activation


@pytest.mark.parametrize("layout", ["columns", "transposed", "expanded", "batched"])
def test_layouts(path: torch.device, layout: str) -> None:
    base = torch.randn(12, 3, 80, device=path)
    weight = torch.randn(40, 80, device=path)
    x, w = {
        "columns": (base[:, 0, 8:56], weight[:, 16:64]),
        "transposed": (base[:, 1].t().contiguous().t(), weight.t().contiguous().t()),
        "expanded": (base[:1, :1].expand(4, 3, 80), weight),
        "batched": (base.transpose(0, 1), weight),
    }[layout]
    residual = torch.randn(40, *x.shape[:-1], device=path).movedim(0, -1)  # last axis not dense
    truth = F.linear(x.double(), w.double()) + residual.double()
    assert_accurate(ops.linear(x, w, residual=residual), F.linear(x, w) + residual, truth)


def test_empty(path: torch.device) -> None:
    x, weight, bias, _ = inputs(path, torch.float32, 1, 32, 16)
    assert ops.linear(x[:0], weight, bias).shape == (0, 16)
    assert ops.linear(x, weight[:0], bias[:0]).shape == (1, 0)
    nothing = torch.zeros(1, 0, device=path, requires_grad=True)
    ops.linear(x, weight[:0], residual=nothing).sum().backward()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant(path: torch.device, dtype: torch.dtype, threads: int, request: pytest.FixtureRequest) -> None:
    """A row has the same bits alone and among any others: what the engine's promise rests on.

    On a CPU this is a property of the installed PyTorch, whatever its number of threads, and of our GELU.
    """
    on_kernel = ops.path_of("linear", path.type).startswith("Triton")
    if on_kernel and threads > 1:
        pytest.skip("threads are the CPU path's")
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    # 67 x 500 elements: more than one thread's share of an elementwise operation, which ends inside a row
    x, weight, bias, residual = inputs(path, dtype, 67, 128, 130 if on_kernel else 500)
    activation = "gelu_tanh" if on_kernel or _native.load() else None
    together = ops.linear(x, weight, bias, activation=activation, residual=residual)
    for size in (1, 33) if on_kernel else (1, 2, 3, 5, 6, 11, 16, 33):
        apart = [
            ops.linear(a, weight, bias, activation=activation, residual=r)
            for a, r in zip(x.split(size), residual.split(size))
        ]
        assert torch.equal(torch.cat(apart), together), f"in batches of {size}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_mlp(path: torch.device, approximate: str, dtype: torch.dtype) -> None:
    x, w1, b1, _ = inputs(path, dtype, 6, 48, 96)
    _, w2, b2, residual = inputs(path, dtype, 6, 96, 48)

    def torch_way(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2) + residual

    arguments = (x, w1, b1, w2, b2)
    truth = torch_way(*wide(*arguments, residual))  # type: ignore[arg-type]
    ours = ops.gelu_mlp(*arguments, approximate=approximate, residual=residual)
    assert_accurate(ours, torch_way(*arguments, residual), truth)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(path: torch.device, dtype: torch.dtype, activation: str | None) -> None:
    leaves = [t.requires_grad_() for t in inputs(path, dtype, 10, 24, 40)]
    grad = torch.randn(10, device=path).to(dtype)[:, None].expand(10, 40)  # stride 0, as sums give

    def ours_way(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return ops.linear(x, weight, bias, activation=activation, residual=residual)

    def torch_way(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return torch_linear(x, weight, bias, activation, residual)

    ours = torch.autograd.grad(ours_way(*leaves), leaves, grad)
    theirs = torch.autograd.grad(torch_way(*leaves), leaves, grad)
    exact = wide(*leaves)
    truth = torch.autograd.grad(torch_way(*exact), exact, grad.double())  # type: ignore[arg-type]
    for name, a, b, c in zip(("x", "weight", "bias", "residual"), ours, theirs, truth):
        assert_accurate(a, b, c, factor=3, what=f"gradient of {name}")


def test_opcheck(path: torch.device) -> None:
    x, weight, bias, residual = inputs(path, torch.float32, 4, 32, 24)
    op = torch.ops.gpt2_kernels.linear.default
    opcheck(op, (x, weight, bias, residual, "gelu_tanh", True))
    opcheck(op, (x.view(2, 2, 32), weight, None, None, "", False))


def test_compile(path: torch.device) -> None:
    x, w1, b1, _ = (t.requires_grad_() for t in inputs(path, torch.float32, 4, 32, 48))
    _, w2, b2, _ = (t.requires_grad_() for t in inputs(path, torch.float32, 4, 48, 32))

    def function(x: Tensor) -> Tensor:
        return ops.gelu_mlp(x.sin(), w1, b1, w2, b2, residual=x).sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = (x, w1, b1, w2, b2)
    expected = torch.autograd.grad(function(x), leaves)
    for a, b in zip(torch.autograd.grad(compiled(x), leaves), expected):
        torch.testing.assert_close(a, b)


def test_bad_input(path: torch.device) -> None:
    x, weight, bias, residual = inputs(path, torch.float32, 4, 32, 24)
    for call, message in [
        (lambda: ops.linear(x[:, :31], weight), r"linear: last axis of x must be K = 32, got \(4, 31\)"),
        (lambda: ops.linear(x, weight[0]), r"linear: weight must be \(N, K\), got \(32,\)"),
        (lambda: ops.linear(x, weight, bias[:3]), r"linear: bias must be \(N,\) = \(24,\), got \(3,\)"),
        (lambda: ops.linear(x, weight.half()), r"linear: weight must have the dtype of x"),
        (lambda: ops.linear(x, weight, activation="relu"), r"linear: activation must be .* got 'relu'"),
        (lambda: ops.linear(x, weight, residual=residual[:2]), r"linear: residual must be the shape of the result"),
        (lambda: ops.gelu_mlp(x, weight, bias, weight, bias), r"gelu_mlp: w2 must be \(N, I\)"),
        (lambda: ops.gelu_mlp(x, weight, bias, weight.T, bias, approximate="erf"), r"gelu_mlp: approximate must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
