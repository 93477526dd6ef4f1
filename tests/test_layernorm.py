"""layer_norm and add_layer_norm against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerance import DTYPES, assert_accurate, wide
from torch import Tensor
from torch.library import opcheck

import gpt2_kernels as ops

WIDTHS = [
    1,  # variance 0: y is the bias
    33,  # far below a power of two
    768,  # GPT-2
    769,  # one past it: rows start at odd addresses
    1600,  # GPT-2 XL, not a power of two
]


def inputs(device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    C = shape[-1]
    x = (3 * torch.randn(shape, device=device) + 1).to(dtype)
    weight = (1 + 0.5 * torch.randn(C, device=device)).to(dtype)
    bias = torch.randn(C, device=device).to(dtype)
    return x, weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", WIDTHS)
def test_forward(path: torch.device, C: int, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(path, dtype, 3, 2, C)
    truth = F.layer_norm(x.double(), (C,), weight.double(), bias.double())
    assert_accurate(ops.layer_norm(x, weight, bias), F.layer_norm(x, (C,), weight, bias), truth)


def test_widest_row(path: torch.device) -> None:
    x, weight, bias = inputs(path, torch.float32, 1, 16384)
    truth = F.layer_norm(x.double(), (16384,), weight.double(), bias.double())
    assert_accurate(ops.layer_norm(x, weight, bias), F.layer_norm(x, (16384,), weight, bias), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_forward(path: torch.device, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(path, dtype, 5, 100)
    residual = torch.randn_like(x)
    y, total = ops.add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)  # one rounding, as PyTorch's
    assert torch.equal(y, ops.layer_norm(total, weight, bias))  # and it is the rounded sum that is normalised
    truth = F.layer_norm(total.double(), (100,), weight.double(), bias.double())
    assert_accurate(y, F.layer_norm(total, (100,), weight, bias), truth)


def test_no_bias_and_eps(path: torch.device) -> None:
    x, weight, _ = inputs(path, torch.float32, 4, 64)
    x = x * 1e-3  # variance near eps, so that a wrong eps shows
    truth = F.layer_norm(x.double(), (64,), weight.double(), None, 1e-6)
    assert_accurate(ops.layer_norm(x, weight, eps=1e-6), F.layer_norm(x, (64,), weight, None, 1e-6), truth)


def test_large_mean_does_not_cancel(path: torch.device) -> None:
    """E[x^2] - E[x]^2 would lose every digit here: the variance is taken from the centred row."""
    x, weight, bias = inputs(path, torch.float32, 4, 256)
    x = x + 1e4
    truth = F.layer_norm(x.double(), (256,), weight.double(), bias.double())
    assert_accurate(ops.layer_norm(x, weight, bias), F.layer_norm(x, (256,), weight, bias), truth, factor=4)


@pytest.mark.parametrize("layout", ["columns", "transposed", "expanded", "rows", "last_axis_strided"])
def test_layouts(path: torch.device, layout: str) -> None:
    base, weight, bias = inputs(path, torch.float32, 6, 8, 48)
    x = {
        "columns": base[..., 5:37],
        "transposed": base.transpose(0, 1),
        "expanded": base[:1].expand(4, 8, 48),
        "rows": base[::2, 1:5],
        "last_axis_strided": base[..., ::2],
    }[layout]
    C = x.shape[-1]
    y = ops.layer_norm(x, weight[:C], bias[:C])
    truth = F.layer_norm(x.double(), (C,), weight[:C].double(), bias[:C].double())
    assert_accurate(y, F.layer_norm(x, (C,), weight[:C], bias[:C]), truth)


def test_strided_weight(path: torch.device) -> None:
    x, weight, bias = inputs(path, torch.float32, 3, 64)
    weight, bias = weight.repeat_interleave(2)[::2], bias.repeat_interleave(3)[::3]
    truth = F.layer_norm(x.double(), (64,), weight.double(), bias.double())
    assert_accurate(ops.layer_norm(x, weight, bias), F.layer_norm(x, (64,), weight, bias), truth)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_empty(path: torch.device, shape: tuple[int, ...]) -> None:
    x, weight, bias = inputs(path, torch.float32, *shape)
    assert ops.layer_norm(x, weight, bias).shape == shape


def test_rows_do_not_depend_on_each_other(path: torch.device) -> None:
    x, weight, bias = inputs(path, torch.float32, 9, 768)
    together = ops.layer_norm(x, weight, bias)
    alone = torch.cat([ops.layer_norm(row, weight, bias) for row in x.split(1)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_gradients(path: torch.device, dtype: torch.dtype, with_bias: bool) -> None:
    x, weight, bias = inputs(path, dtype, 7, 96)
    residual = torch.randn_like(x)
    leaves = [x, residual, weight, bias if with_bias else None]
    for t in leaves:
        if t is not None:
            t.requires_grad_()
    grad_y = torch.randn(7, 96, device=path).to(dtype)
    grad_total = torch.randn(7, device=path).to(dtype)[:, None].expand(7, 96)  # stride 0, as sums give

    def torch_way(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, (96,), weight, bias), total

    def gradients(function, tensors: list, grads: tuple) -> list[Tensor]:  # noqa: ANN001
        wanted = [t for t in tensors if t is not None]
        return list(torch.autograd.grad(function(*tensors), wanted, grads))

    ours = gradients(ops.add_layer_norm, leaves, (grad_y, grad_total))
    theirs = gradients(torch_way, leaves, (grad_y, grad_total))
    truth = gradients(torch_way, list(wide(*leaves)), (grad_y.double(), grad_total.double()))
    for name, a, b, c in zip(("x", "residual", "weight", "bias"), ours, theirs, truth):
        assert_accurate(a, b, c, factor=3, what=f"gradient of {name}")


def test_opcheck(path: torch.device) -> None:
    x, weight, bias = inputs(path, torch.float32, 4, 32)
    opcheck(torch.ops.gpt2_kernels.layer_norm.default, (x, weight, bias, 1e-5))
    opcheck(torch.ops.gpt2_kernels.add_layer_norm.default, (x, x.clone(), weight, None, 1e-5))


def test_compile(path: torch.device) -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(path, torch.float32, 4, 32))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, total = ops.add_layer_norm(ops.layer_norm(x.sin(), weight, bias), x, weight, bias)
        return (y * total).sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(x, weight, bias), (x, weight, bias))
    got = torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_bad_input(path: torch.device) -> None:
    x, weight, bias = inputs(path, torch.float32, 4, 32)
    for arguments, message in [
        ((x, weight[:31]), r"layer_norm: weight must be \(C,\) = \(32,\), got \(31,\)"),
        ((x, weight, bias.double()), r"layer_norm: bias must have the dtype of x"),
        (
            (x.double(), weight.double()),
            r"layer_norm: dtype of x must be float32, float16 or bfloat16, got torch.float64",
        ),
        ((torch.empty(2, 16385, device=path), weight), r"layer_norm: last axis of x must lie in 1..16384"),
        ((x, weight, bias, -1.0), r"layer_norm: eps must be at least 0, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.layer_norm(*arguments)
    with pytest.raises(ValueError, match=r"add_layer_norm: residual must be the shape of x"):
        ops.add_layer_norm(x, x[:3], weight, bias)
