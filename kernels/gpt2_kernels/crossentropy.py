"""Cross-entropy: of given logits, and fused with the product that makes them.

    cross_entropy           loss = mean over rows of  logsumexp(z) - z[target]
    linear_cross_entropy    the same for z = x weight^T, which never exists as a whole

Layout: z (R, V) with a dense last axis, x (R, C), weight (V, C), targets (R,) int64; statistics in float32. Rows whose
target is ignore_index count for nothing.
Bytes of element size s: cross_entropy R V s forward; R V s read and R V s written backward.
FLOPs of linear_cross_entropy: 2 R V C, and 4 R V C more for the gradients, which are made in the same pass, chunk of
rows by chunk of rows, so that nothing is computed twice (Hsu et al., 2024, Liger Kernel): at most a sixteenth of the
logits exist at once, and their gradient takes their place. At C = 768 that is 4608 FLOP for each logit and about 10
bytes: bound by the matrix units.
Specification: gpt2_kernels.reference.cross_entropy, linear_cross_entropy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2_kernels import _check, reference
from gpt2_kernels._runtime import accumulator, autocast, distinct, launch, register, tl, triton

CHUNKS = 16  # rows are cut into this many; with fewer rows each is a chunk of its own
ROW_MULTIPLE = 64  # elements from one row of a chunk's logits to the next: 50,257 would leave rows unaligned

# vocabulary up to -> (BLOCK_V, warps): one program walks over a row. Compiled for sm_80, sm_90 and sm_100 without
# spills (tests/test_offline.py); not yet timed on a GPU.
TILES = ((1024, (1024, 4)), (1 << 31, (4096, 8)))


@triton.jit
def _add_block(m, l, z_row, start, V, MASKED: tl.constexpr, ACC: tl.constexpr, BLOCK_V: tl.constexpr):
    """Running maximum and sum of exponentials (online softmax), one block further."""
    v = start + tl.arange(0, BLOCK_V)
    # Only the last block is masked: a bound that is no multiple of 8 would cut every load into single elements.
    z = tl.load(z_row + v, mask=v < V, other=-float("inf")) if MASKED else tl.load(z_row + v)
    z = z.to(ACC)
    m_new = tl.maximum(m, tl.max(z, 0))
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)  # nothing but -inf so far
    l = l * tl.exp2((m - shift) * 1.4426950408889634) + tl.sum(tl.exp2((z - shift) * 1.4426950408889634), 0)
    return m_new, l


@triton.jit
def _store_block(
    z_row,  # (V,)
    dz_row,  # (V,), which may be z_row
    start,
    lse,
    target,
    kept,
    scale,
    V,
    MASKED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dz = scale * (softmax(z) - one_hot(target)), and 0 in a row that counts for nothing."""
    v = start + tl.arange(0, BLOCK_V)
    z = tl.load(z_row + v, mask=v < V, other=-float("inf")) if MASKED else tl.load(z_row + v)
    p = tl.exp2((z.to(ACC) - lse) * 1.4426950408889634)
    dz = tl.where(kept, tl.where(v == target, p - 1.0, p) * scale, 0.0).to(dz_row.dtype.element_ty)
    if MASKED:
        tl.store(dz_row + v, dz, mask=v < V)
    else:
        tl.store(dz_row + v, dz)


@triton.jit
def _store_gradient(z_row, dz_row, lse, target, kept, scale, V, ACC: tl.constexpr, BLOCK_V: tl.constexpr):
    whole = V // BLOCK_V * BLOCK_V
    for start in tl.range(0, whole, BLOCK_V):
        _store_block(z_row, dz_row, start, lse, target, kept, scale, V, False, ACC, BLOCK_V)
    if whole < V:
        _store_block(z_row, dz_row, whole, lse, target, kept, scale, V, True, ACC, BLOCK_V)


@triton.jit(do_not_specialize=["V", "ignore_index"])
def cross_entropy_kernel(
    z_ptr,  # (R, V); where GRADIENT, its gradient takes its place
    targets_ptr,  # (R,) int64
    loss_ptr,  # (R,)
    lse_ptr,  # (R,), natural log
    stride_z,
    V,
    ignore_index,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program owns one row and adds its exponentials from token 0 up, BLOCK_V at a time."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride_z
    target = tl.load(targets_ptr + row)
    kept = target != ignore_index
    inside = (target >= 0) & (target < V)
    tl.device_assert(inside | (target == ignore_index), "cross_entropy: target outside the vocabulary")
    m = tl.full([], -float("inf"), ACC)
    l = tl.full([], 0.0, ACC)
    whole = V // BLOCK_V * BLOCK_V
    for start in tl.range(0, whole, BLOCK_V):
        m, l = _add_block(m, l, z_row, start, V, False, ACC, BLOCK_V)
    if whole < V:
        m, l = _add_block(m, l, z_row, whole, V, True, ACC, BLOCK_V)
    lse = m + tl.log2(l) * 0.6931471805599453
    # A target that is no token reads nothing, and shows as a loss of NaN.
    chosen = tl.load(z_row + target, mask=inside, other=float("nan")).to(ACC)
    tl.store(loss_ptr + row, tl.where(kept, lse - chosen, 0.0))
    tl.store(lse_ptr + row, lse)
    if GRADIENT:
        tl.debug_barrier()  # the chosen logit is read before it is overwritten
        _store_gradient(z_row, z_row, lse, target, kept, 1.0, V, ACC, BLOCK_V)


@triton.jit(do_not_specialize=["V", "ignore_index"])
def cross_entropy_backward_kernel(
    z_ptr,  # (R, V)
    dz_ptr,  # (R, V), contiguous
    targets_ptr,  # (R,) int64
    lse_ptr,  # (R,)
    scale_ptr,  # (1,): the incoming gradient over the number of rows that count
    stride_z,
    V,
    ignore_index,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program owns one row of dz."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    kept = target != ignore_index
    z_row = z_ptr + row * stride_z
    lse, scale = tl.load(lse_ptr + row), tl.load(scale_ptr)
    _store_gradient(z_row, dz_ptr + row * V, lse, target, kept, scale, V, ACC, BLOCK_V)


def _rows_triton(z: Tensor, targets: Tensor, ignore_index: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """(loss, lse), both (R,), of logits (R, V), which the gradient of the summed loss replaces where asked for."""
    R, V = z.shape
    loss = torch.empty(R, dtype=_statistics(z), device=z.device)
    lse = torch.empty_like(loss)
    if R:
        block, warps = next(tile for width, tile in TILES if V <= width)
        launch(
            cross_entropy_kernel,
            (R,),
            z,
            targets,
            loss,
            lse,
            z.stride(0),
            V,
            ignore_index,
            GRADIENT=gradient,
            ACC=accumulator(z.dtype),
            BLOCK_V=block,
            num_warps=warps,
        )
    return loss, lse


def _rows_cpu(z: Tensor, targets: Tensor, ignore_index: int, gradient: bool) -> tuple[Tensor, Tensor]:
    wide = reference.wide(z)
    kept = targets != ignore_index
    index = torch.where(kept, targets, 0)[:, None]
    lse = torch.logsumexp(wide, dim=-1)
    loss = torch.where(kept, lse - wide.gather(1, index).squeeze(1), 0.0)
    if gradient:
        z.copy_(_gradient_cpu(wide, index, lse, kept))
    return loss, lse


def _gradient_cpu(z: Tensor, index: Tensor, lse: Tensor, kept: Tensor) -> Tensor:
    dz = torch.exp(z - lse[:, None])
    dz.scatter_add_(1, index, torch.full_like(lse, -1.0)[:, None])
    return dz.masked_fill_(~kept[:, None], 0.0)


def _statistics(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _mean(loss: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The mean over the rows that count, and 1 / their number; NaN and infinite where none does, as torch's."""
    inverse = torch.reciprocal((targets != ignore_index).sum().to(loss.dtype))
    return loss.sum() * inverse, inverse


def _check_values(op: str, targets: Tensor, V: int, ignore_index: int) -> None:
    """Read on the CPU path alone, where reading them costs no synchronisation."""
    wrong = targets[((targets < 0) | (targets >= V)) & (targets != ignore_index)]
    if wrong.numel():
        _check.fail(op, f"targets must lie in 0..{V - 1} or be {ignore_index}", int(wrong[0]))


# --- of given logits ------------------------------------------------------------------------------------------------


def _cross_entropy_triton(z: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    loss, lse = _rows_triton(z, targets, ignore_index, False)
    mean, inverse = _mean(loss, targets, ignore_index)
    return mean, inverse, lse


def _cross_entropy_cpu(z: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_values("cross_entropy", targets, z.shape[1], ignore_index)
    loss, lse = _rows_cpu(z, targets, ignore_index, False)
    mean, inverse = _mean(loss, targets, ignore_index)
    return mean, inverse, lse


def _cross_entropy_fake(z: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    kind = _statistics(z)
    return z.new_empty((), dtype=kind), z.new_empty((), dtype=kind), z.new_empty(z.shape[0], dtype=kind)


def _backward_triton(scale: Tensor, z: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    R, V = z.shape
    dz = torch.empty((R, V), dtype=z.dtype, device=z.device)
    if R:
        block, warps = next(tile for width, tile in TILES if V <= width)
        launch(
            cross_entropy_backward_kernel,
            (R,),
            z,
            dz,
            targets,
            lse,
            scale,
            z.stride(0),
            V,
            ignore_index,
            ACC=accumulator(z.dtype),
            BLOCK_V=block,
            num_warps=warps,
        )
    return dz


def _backward_cpu(scale: Tensor, z: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    kept = targets != ignore_index
    dz = _gradient_cpu(reference.wide(z), torch.where(kept, targets, 0)[:, None], lse, kept)
    return torch.where(kept[:, None], dz * scale, 0.0).to(z.dtype)


def _backward_fake(scale: Tensor, z: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    return z.new_empty(z.shape)


register(
    "cross_entropy(Tensor logits, Tensor targets, int ignore_index) -> (Tensor, Tensor, Tensor)",
    triton_impl=_cross_entropy_triton,
    cpu_impl=_cross_entropy_cpu,
    fake=_cross_entropy_fake,
)
register(
    "cross_entropy_backward(Tensor scale, Tensor logits, Tensor targets, Tensor lse, int ignore_index) -> Tensor",
    triton_impl=_backward_triton,
    cpu_impl=_backward_cpu,
    fake=_backward_fake,
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        loss, inverse, lse = torch.ops.gpt2_kernels.cross_entropy(z, targets, ignore_index)
        ctx.save_for_backward(z, targets, inverse, lse)
        ctx.ignore_index = ignore_index
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, targets, inverse, lse = ctx.saved_tensors
        dz = torch.ops.gpt2_kernels.cross_entropy_backward(grad * inverse, z, targets, lse, ctx.ignore_index)
        return dz, None, None


# --- fused with the product -----------------------------------------------------------------------------------------


def _chunked(
    rows_of: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, grad_x: bool, grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, 1 / number of rows that count, dx, dweight): gradients of the summed loss, empty where not asked for.

    The products go through PyTorch's: they fuse nothing, sum over rows or tokens, and promise nothing of a row alone.
    dx is rounded to its dtype once here and once when it is scaled; dweight is float32 until then.
    """
    (R, C), V = x.shape, weight.shape[0]
    step = max(1, R // CHUNKS)
    space = torch.empty((min(step, R), -(-V // ROW_MULTIPLE) * ROW_MULTIPLE), dtype=x.dtype, device=x.device)
    losses = torch.empty(R, dtype=_statistics(x), device=x.device)
    dx = torch.empty((R if grad_x else 0, C), dtype=x.dtype, device=x.device)
    dweight = torch.zeros((V if grad_weight else 0, C), dtype=losses.dtype, device=x.device)
    for start in range(0, R, step):
        chunk = slice(start, min(start + step, R))
        z = space[: chunk.stop - start, :V]
        torch.mm(x[chunk], weight.T, out=z)
        losses[chunk], _ = rows_of(z, targets[chunk], ignore_index, grad_x or grad_weight)
        if grad_x:
            torch.mm(z, weight, out=dx[chunk])
        if grad_weight:
            dweight += _mm_wide(z.T, x[chunk])
    return *_mean(losses, targets, ignore_index), dx, dweight


def _mm_wide(a: Tensor, b: Tensor) -> Tensor:
    """a b, not rounded to the dtype of its factors."""
    if a.dtype in (torch.float16, torch.bfloat16) and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return reference.wide(a) @ reference.wide(b)


def _linear_triton(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, grad_x: bool, grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _chunked(_rows_triton, x, weight, targets, ignore_index, grad_x, grad_weight)


def _linear_cpu(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, grad_x: bool, grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_values("linear_cross_entropy", targets, weight.shape[0], ignore_index)
    return _chunked(_rows_cpu, x, weight, targets, ignore_index, grad_x, grad_weight)


def _linear_fake(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, grad_x: bool, grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kind = _statistics(x)
    dx = x.new_empty((x.shape[0] if grad_x else 0, x.shape[1]))
    dweight = x.new_empty((weight.shape[0] if grad_weight else 0, x.shape[1]), dtype=kind)
    return x.new_empty((), dtype=kind), x.new_empty((), dtype=kind), dx, dweight


register(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool grad_x, bool grad_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    triton_impl=_linear_triton,
    cpu_impl=_linear_cpu,
    fake=_linear_fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, grad_x: bool, grad_weight: bool
    ) -> Tensor:
        loss, inverse, dx, dweight = torch.ops.gpt2_kernels.linear_cross_entropy(
            x, weight, targets, ignore_index, grad_x, grad_weight
        )
        ctx.save_for_backward(inverse, dx, dweight)
        ctx.wanted = grad_x, grad_weight
        ctx.dtype = x.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inverse, dx, dweight = ctx.saved_tensors
        # 0 x infinity where no row counts: there the gradients are 0, as torch's
        scale = grad * torch.where(torch.isinf(inverse), 0.0, inverse)
        grad_x, grad_weight = ctx.wanted
        scaled = (
            (reference.wide(dx) * scale).to(ctx.dtype) if grad_x else None,
            (dweight * scale).to(ctx.dtype) if grad_weight else None,
        )
        return *scaled, None, None, None, None


def _check_targets(op: str, targets: Tensor, like: Tensor, ignore_index: int) -> None:
    _check.shape(op, "targets", targets, tuple(like.shape[:-1]), "(...)")
    _check.index(op, "targets", targets, torch.int64, like)
    if not -(2**31) <= ignore_index < 2**31:
        _check.fail(op, "ignore_index must fit in 32 bits", ignore_index)


@autocast("float32")
def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Mean of logsumexp(logits) - logits[target] in nats: logits (..., V), targets (...) int64 -> () float32.

    Rows whose target is ignore_index count for nothing; where none counts the loss is NaN and the gradient 0, as
    torch's. Statistics and the loss are float32 in every dtype of logits. Differentiable in logits.
    Raises ValueError on a shape, dtype or device that does not fit; a target outside the vocabulary is an error on the
    CPU, and on a GPU NaN, or a device assertion under TRITON_DEBUG=1.
    """
    op = "cross_entropy"
    if logits.dim() < 1 or logits.shape[-1] < 1:
        _check.fail(op, "logits must be (..., V) with V at least 1", tuple(logits.shape))
    _check.same_kind(op, "logits", logits)
    _check_targets(op, targets, logits, ignore_index)
    rows, targets = _check.as_rows(logits), targets.reshape(-1).contiguous()
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(rows, targets, ignore_index)
    return torch.ops.gpt2_kernels.cross_entropy(rows, targets, ignore_index)[0]


@autocast("lower")
def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """cross_entropy(x weight^T, targets) without the logits: x (..., C), weight (V, C), targets (...) int64 -> ().

    At most a sixteenth of the logits, or one row, exists at a time, in the dtype of x; gradients of x and weight are
    made along with the loss where they are wanted, and are kept for the backward pass: x's, and weight's in float32.
    The loss is float32; everything else as in `cross_entropy`. Differentiable in x and weight, once.
    Raises ValueError on a shape, dtype or device that does not fit. Source: Hsu et al., 2024, arXiv:2410.10989.
    """
    op = "linear_cross_entropy"
    _check.rank(op, "weight", weight, "(V, C)")
    if 0 in weight.shape:
        _check.fail(op, "weight must have at least one row and one column", tuple(weight.shape))
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        _check.fail(op, f"last axis of x must be C = {weight.shape[1]}", tuple(x.shape))
    _check.same_kind(op, "x", x, weight=weight)
    _check_targets(op, targets, x, ignore_index)
    rows, targets = _check.as_rows(x), targets.reshape(-1).contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        wanted = x.requires_grad, weight.requires_grad
        return _LinearCrossEntropy.apply(*distinct(rows, weight, targets, ignore_index, *wanted))
    return torch.ops.gpt2_kernels.linear_cross_entropy(rows, weight, targets, ignore_index, False, False)[0]
