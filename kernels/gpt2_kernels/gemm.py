"""Matrix multiplication with a fused epilogue, and the MLP made of two of them; forward and backward.

    linear            y = activation(x weight^T + bias) + residual
    gelu_mlp          y = gelu(x w1^T + b1) w2^T + b2 + residual
    linear_backward   dx = (dy weight) * activation'(pre): through a layer, and through the activation before it

Layout: x (M, K), weight (N, K) as torch stores it; float32 accumulation, one rounding at the store.
FLOPs: 2 M N K each, and as many again for dweight = dy^T x. Bytes, for element size s: (M K + N K + M N) s; unfused,
bias, GELU, GELU' and residual would each read and write M N once more. Training also writes the input of the
activation, M N s more: recomputing it would cost 2 M N K FLOP, which at K = 768 takes four times as long.

Batch-invariant: one kernel, one tile and one summation order whatever M is, so a row of y or dx has the same bits alone
or in any batch. This lets a batching engine promise the same text in every batch (He et al., 2025, "Defeating
Nondeterminism in LLM Inference"). dweight sums over rows, so it has no such promise to keep and uses PyTorch's matmul:
at 768 x 768, its 36 tiles would leave most of a GPU idle without a split that depends on M.
Specification: gpt2_kernels.reference.linear, gelu_mlp.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2_kernels import _check, _linear_decode, _native, _runtime, reference
from gpt2_kernels._gelu import gelu, gelu_derivative
from gpt2_kernels._launch import launch
from gpt2_kernels._operator import OPS, autocast, distinct, register
from gpt2_kernels._runtime import accumulator, tl, triton

# (minimum compute capability, element size) -> (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages); never keyed by M. Nothing
# spills in any case of benchmarks.compile_report, though misaligned rows may; not yet timed on a GPU.
TILES = {
    (100, 2): (128, 64, 64, 8, 3),
    (0, 2): (128, 128, 64, 8, 3),
    (0, 4): (64, 64, 32, 8, 3),
    (0, 8): (16, 16, 16, 4, 1),  # the interpreter's gradcheck
}
GROUP_M = 8  # row tiles that run together, so that a column of weight tiles is read from L2 (grouped ordering)

# From Hopper on the kernel is persistent: two programs per SM loop over all tiles, one's epilogue overlapping the
# other's matmul. Before, one program per tile. The summation order in a tile is the same. Not yet timed on a GPU.
PERSISTENT_FROM, PROGRAMS_PER_SM = 90, 2

# What runs where rows need not be batch-invariant: (element size, whether anything is fused) -> "ours" or "torch"
# (cuBLAS). Not yet timed on a GPU. Reasoning: without an epilogue cuBLAS has nothing to lose; at M = 65,536 and 768 ->
# 3072 a separate GELU reads and writes 0.8 GB, 0.19 ms at 4.3 TB/s, beside a matmul of 0.4 ms at 780 TFLOP/s. In
# float32 the matmul takes 5 ms on the CUDA cores, and the GELU's 0.37 ms is less than cuBLAS's lead there.
FASTER = {
    (2, "plain"): "torch",
    (2, "fused"): "ours",
    (4, "plain"): "torch",
    (4, "fused"): "torch",
}


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K), or (K, N) where WEIGHT_KN
    bias_ptr,  # (N,) or None
    residual_ptr,  # (M, N) or None
    pre_ptr,  # (M, N), contiguous, or None: input of the activation, written in forward, read for its derivative
    y_ptr,  # (M, N), contiguous
    M,
    N,
    K,
    stride_x,
    stride_weight,
    stride_residual,
    ACTIVATION: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    WEIGHT_KN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_PRE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program owns every num_programs-th tile of y and sums each along K from 0 up, BLOCK_K at a time."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first = tile // (GROUP * tiles_n) * GROUP
        rows_here = tl.minimum(tiles_m - first, GROUP)
        m = (first + tile % (GROUP * tiles_n) % rows_here) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile % (GROUP * tiles_n) // rows_here * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        # Rows past the end read row 0 and are never stored: they need no mask in the main loop.
        x_rows = tl.where(m < M, m, 0).to(tl.int64)
        x_tile = x_ptr + x_rows[:, None] * stride_x + k[None, :]  # (BLOCK_M, BLOCK_K)
        if WEIGHT_KN:
            weight_tile = weight_ptr + k.to(tl.int64)[:, None] * stride_weight + n[None, :]  # (BLOCK_K, BLOCK_N)
        else:
            weight_rows = tl.where(n < N, n, 0).to(tl.int64)
            weight_tile = weight_ptr + weight_rows[:, None] * stride_weight + k[None, :]  # (BLOCK_N, BLOCK_K)
        acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        for start in tl.range(0, K, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_tile + start)
            else:
                x = tl.load(x_tile + start, mask=(start + k)[None, :] < K, other=0.0)
            if WEIGHT_KN:
                there = (n < N)[None, :]
                if not EVEN_K:
                    there = there & ((start + k)[:, None] < K)
                weight = tl.load(weight_tile + tl.cast(start, tl.int64) * stride_weight, mask=there, other=0.0)
                acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=ACC)
            else:
                if EVEN_K:
                    weight = tl.load(weight_tile + start)
                else:
                    weight = tl.load(weight_tile + start, mask=(start + k)[None, :] < K, other=0.0)
                acc = tl.dot(x, weight.T, acc, input_precision=PRECISION, out_dtype=ACC)
        inside = (m < M)[:, None] & (n < N)[None, :]
        rows = m.to(tl.int64)[:, None]
        at = rows * N + n[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(ACC)[None, :]
        if DERIVATIVE:
            acc *= gelu_derivative(tl.load(pre_ptr + at, mask=inside, other=0.0).to(ACC), ACTIVATION)
        elif ACTIVATION != 0:
            if HAS_PRE:
                tl.store(pre_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)
            acc = gelu(acc, ACTIVATION)
        if HAS_RESIDUAL:
            acc += tl.load(residual_ptr + rows * stride_residual + n[None, :], mask=inside, other=0.0).to(ACC)
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    pre: Tensor | None,
    activation: str,
    *,
    backward: bool,
) -> Tensor:
    """One launch: x (M, K) against weight (N, K), or (K, N) in the backward pass; last axes of x and residual dense.

    A weight may be dense along either axis: transformers' GPT-2 stores the transpose.
    """
    M, K = x.shape
    if backward:
        weight = weight.T
    N = weight.shape[0]
    weight_kn = _check.transposed(weight)
    weight = weight.T if weight_kn else _check.unit_last_stride(weight)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if not (M and N):
        return y
    arch, size = _runtime.architecture(x.device), x.element_size()
    block_m, block_n, block_k, warps, stages = _check.product_tile(TILES, x)
    programs = _check.cdiv(M, block_m) * _check.cdiv(N, block_n)
    if arch >= PERSISTENT_FROM:
        programs = min(programs, PROGRAMS_PER_SM * _runtime.multiprocessors(x.device))
    even_k = K % block_k == 0
    # On sm_90, 128 registers per thread let two programs share an SM; the other variants would spill.
    plain_enough = even_k and activation != "gelu" and (backward or pre is None) and block_m * block_n <= 128 * 128
    two_fit = arch == 90 and size == 2 and plain_enough
    launch(
        linear_kernel,
        (programs,),
        x,
        weight,
        None if bias is None else bias.contiguous(),
        residual,
        pre,
        y,
        M,
        N,
        K,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        ACTIVATION=_check.ACTIVATIONS[activation or None],
        DERIVATIVE=backward and pre is not None,
        WEIGHT_KN=weight_kn,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_PRE=pre is not None,
        EVEN_K=even_k,
        # tf32 keeps 11 bits of a float32; torch's matmul also defaults to the full 24
        PRECISION="tf32" if size == 2 else "ieee",
        ACC=accumulator(x.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP=GROUP_M,
        num_warps=warps,
        num_stages=stages,
        maxnreg=128 if two_fit else None,
    )
    return y


def _linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keep: bool,
    batch_invariant: bool,
    decode: bool = False,
) -> tuple[Tensor, Tensor]:
    keep = keep and bool(activation)
    rows, N = _check.as_rows(x), weight.shape[0]
    other = None if residual is None else _check.as_rows(residual)
    if decode:
        y = _linear_decode.product(rows, weight, bias, other, activation)
        return y.view(*x.shape[:-1], N), y.new_empty((0, N))
    if not batch_invariant and _torch_is_faster(x, bool(activation) or residual is not None):
        y = F.linear(rows, weight, bias)
        pre = y if keep else y.new_empty((0, N))
        if activation:
            y = reference.gelu(y, activation)
        y = y if other is None else y + other
    else:
        pre = torch.empty((rows.shape[0] if keep else 0, N), dtype=x.dtype, device=x.device)
        kept = pre if keep else None
        y = _product(rows, weight, bias, other, kept, activation, backward=False)
    return y.view(*x.shape[:-1], N), pre


def _torch_is_faster(x: Tensor, fused: bool) -> bool:
    return FASTER.get((x.element_size(), "fused" if fused else "plain")) == "torch"


def _linear_backward_triton(
    grad: Tensor, weight: Tensor, pre: Tensor | None, activation: str, batch_invariant: bool
) -> Tensor:
    if not batch_invariant and _torch_is_faster(grad, pre is not None):
        dx = grad @ weight
        return dx if pre is None else _gelu_backward(dx, pre, activation, batch_invariant)
    kept = None if pre is None else pre.contiguous()
    return _product(_check.unit_last_stride(grad), weight, None, None, kept, activation, backward=True)


# PyTorch's CPU libraries split rows among threads and use another routine, with another summation order, where a
# thread's share ends in fewer than four: with two threads, 5 rows give other bits than 8. Multiples of four never do.
ROW_MULTIPLE = 4


def _product_cpu(rows: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool) -> Tensor:
    M = rows.shape[0]
    if batch_invariant and M % ROW_MULTIPLE:
        rows = F.pad(rows, (0, 0, 0, -M % ROW_MULTIPLE))
    return F.linear(rows, weight, bias)[:M]


def _linear_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keep: bool,
    batch_invariant: bool,
    decode: bool = False,
) -> tuple[Tensor, Tensor]:
    if not batch_invariant and not activation and _runtime.torch_products(x):
        y = _check.as_shape(F.linear(_check.as_rows(x), weight, bias), (*x.shape[:-1], weight.shape[0]))
        return y if residual is None else y.add_(residual), y.new_empty((0, weight.shape[0]))
    if weight.stride(1) == 1 and _runtime.native_products(x):
        other = None if residual is None else _check.as_rows(residual)
        kind, bias = _check.ACTIVATIONS[activation or None], None if bias is None else bias.contiguous()
        y, pre = _native.ops().linear(_check.as_rows(x), weight, bias, other, kind, keep and kind > 0)
        return _check.as_shape(y, (*x.shape[:-1], weight.shape[0])), pre
    y = _product_cpu(x.reshape(-1, x.shape[-1]), weight, bias, batch_invariant)
    pre = y.clone() if keep and activation else y.new_empty((0, y.shape[1]))
    if activation:
        y = _gelu_cpu(y, activation)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if residual is None else y + residual, pre


def _gelu_cpu(y: Tensor, activation: str) -> Tensor:
    # PyTorch's GELU rounds the last few elements of a thread's share differently; the compiled one does not.
    if not _runtime.native(y):
        return reference.gelu(y, activation)
    _native.ops().gelu_(y, activation == "gelu_tanh")
    return y


def _linear_backward_cpu(
    grad: Tensor, weight: Tensor, pre: Tensor | None, activation: str, batch_invariant: bool
) -> Tensor:
    dx = _product_cpu(grad, weight.T, None, batch_invariant)
    return dx if pre is None else _gelu_backward(dx, pre, activation, batch_invariant)


def _gelu_backward(grad: Tensor, pre: Tensor, activation: str, batch_invariant: bool) -> Tensor:
    """grad * gelu'(pre), element by element."""
    if not batch_invariant or grad.device.type != "cpu":
        return torch.ops.aten.gelu_backward(grad, pre, approximate="tanh" if activation == "gelu_tanh" else "none")
    # On a CPU, gelu_backward rounds the last few elements of a thread's share differently; these operations do not.
    x = reference.wide(pre)
    if activation == "gelu_tanh":
        t = torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x))
        slope = 0.5 * (1 + t) + 0.3989422804014327 * (1 + 0.134145 * x * x) * (x * (1 - t * t))
    else:
        slope = 0.5 * (1 + torch.erf(x * 0.7071067811865476)) + 0.3989422804014327 * x * torch.exp(-0.5 * x * x)
    return (reference.wide(grad) * slope).to(grad.dtype)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keep: bool,
    batch_invariant: bool,
    decode: bool = False,
) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    return x.new_empty((*x.shape[:-1], N)), x.new_empty((x.numel() // K if keep and activation else 0, N))


def _fake_backward(grad: Tensor, weight: Tensor, pre: Tensor | None, activation: str, batch_invariant: bool) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1]))


register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool keep, bool batch_invariant,"
    " bool decode=False) -> (Tensor, Tensor)",
    triton_impl=_linear_triton,
    cpu_impl=_linear_cpu,
    fake=_fake,
    cpu="products",
)
register(
    "linear_backward(Tensor grad, Tensor weight, Tensor? pre, str activation, bool batch_invariant) -> Tensor",
    triton_impl=_linear_backward_triton,
    cpu_impl=_linear_backward_cpu,
    fake=_fake_backward,
)


OPS["gelu_mlp"] = "products"  # two linear calls


def _parameter_gradients(
    ctx: Any, at: int, dy: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """dweight = dy^T x and dbias, where inputs `at` and `at` + 1 of the function need gradients; summed in float32.

    dweight has the weight's memory layout: for a weight stored as (K, N), as in transformers' GPT-2, the other layout
    would be copied, element by element, into its .grad.
    """
    dweight = None
    if ctx.needs_input_grad[at]:
        dweight = (x.T @ dy).T if _check.transposed(weight) else dy.T @ x
    dbias = dy.sum(0, dtype=reference.wide(dy[:0]).dtype).to(dy.dtype) if ctx.needs_input_grad[at + 1] else None
    return dweight, dbias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        batch_invariant: bool,
    ) -> Tensor:
        y, pre = torch.ops.gpt2_kernels.linear(x, weight, bias, residual, activation, bool(activation), batch_invariant)
        ctx.save_for_backward(x, weight, pre)
        ctx.options = activation, batch_invariant
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, pre = ctx.saved_tensors
        activation, batch_invariant = ctx.options
        dy = _check.as_rows(grad)
        if activation:
            dy = _gelu_backward(dy, pre, activation, batch_invariant)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.gpt2_kernels.linear_backward(dy, weight, None, "", batch_invariant).view(x.shape)
        dweight, dbias = _parameter_gradients(ctx, 1, dy, _check.as_rows(x), weight)
        return dx, dweight, dbias, grad if ctx.needs_input_grad[3] else None, None, None


class _GeluMLP(torch.autograd.Function):
    """Keeps both the input and the output of the GELU, 2 M I s bytes per layer, so that nothing is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        residual: Tensor | None,
        activation: str,
        batch_invariant: bool,
    ) -> Tensor:
        hidden, pre = torch.ops.gpt2_kernels.linear(x, w1, b1, None, activation, True, batch_invariant)
        ctx.save_for_backward(x, w1, pre, hidden, w2)
        ctx.options = activation, batch_invariant
        return torch.ops.gpt2_kernels.linear(hidden, w2, b2, residual, "", False, batch_invariant)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, pre, hidden, w2 = ctx.saved_tensors
        activation, batch_invariant = ctx.options
        dy = _check.as_rows(grad)
        dx = dw1 = db1 = None
        if any(ctx.needs_input_grad[:3]):
            dpre = torch.ops.gpt2_kernels.linear_backward(dy, w2, pre, activation, batch_invariant)
            dw1, db1 = _parameter_gradients(ctx, 1, dpre, _check.as_rows(x), w1)
            if ctx.needs_input_grad[0]:
                dx = torch.ops.gpt2_kernels.linear_backward(dpre, w1, None, "", batch_invariant).view(x.shape)
        dw2, db2 = _parameter_gradients(ctx, 3, dy, _check.as_rows(hidden), w2)
        return dx, dw1, db1, dw2, db2, grad if ctx.needs_input_grad[5] else None, None, None


def _check_arguments(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, names: tuple[str, str, str]
) -> None:
    x_name, weight_name, bias_name = names
    _check.rank(op, weight_name, weight, "(N, K)")
    if weight.shape[1] < 1:
        _check.fail(op, f"{weight_name} must have at least one column", tuple(weight.shape))
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        _check.fail(op, f"last axis of {x_name} must be K = {weight.shape[1]}", tuple(x.shape))
    _check.same_kind(op, x_name, x, **{weight_name: weight, bias_name: bias, "residual": residual})
    _check.shape(op, bias_name, bias, (weight.shape[0],), "(N,)")
    _check.shape(op, "residual", residual, (*x.shape[:-1], weight.shape[0]), "the shape of the result")


@autocast("lower")
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    batch_invariant: bool = True,
    decode: bool = False,
) -> Tensor:
    """activation(x weight^T + bias) + residual: x (..., K), weight (N, K), bias (N,), residual and result (..., N).

    activation is None, "gelu" (erf) or "gelu_tanh" (GPT-2's). Float32 accumulation; float32 inputs are multiplied in
    full precision. With batch_invariant a row has the same bits whatever the other rows are; without it the fastest
    available routine may be used. decode is for generated tokens: on a GPU it selects a kernel for few rows, also
    batch-invariant, but with its own summation order and no gradient. Its programs synchronise through counters, like
    those of `paged_attention`: a CUDA graph that contains one must not run concurrently with other calls of the two
    launched or captured on the stream where it was captured.
    Differentiable in x, weight, bias and residual.
    Raises ValueError on a shape, dtype, device or activation that does not fit.
    """
    if activation not in _check.ACTIVATIONS:
        _check.fail("linear", "activation must be None, 'gelu' or 'gelu_tanh'", repr(activation))
    _check_arguments("linear", x, weight, bias, residual, ("x", "weight", "bias"))
    inputs = (x, weight, bias, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        _refuse_decode("linear", decode)
        return _Linear.apply(*distinct(*inputs, activation or "", batch_invariant))
    return torch.ops.gpt2_kernels.linear(*inputs, activation or "", False, batch_invariant, decode)[0]


def _refuse_decode(op: str, decode: bool) -> None:
    if decode:
        _check.fail(op, "decode must be without gradients (use torch.no_grad())", "requires_grad=True")


@autocast("lower")
def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    approximate: str = "tanh",
    residual: Tensor | None = None,
    batch_invariant: bool = True,
    decode: bool = False,
) -> Tensor:
    """gelu(x w1^T + b1) w2^T + b2 + residual: x (..., K), w1 (I, K), b1 (I,), w2 (N, I), b2 (N,), result (..., N).

    The GELU runs in the epilogue of the first matmul, the residual (..., N) is added in that of the second; approximate
    is "tanh" (GPT-2's) or "none" (erf). batch_invariant and decode as in `linear`. Differentiable in all six tensors,
    with GELU' in the epilogue of the backward matmul.
    Raises ValueError on a shape, dtype, device or option that does not fit.
    """
    if approximate not in ("tanh", "none"):
        _check.fail("gelu_mlp", "approximate must be 'tanh' or 'none'", repr(approximate))
    _check_arguments("gelu_mlp", x, w1, b1, None, ("x", "w1", "b1"))
    _check.rank("gelu_mlp", "w2", w2, "(N, I)")
    _check.shape("gelu_mlp", "w2", w2, (w2.shape[0], w1.shape[0]), "(N, I)")
    _check.same_kind("gelu_mlp", "x", x, w2=w2, b2=b2, residual=residual)
    _check.shape("gelu_mlp", "b2", b2, (w2.shape[0],), "(N,)")
    _check.shape("gelu_mlp", "residual", residual, (*x.shape[:-1], w2.shape[0]), "the shape of the result")
    activation = "gelu_tanh" if approximate == "tanh" else "gelu"
    inputs = (x, w1, b1, w2, b2, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        _refuse_decode("gelu_mlp", decode)
        return _GeluMLP.apply(*distinct(*inputs, activation, batch_invariant))
    hidden, _ = torch.ops.gpt2_kernels.linear(x, w1, b1, None, activation, False, batch_invariant, decode)
    return torch.ops.gpt2_kernels.linear(hidden, w2, b2, residual, "", False, batch_invariant, decode)[0]
