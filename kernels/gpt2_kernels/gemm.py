"""Matrix multiplication with a fused epilogue, and the MLP of two of them.

    linear    y = activation(x weight^T + bias) + residual
    gelu_mlp  y = gelu(x w1^T + b1) w2^T + b2 + residual

Layout: x (M, K), weight (N, K) as torch keeps it; float32 accumulation, one rounding at the store.
FLOPs: 2 M N K. Bytes of element size s: (M K + N K + M N) s, where bias, GELU and residual apart would read and write
M N once more each.

One kernel, one tile, one order of additions whatever M is: a row of y has the same bits computed alone or among any
others. That is what lets a batch engine promise the same text in every batch (He et al., 2025, "Defeating
Nondeterminism in LLM Inference").
Specification: gpt2_kernels.reference.linear, gelu_mlp.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2_kernels import _check, _native, _runtime, reference
from gpt2_kernels._runtime import OPS, autocast, register, tl, triton

ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2}

# element size -> (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages); never keyed by M. Compiled for sm_80, sm_90 and sm_100
# without spills (tests/test_offline.py); not yet timed on a GPU.
TILES = {2: (128, 128, 64, 8, 3), 4: (64, 64, 32, 4, 3)}
GROUP_M = 8  # row tiles that run together, so that a column of weight tiles is read from L2


@triton.jit
def _gelu(x, ACTIVATION: tl.constexpr):
    """x in float32; 1 is the erf form, 2 the tanh form as x * sigmoid(2u), since 0.5 (1 + tanh u) = sigmoid(2u)."""
    if ACTIVATION == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    return x / (1.0 + tl.exp2(u * -2.8853900817779268))  # -2 log2(e)


@triton.jit
def linear_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    residual_ptr,  # (M, N) or None
    y_ptr,  # (M, N), contiguous
    M,
    N,
    K,
    stride_x,
    stride_weight,
    stride_residual,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program owns one tile of y and adds along K from 0 up, BLOCK_K at a time."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP * tiles_n) * GROUP
    rows_here = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + pid % (GROUP * tiles_n) % rows_here
    tile_n = pid % (GROUP * tiles_n) // rows_here

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end read row 0 and are never stored: loads of the main loop need no mask.
    x_rows = tl.where(m < M, m, 0).to(tl.int64)
    weight_rows = tl.where(n < N, n, 0).to(tl.int64)
    x_tile = x_ptr + x_rows[:, None] * stride_x + k[None, :]  # (BLOCK_M, BLOCK_K)
    weight_tile = weight_ptr + weight_rows[:, None] * stride_weight + k[None, :]  # (BLOCK_N, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_tile + start)
            weight = tl.load(weight_tile + start)
        else:
            x = tl.load(x_tile + start, mask=(start + k)[None, :] < K, other=0.0)
            weight = tl.load(weight_tile + start, mask=(start + k)[None, :] < K, other=0.0)
        acc = tl.dot(x, weight.T, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != 0:
        acc = _gelu(acc, ACTIVATION)
    inside = (m < M)[:, None] & (n < N)[None, :]
    rows = m.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + rows * stride_residual + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * N + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


def _linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, batch_invariant: bool
) -> Tensor:
    del batch_invariant  # this kernel always is
    N, K = weight.shape
    rows = _check.as_rows(x)
    weight = _check.unit_last_stride(weight)
    other = None if residual is None else _check.as_rows(residual)
    M = rows.shape[0]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if M and N:
        block_m, block_n, block_k, warps, stages = TILES[x.element_size()]
        linear_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
            rows,
            weight,
            None if bias is None else bias.contiguous(),
            other,
            y,
            M,
            N,
            K,
            rows.stride(0),
            weight.stride(0),
            0 if other is None else other.stride(0),
            ACTIVATION=ACTIVATIONS[activation or None],
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            EVEN_K=K % block_k == 0,
            # tf32 keeps 11 bits of a float32; torch's own default for matmul is the full 24 as well
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP=GROUP_M,
            num_warps=warps,
            num_stages=stages,
        )
    return y


# PyTorch's CPU libraries cut the rows among threads and take another routine, with another order of additions, where a
# thread's share ends in fewer than four: with two threads, 5 rows give other bits than 8. Multiples of four never do.
ROW_MULTIPLE = 4


def _linear_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, batch_invariant: bool
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    M = rows.shape[0]
    if batch_invariant and M % ROW_MULTIPLE:
        rows = F.pad(rows, (0, 0, 0, -M % ROW_MULTIPLE))
    y = F.linear(rows, weight, bias)[:M]
    if activation:
        y = _gelu_cpu(y, activation)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if residual is None else y + residual


def _gelu_cpu(y: Tensor, activation: str) -> Tensor:
    # PyTorch's own GELU rounds differently in the last few elements of a thread's share, the compiled one nowhere.
    if not _runtime.native(y):
        return reference.gelu(y, activation)
    _native.ops().gelu_(y, activation == "gelu_tanh")
    return y


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, batch_invariant: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool batch_invariant) -> Tensor",
    triton_impl=_linear_triton,
    cpu_impl=_linear_cpu,
    fake=_fake,
)


OPS["gelu_mlp"] = "torch"  # two of them


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
        ctx.save_for_backward(x, weight, bias)
        ctx.activation, ctx.has_residual = activation, residual is not None
        return torch.ops.gpt2_kernels.linear(x, weight, bias, residual, activation, batch_invariant)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        rows, dy = _check.as_rows(x), _check.as_rows(grad)
        if ctx.activation:  # the input of the activation is computed again rather than kept
            before = F.linear(rows, weight, bias)
            approximate = "tanh" if ctx.activation == "gelu_tanh" else "none"
            dy = torch.ops.aten.gelu_backward(dy, before, approximate=approximate)
        dx = (dy @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        dweight = dy.T @ rows if ctx.needs_input_grad[1] else None
        dbias = reference.wide(dy).sum(0).to(dy.dtype) if bias is not None else None
        return dx, dweight, dbias, grad if ctx.has_residual else None, None, None


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
) -> Tensor:
    """activation(x weight^T + bias) + residual: x (..., K), weight (N, K), bias (N,), residual and result (..., N).

    activation is None, "gelu" (erf) or "gelu_tanh" (GPT-2's). Float32 accumulation; float32 inputs are multiplied in
    full precision. With batch_invariant a row has the same bits whatever the other rows are; without it the fastest
    routine there is may serve. Differentiable in x, weight, bias and residual.
    Raises ValueError on a shape, dtype, device or activation that does not fit.
    """
    if activation not in ACTIVATIONS:
        _check.fail("linear", "activation must be None, 'gelu' or 'gelu_tanh'", repr(activation))
    _check_arguments("linear", x, weight, bias, residual, ("x", "weight", "bias"))
    return _apply(x, weight, bias, residual, activation or "", batch_invariant)


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, batch_invariant: bool
) -> Tensor:
    inputs = (x, weight, bias, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Linear.apply(x, weight, bias, residual, activation, batch_invariant)
    return torch.ops.gpt2_kernels.linear(x, weight, bias, residual, activation, batch_invariant)


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
) -> Tensor:
    """gelu(x w1^T + b1) w2^T + b2 + residual: x (..., K), w1 (I, K), b1 (I,), w2 (N, I), b2 (N,), result (..., N).

    The GELU runs in the epilogue of the first product, the residual (..., N) in that of the second; approximate is
    "tanh" (GPT-2's) or "none" (erf). Batch-invariant as `linear` is. Differentiable in all six tensors.
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
    hidden = _apply(x, w1, b1, None, "gelu_tanh" if approximate == "tanh" else "gelu", True)
    return _apply(hidden, w2, b2, residual, "", True)
