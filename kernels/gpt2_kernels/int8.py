"""Products with weights in int8, for generation on a CPU.

    quantize      weight[n] = round(w[n] / scale[n]),  scale[n] = max |w[n]| / 127, for each row n of w
    linear_int8   y = activation((q weight^T) scale_x scale + bias) + residual

A row of x is rounded likewise, q = round(x / scale_x) with scale_x = max |row| / 127, so that both factors are int8:
the sum of products is an exact integer, and a row of y has the same bits alone or among any others. What rounding
costs, of a sum of K products: at most K (max |x| / 254 mean |w| + max |w| / 254 mean |x| + max |x| max |w| / 254^2).
Bytes: N K for the weight, a half of bfloat16's. With AMX or AVX-512 VNNI the compiled extension does it in one pass;
elsewhere PyTorch's own product of int8 matrices (oneDNN's) stands between two passes.
Specification: gpt2_kernels.reference.linear_int8. Source: Dettmers et al., 2022, "LLM.int8()", section 2 (row-wise
scales).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2_kernels import _check, _native, _runtime, reference
from gpt2_kernels._operator import register

MAX_K = 65536  # the sums of more products might not fit in 32 bits


def _linear_int8_cpu(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    rows = _check.as_rows(x)
    other = None if residual is None else _check.as_rows(residual)
    shape = (*x.shape[:-1], weight.shape[0])
    if weight.stride(1) == 1 and _runtime.native_products(x):
        bias = None if bias is None else bias.contiguous()
        kind = _check.ACTIVATIONS[activation or None]
        return _check.as_shape(_native.ops().linear_int8(rows, weight, scale.contiguous(), bias, other, kind), shape)
    rounded, x_scale = reference.round_rows(reference.wide(rows))
    y = torch._int_mm(rounded, weight.T).float() * (scale * x_scale)
    if bias is not None:
        y += bias
    if activation and _runtime.native(x):
        _native.ops().gelu_(y, activation == "gelu_tanh")  # PyTorch's rounds differently at the end of a thread's share
    elif activation:
        y = reference.gelu(y, activation)
    return (y if other is None else y + other).to(x.dtype).view(shape)


register(
    "linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, str activation) -> Tensor",
    triton_impl=_linear_int8_cpu,  # there is no kernel: the public function refuses CUDA tensors
    cpu_impl=_linear_int8_cpu,
    fake=lambda x, weight, scale, bias, residual, activation: x.new_empty((*x.shape[:-1], weight.shape[0])),
    cpu="int8",
)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) as (int8 (N, K), scale (N,) float32): weight[n] is about int8[n] * scale[n].

    Raises ValueError where it is not finite, a compiled graph RuntimeError when it runs.
    """
    _check.rank("quantize", "weight", weight, "(N, K)")
    _check.same_kind("quantize", "weight", weight)
    finite = weight.isfinite().all()
    if torch.compiler.is_compiling():  # a graph cannot branch
        torch._assert_async(finite, "quantize: weight must be finite")
    elif not finite:
        _check.fail("quantize", "weight must be finite", "a NaN or an infinity")
    return reference.quantize(weight)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x weight^T scale + bias) + residual: x (..., K), weight (N, K) int8 and scale (N,) from `quantize`.

    bias (N,), residual and result (..., N) in the dtype of x: float32 or bfloat16, on a CPU. activation is None,
    "gelu" (erf) or "gelu_tanh" (GPT-2's). Each row of x is rounded to int8 with a scale of its own. No gradient.
    Raises ValueError on a shape, dtype, device or activation that does not fit.
    """
    op = "linear_int8"
    if activation not in _check.ACTIVATIONS:
        _check.fail(op, "activation must be None, 'gelu' or 'gelu_tanh'", repr(activation))
    if x.device.type not in ("cpu", "meta"):
        _check.fail(op, "x must be on the CPU", x.device)
    if x.dtype not in (torch.float32, torch.bfloat16):
        _check.fail(op, "dtype of x must be float32 or bfloat16", x.dtype)
    _check.rank(op, "weight", weight, "(N, K)")
    N, K = weight.shape
    _check.index(op, "weight", weight, torch.int8, x)
    _check.index(op, "scale", scale, torch.float32, x)
    _check.shape(op, "scale", scale, (N,), "(N,)")
    if not 1 <= K <= MAX_K:
        _check.fail(op, f"K must lie in 1..{MAX_K}", K)
    if x.dim() < 1 or x.shape[-1] != K:
        _check.fail(op, f"last axis of x must be K = {K}", tuple(x.shape))
    _check.same_kind(op, "x", x, bias=bias, residual=residual)
    _check.shape(op, "bias", bias, (N,), "(N,)")
    _check.shape(op, "residual", residual, (*x.shape[:-1], N), "the shape of the result")
    tensors = {"x": x, "bias": bias, "residual": residual}
    _check.no_gradient(op, **{name: t for name, t in tensors.items() if t is not None})
    return torch.ops.gpt2_kernels.linear_int8(x, weight, scale, bias, residual, activation or "")
