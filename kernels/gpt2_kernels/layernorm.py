"""Layer normalisation, alone and fused with the residual addition before it.

    y = (x - mean(x)) * rstd(x) * weight + bias,   rstd = 1 / sqrt(var(x) + eps)       (Ba et al., 2016)

Layout: rows of C elements, C <= 16384; statistics in float32; two passes over registers, one over memory.
Bytes, for R rows of element size s: layer_norm reads and writes 2 R C s (+ 8 R of statistics); add_layer_norm 4 R C s
where the two steps apart take 5 R C s. About 8 FLOP per element: bound by memory everywhere.
Specification: gpt2_kernels.reference.layer_norm, add_layer_norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2_kernels import _check, reference
from gpt2_kernels._runtime import register, tl, triton

MAX_WIDTH = 16384  # one row lies in the registers of one program

# width up to -> warps. sm_90, from compiled code, not yet timed: 128-bit loads, no spills (tests/test_offline.py).
WARPS = ((1024, 4), (4096, 8), (MAX_WIDTH, 16))


@triton.jit
def layer_norm_kernel(
    x_ptr,  # (R, C)
    residual_ptr,  # (R, C) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,) or None
    y_ptr,  # (R, C), contiguous
    total_ptr,  # (R, C), contiguous, or None: x + residual
    mean_ptr,  # (R,)
    rstd_ptr,  # (R,)
    stride_x,
    stride_residual,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One program owns one row and adds it in the tree order of one tl.sum."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    x = tl.load(x_ptr + row * stride_x + c, mask=inside, other=0.0)  # (BLOCK_C,)
    if HAS_RESIDUAL:
        # Rounded as the stored sum is, so that backward, which reads that sum, sees the row that was normalised.
        x = (x.to(tl.float32) + tl.load(residual_ptr + row * stride_residual + c, mask=inside, other=0.0)).to(x.dtype)
        tl.store(total_ptr + row * C + c, x, mask=inside)
    x = x.to(tl.float32)
    mean = tl.sum(x, 0) / C
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    y = centred * rstd * tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * C + c, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    C = x.shape[-1]
    rows, other = _check.as_rows(x), None if residual is None else _check.as_rows(residual)
    R = rows.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y)
    mean = torch.empty(R, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if R:
        layer_norm_kernel[(R,)](
            rows,
            other,
            weight,
            bias,
            y,
            total,
            mean,
            rstd,
            rows.stride(0),
            0 if other is None else other.stride(0),
            eps,
            C=C,
            BLOCK_C=triton.next_power_of_2(C),
            HAS_RESIDUAL=residual is not None,
            HAS_BIAS=bias is not None,
            num_warps=next(warps for width, warps in WARPS if C <= width),
        )
    return y, total, mean, rstd


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = reference.wide  # PyTorch keeps the statistics in the dtype of the input, and backward needs float32
    y, mean, rstd = torch.native_layer_norm(
        wide(x), (x.shape[-1],), wide(weight), None if bias is None else wide(bias), eps
    )
    return y.to(x.dtype).contiguous(), mean.reshape(-1), rstd.reshape(-1)


def _layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = _launch(x, None, weight, bias, eps)
    return y, mean, rstd


def _add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total, mean, rstd = _launch(x, residual, weight, bias, eps)
    assert total is not None
    return y, total, mean, rstd


def _add_layer_norm_cpu(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = torch.add(x, residual).contiguous()
    y, mean, rstd = _on_cpu(total, weight, bias, eps)
    return y, total, mean, rstd


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    R = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(R, dtype=torch.float32), x.new_empty(R, dtype=torch.float32)


def _fake_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd = _fake(x, weight, bias, eps)
    return y, torch.empty_like(y), mean, rstd


register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    triton_impl=_layer_norm_triton,
    cpu_impl=_on_cpu,
    fake=_fake,
)
register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    triton_impl=_add_layer_norm_triton,
    cpu_impl=_add_layer_norm_cpu,
    fake=_fake_add,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = torch.ops.gpt2_kernels.layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = reference.layer_norm_backward(grad, *ctx.saved_tensors)
        return dx, dweight, dbias if ctx.has_bias else None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, total, mean, rstd = torch.ops.gpt2_kernels.add_layer_norm(x, residual, weight, bias, eps)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.has_bias = bias is not None
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = reference.layer_norm_backward(grad, *ctx.saved_tensors)
        dx = dx + grad_total
        return dx, dx, dweight, dbias if ctx.has_bias else None, None


def _check_arguments(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    if x.dim() < 1 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        _check.fail(op, f"last axis of x must lie in 1..{MAX_WIDTH}", tuple(x.shape))
    _check.same_kind(op, "x", x, weight=weight, bias=bias)
    _check.shape(op, "weight", weight, (x.shape[-1],), "(C,)")
    _check.shape(op, "bias", bias, (x.shape[-1],), "(C,)")
    if not eps >= 0.0:
        _check.fail(op, "eps must be at least 0", eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last axis: x (..., C) -> (..., C), in the dtype of x.

    weight and bias are (C,); statistics are float32; C <= 16384. Differentiable in x, weight and bias.
    Raises ValueError on a shape, dtype or device that does not fit. Source: Ba et al., 2016, arXiv:1607.06450.
    """
    _check_arguments("layer_norm", x, weight, bias, eps)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _LayerNorm.apply(x, weight, bias, eps)
    return torch.ops.gpt2_kernels.layer_norm(x, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual) in one pass: x and residual (..., C), weight and bias (C,).

    The sum is rounded to the dtype of x before it is normalised, as the two steps apart would do. Differentiable.
    Raises ValueError on a shape, dtype or device that does not fit.
    """
    _check_arguments("add_layer_norm", x, weight, bias, eps)
    _check.same_kind("add_layer_norm", "x", x, residual=residual)
    _check.shape("add_layer_norm", "residual", residual, tuple(x.shape), "the shape of x")
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    inputs = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _AddLayerNorm.apply(x, residual, weight, bias, eps)
    y, total, _, _ = torch.ops.gpt2_kernels.add_layer_norm(x, residual, weight, bias, eps)
    return y, total
