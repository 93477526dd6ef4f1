"""linear_int8 on both of its CPU paths: the reference's numbers, the same bits in any company, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gpt2_kernels as ops
from gpt2_kernels import _native, _runtime, reference


@pytest.fixture(params=["native", "torch"])
def cpu(request: pytest.FixtureRequest):
    """The compiled extension, and PyTorch's own int8 product."""
    if request.param == "native" and not _native.load():
        pytest.skip(_native.status())
    torch.manual_seed(0)
    with _runtime.force(request.param):
        yield request.param


def inputs(M: int, K: int, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight, scale = ops.quantize(torch.randn(N, K) * K**-0.5)
    return torch.randn(M, K).to(dtype), weight, scale, torch.randn(N).to(dtype), torch.randn(M, N).to(dtype)


def test_quantize_is_within_half_a_step() -> None:
    weight = torch.randn(50, 33)
    weight[7] = 0.0
    rounded, scale = ops.quantize(weight)
    assert rounded.dtype == torch.int8 and scale.shape == (50,)
    error = (rounded.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= 0.5001 * scale[:, None]).all() and (rounded[7] == 0).all()
    assert (rounded.abs().amax(1) == torch.where(scale > 0, 127, 0)).all()
    with pytest.raises(ValueError, match="quantize: weight must be finite, got a NaN or an infinity"):
        ops.quantize(torch.full((2, 2), torch.nan))


def test_quantize_compiles_whole() -> None:
    """Whether the weight is finite is asserted in the graph; a branch on it would break the graph."""
    torch._dynamo.reset()
    compiled = torch.compile(ops.quantize, fullgraph=True, backend="aot_eager")
    weight = torch.randn(6, 5)
    for ours, expected in zip(compiled(weight), ops.quantize(weight)):
        assert torch.equal(ours, expected)
    with pytest.raises(RuntimeError, match="quantize: weight must be finite"):
        compiled(weight / 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M, K, N", [(1, 768, 100), (3, 101, 7), (70, 96, 130), (0, 4, 4)])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_equals_the_reference(cpu: str, dtype: torch.dtype, M: int, K: int, N: int, activation: str | None) -> None:
    x, weight, scale, bias, residual = inputs(M, K, N, dtype)
    ours = ops.linear_int8(x, weight, scale, bias, activation=activation, residual=residual)
    expected = reference.linear_int8(x, weight, scale, bias, activation=activation, residual=residual)
    # bits may differ where float32 epilogues round differently, and bfloat16 by one rounding of that
    relative, absolute = (1e-5, 1e-5) if dtype == torch.float32 else (2**-7, 1e-2)
    torch.testing.assert_close(ours, expected, rtol=relative, atol=absolute)
    assert ours.dtype == dtype


def test_error_stays_within_the_bound_of_rounding(cpu: str) -> None:
    """The bound in the docstring of gpt2_kernels.int8, for each element, against float64."""
    x, w = torch.randn(9, 300), torch.randn(40, 300)
    weight, scale = ops.quantize(w)
    error = (ops.linear_int8(x, weight, scale).double() - x.double() @ w.double().T).abs()
    top_x, top_w = x.abs().amax(1)[:, None].double(), w.abs().amax(1)[None].double()
    mean_x, mean_w = x.abs().mean(1)[:, None].double(), w.abs().mean(1)[None].double()
    bound = 300 * (top_x * mean_w / 254 + top_w * mean_x / 254 + top_x * top_w / 254**2)
    assert (error <= bound).all() and (error.norm() / (x.double() @ w.double().T).norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_have_the_same_bits_in_any_company(cpu: str, dtype: torch.dtype) -> None:
    x, weight, scale, bias, residual = inputs(70, 300, 90, dtype)
    activation = "gelu_tanh" if cpu == "native" else None  # PyTorch's GELU rounds by position; the extension's does not
    whole = ops.linear_int8(x, weight, scale, bias, activation=activation, residual=residual)
    for first, last in [(0, 1), (69, 70), (3, 5), (7, 10), (1, 66)]:
        rows = slice(first, last)
        part = ops.linear_int8(x[rows], weight, scale, bias, activation=activation, residual=residual[rows])
        assert torch.equal(part, whole[first:last]), (first, last)


def test_strides_and_leading_axes(cpu: str) -> None:
    x, weight, scale, bias, _ = inputs(12, 64, 40, torch.float32)
    expected = ops.linear_int8(x, weight, scale, bias)
    folded = x.view(3, 4, 64).transpose(0, 1)
    assert torch.equal(ops.linear_int8(folded, weight, scale, bias), expected.view(3, 4, 40).transpose(0, 1))
    assert torch.equal(ops.linear_int8(x, weight.T.contiguous().T, scale, bias), expected)


def test_refusals() -> None:
    x, weight, scale, bias, residual = inputs(3, 8, 4, torch.float32)
    for arguments, options, message in [
        ((x.half(), weight, scale), {}, "dtype of x must be float32 or bfloat16, got torch.float16"),
        ((x, weight.float(), scale), {}, "weight must be torch.int8, got torch.float32"),
        ((x, weight, scale[:3]), {}, r"scale must be \(N,\) = \(4,\), got \(3,\)"),
        ((x[:, :7], weight, scale), {}, r"last axis of x must be K = 8, got \(3, 7\)"),
        ((x, weight, scale, bias.bfloat16()), {}, "bias must have the dtype of x"),
        ((x, weight, scale), {"residual": residual[:2]}, "residual must be the shape of the result"),
        ((x, weight, scale), {"activation": "relu"}, "activation must be None, 'gelu' or 'gelu_tanh', got 'relu'"),
        ((x.requires_grad_(), weight, scale), {}, "x must not require a gradient"),
    ]:
        with pytest.raises(ValueError, match=f"linear_int8: {message}"):
            ops.linear_int8(*arguments, **options)
        x = x.detach()
    huge = torch.zeros(1, 65537)
    with pytest.raises(ValueError, match="linear_int8: K must lie in 1..65536, got 65537"):
        ops.linear_int8(huge, huge.to(torch.int8), torch.ones(1))


def test_opcheck(cpu: str) -> None:
    x, weight, scale, bias, residual = inputs(3, 16, 8, torch.float32)
    torch.library.opcheck(torch.ops.gpt2_kernels.linear_int8.default, (x, weight, scale, bias, residual, "gelu_tanh"))
