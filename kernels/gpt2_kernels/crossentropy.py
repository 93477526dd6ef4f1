"""Cross-entropy of given logits, and of logits computed and consumed chunk by chunk (linear cross-entropy).

    cross_entropy          mean over rows r of  log sum_v exp(logits[r, v]) - logits[r, targets[r]]
    linear_cross_entropy   the same of logits = x weight^T, which never exist as a whole
    gradient               d logits[r, v] = (softmax(logits[r])[v] - [v = targets[r]]) / rows

Layout: R rows of V logits; x (R, C) and weight (V, C). Rows whose target is ignore_index do not count, and their logits
are not read. Each row keeps its maximum and its sum of exponentials as separate float32 numbers: maximum + log(sum)
would have no digits left for the sum where logits are large. The mean is taken on the device.

cross_entropy, bytes for element size s: R V s forward, 2 R V s backward. With V = 50257 most rows start at addresses
not aligned to 16 bytes, so a row is processed as up to 15 bytes, then 16-byte pieces, then up to 15 bytes.
linear_cross_entropy, FLOPs: 2 R V C forward and 4 R V C for the gradients, which are computed in the forward pass,
while a chunk's logits exist: backward would have to recompute the logits, 2 R V C more (Hsu et al., 2024, "Liger
Kernel").
Bytes besides the matmuls' operands: R V s written by the first matmul, read, overwritten by d logits, read by the two
other matmuls, 5 R V s (a row's second reading comes from L2), and 8 V C for each further chunk to add to d weight.
Memory: the logits of one chunk, at most 1/16 of all or 512 rows; for backward d x and d weight in float32, 4 (R + V) C.
Specification: gpt2_kernels.reference.cross_entropy, linear_cross_entropy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2_kernels import _check, _crossentropy_cpu
from gpt2_kernels._crossentropy_cpu import chunk_rows, outputs
from gpt2_kernels._launch import launch
from gpt2_kernels._operator import autocast, distinct, register
from gpt2_kernels._runtime import accumulator, statistics_dtype, tl, triton

MAX_VOCABULARY = 2**30  # columns are counted in int32
ROW_MULTIPLE = 64  # logits of a chunk are 128-byte aligned: the matmuls need 16, and write whole cache lines

# maximum vocabulary -> (BLOCK, warps). Compiled without spills for sm_80, sm_90 and sm_100; not yet timed on a GPU.
BLOCKS = ((1024, (1024, 4)), (MAX_VOCABULARY, (4096, 8)))
# torch 2.11's matmul with a float32 result is not known to add to a float32 matrix: there the sum is a separate pass.
ADDS_IN_PLACE = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 12)
BLOCK_MEAN = 1024  # rows that the one program of mean_kernel adds at a time


@triton.jit
def _aligned_part(first, V, VEC: tl.constexpr):
    """For V elements from `first` on: where the first whole VEC starts, elements before it, elements in whole VECs."""
    start = tl.multiple_of((first + VEC - 1) // VEC * VEC, VEC)
    length = tl.maximum((first + V) // VEC * VEC - start, 0).to(tl.int32)
    return start, (start - first).to(tl.int32), tl.multiple_of(length, VEC)


@triton.jit
def _edge_columns(head, length, V, VEC: tl.constexpr):
    """The columns of a row outside its aligned part, (2 VEC,), and a mask of the lanes that have one."""
    lane = tl.arange(0, 2 * VEC)
    column = tl.where(lane < VEC, lane, head + length + lane - VEC)
    return column, column < tl.where(lane < VEC, tl.minimum(head, V), V)


@triton.jit
def _gradient(x, column, target, maximum, inverse, scale):
    """(softmax - [column = target]) scale; x - maximum comes first: it is exact where x log2(e) is rounded."""
    return (tl.exp2((x - maximum) * 1.4426950408889634) * inverse - tl.where(column == target, 1.0, 0.0)) * scale


@triton.jit
def _write_gradient(
    logits_ptr,
    grad_ptr,  # may be logits_ptr: every element is read before it is written
    first,
    first_grad,
    target,
    keep,
    maximum,
    total,
    scale,
    V,
    SAME_ALIGNMENT: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of d logits, split by the alignment of the output; an ignored row is zeroed without being read."""
    inverse = 1.0 / total
    scale = tl.where(keep, scale, 0.0)
    known = (target >= 0) & (target < V)
    scale = tl.where(keep & (known == 0), float("nan"), scale)  # a target that does not exist: visibly wrong
    shift = first - first_grad
    if SAME_ALIGNMENT:
        shift = tl.multiple_of(shift, VEC)
    start, head, length = _aligned_part(first_grad, V, VEC)
    column, inside = _edge_columns(head, length, V, VEC)
    edge = tl.load(logits_ptr + first + column, mask=inside & keep, other=0.0).to(ACC)  # (2 VEC,)
    edge = _gradient(edge, column, target, maximum, inverse, scale)
    tl.store(grad_ptr + first_grad + column, edge.to(grad_ptr.dtype.element_ty), mask=inside)
    for block in tl.range(0, length, BLOCK):
        c = block + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + (start + shift) + c, mask=(c < length) & keep, other=0.0).to(ACC)  # (BLOCK,)
        grad = _gradient(x, head + c, target, maximum, inverse, scale)
        tl.store(grad_ptr + start + c, grad.to(grad_ptr.dtype.element_ty), mask=c < length)


@triton.jit(do_not_specialize=["V", "stride_logits", "ignore_index"])
def cross_entropy_kernel(
    logits_ptr,  # (R, V); with IN_PLACE overwritten by d logits, not yet divided by the number of rows
    targets_ptr,  # (R,)
    losses_ptr,  # (R,)
    maxima_ptr,  # (R,), or None with IN_PLACE
    totals_ptr,  # (R,), or None with IN_PLACE
    V,
    stride_logits,
    ignore_index,
    IN_PLACE: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns one row: its edges, then BLOCK columns at a time, summed per lane, and finally one tl.sum."""
    row = tl.program_id(0).to(tl.int64)
    first = row * stride_logits
    target = tl.load(targets_ptr + row)
    keep = target != ignore_index
    known = (target >= 0) & (target < V)
    tl.device_assert(known | (keep == 0), "cross_entropy: a target lies outside the vocabulary")
    chosen = tl.load(logits_ptr + first + target, mask=keep & known, other=float("nan")).to(ACC)

    start, head, length = _aligned_part(first, V, VEC)
    column, inside = _edge_columns(head, length, V, VEC)
    edge = tl.load(logits_ptr + first + column, mask=inside & keep, other=-float("inf")).to(ACC)  # (2 VEC,)
    maximum = tl.max(edge, 0)
    reference = tl.where(maximum == -float("inf"), 0.0, maximum)  # -inf - -inf would be NaN
    c = tl.arange(0, BLOCK)
    sums = tl.where(c == 0, tl.sum(tl.exp2((edge - reference) * 1.4426950408889634), 0), 0.0)  # (BLOCK,)
    for block in tl.range(0, tl.where(keep, length, 0), BLOCK):
        x = tl.load(logits_ptr + start + (block + c), mask=block + c < length, other=-float("inf")).to(ACC)
        larger = tl.maximum(maximum, tl.max(x, 0))
        reference = tl.where(larger == -float("inf"), 0.0, larger)
        sums = sums * tl.exp2((maximum - reference) * 1.4426950408889634) + tl.exp2(
            (x - reference) * 1.4426950408889634
        )
        maximum = larger
    total = tl.where(keep, tl.sum(sums, 0), 1.0)
    maximum = tl.where(keep, maximum, 0.0)
    tl.store(losses_ptr + row, tl.where(keep, tl.log(total) + (maximum - chosen), 0.0))
    if IN_PLACE:  # the sum above has waited for every warp's loads, so none can see what is written here
        _write_gradient(
            logits_ptr, logits_ptr, first, first, target, keep, maximum, total, 1.0, V, True, VEC, ACC, BLOCK
        )
    else:
        tl.store(maxima_ptr + row, maximum)
        tl.store(totals_ptr + row, total)


@triton.jit(do_not_specialize=["V", "stride_logits", "ignore_index"])
def cross_entropy_backward_kernel(
    grad_ptr,  # (), of the mean
    scale_ptr,  # (), 1 / rows
    logits_ptr,  # (R, V)
    targets_ptr,  # (R,)
    maxima_ptr,  # (R,)
    totals_ptr,  # (R,)
    dlogits_ptr,  # (R, V), contiguous
    V,
    stride_logits,
    ignore_index,
    SAME_ALIGNMENT: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns one row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    _write_gradient(
        logits_ptr,
        dlogits_ptr,
        row * stride_logits,
        row * V,
        target,
        target != ignore_index,
        tl.load(maxima_ptr + row),
        tl.load(totals_ptr + row),
        tl.load(grad_ptr).to(ACC) * tl.load(scale_ptr),
        V,
        SAME_ALIGNMENT,
        VEC,
        ACC,
        BLOCK,
    )


@triton.jit(do_not_specialize=["R", "ignore_index"])
def mean_kernel(
    losses_ptr,  # (R,)
    targets_ptr,  # (R,)
    mean_ptr,  # ()
    scale_ptr,  # (), 1 / rows, or 0 where there is none
    R,
    ignore_index,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program sums all rows, BLOCK at a time, one sum per lane, and finally one tl.sum."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    sums = tl.zeros([BLOCK], ACC)
    counts = tl.zeros([BLOCK], tl.int64)
    for start in tl.range(0, R, BLOCK):
        row = start + lane
        sums += tl.load(losses_ptr + row, mask=row < R, other=0.0)
        target = tl.load(targets_ptr + row, mask=row < R, other=ignore_index)
        counts += (target != ignore_index).to(tl.int64)
    count = tl.sum(counts, 0)
    divisor = tl.maximum(count, 1).to(ACC)
    tl.store(mean_ptr, tl.where(count > 0, tl.sum(sums, 0) / divisor, float("nan")))  # NaN without rows, as in torch
    tl.store(scale_ptr, tl.where(count > 0, 1.0 / divisor, 0.0))


def _options(logits: Tensor) -> dict[str, Any]:
    block, warps = next(choice for vocabulary, choice in BLOCKS if logits.shape[-1] <= vocabulary)
    return {"VEC": 16 // logits.element_size(), "ACC": accumulator(logits.dtype), "BLOCK": block, "num_warps": warps}


def _mean(losses: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    mean, scale = losses.new_empty(()), losses.new_empty(())
    launch(
        mean_kernel,
        (1,),
        losses,
        targets,
        mean,
        scale,
        losses.shape[0],
        ignore_index,
        ACC=accumulator(losses.dtype),
        BLOCK=BLOCK_MEAN,
        num_warps=8,
    )
    return mean, scale


def _cross_entropy_triton(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, targets = _check.as_rows(logits), targets.reshape(-1).contiguous()
    R, V = rows.shape
    _check.targets("cross_entropy", targets, V, ignore_index)
    losses, maxima, totals = (rows.new_empty(R, dtype=statistics_dtype(rows.dtype)) for _ in range(3))
    if R:
        launch(
            cross_entropy_kernel,
            (R,),
            rows,
            targets,
            losses,
            maxima,
            totals,
            V,
            rows.stride(0),
            ignore_index,
            IN_PLACE=False,
            **_options(rows),
        )
    return *_mean(losses, targets, ignore_index), maxima, totals


def _cross_entropy_backward_triton(
    grad: Tensor, logits: Tensor, targets: Tensor, maxima: Tensor, totals: Tensor, scale: Tensor, ignore_index: int
) -> Tensor:
    rows, targets = _check.as_rows(logits), targets.reshape(-1).contiguous()
    R, V = rows.shape
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    options = _options(rows)
    if R:
        launch(
            cross_entropy_backward_kernel,
            (R,),
            grad,
            scale,
            rows,
            targets,
            maxima,
            totals,
            dlogits,
            V,
            rows.stride(0),
            ignore_index,
            SAME_ALIGNMENT=(rows.stride(0) - V) % options["VEC"] == 0,
            **options,
        )
    return dlogits


def _add_product_(out: Tensor, a: Tensor, b: Tensor, *, beta: int) -> None:
    """out = beta out + a b, with out in float32 whatever a and b are.

    cuBLAS rather than our `linear`, which exists for batch invariance: a mean over the batch has no use for that. The
    `out` variants are also those that autocast leaves alone.
    """
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.is_cuda and ADDS_IN_PLACE:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    elif out.is_cuda:
        product = torch.mm(a, b, out_dtype=out.dtype)
        out.copy_(product) if beta == 0 else out.add_(product)
    else:  # in the interpreter: PyTorch has no such matmul on a CPU
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def _linear_cross_entropy_triton(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    V, C = weight.shape
    _check.targets("linear_cross_entropy", targets, V, ignore_index)
    rows, weight, targets = x.reshape(-1, C).contiguous(), weight.contiguous(), targets.reshape(-1).contiguous()
    R = rows.shape[0]
    padded = -(-V // ROW_MULTIPLE) * ROW_MULTIPLE
    chunk = chunk_rows(R, V, padded)
    losses, dx, dweight = outputs(rows, weight, need_dx, need_dweight)
    buffer = rows.new_empty(min(chunk, R), padded)
    for start in range(0, R, chunk):
        part = slice(start, start + chunk)
        logits = buffer[: rows[part].shape[0], :V]
        torch.mm(rows[part], weight.T, out=logits)
        launch(
            cross_entropy_kernel,
            (logits.shape[0],),
            logits,
            targets[part],
            losses[part],
            None,
            None,
            V,
            padded,
            ignore_index,
            IN_PLACE=True,
            **_options(logits),
        )
        if need_dx:
            _add_product_(dx[part], logits, weight, beta=0)
        if need_dweight:
            _add_product_(dweight, logits.T, rows[part], beta=int(start > 0))
    return *_mean(losses, targets, ignore_index), dx, dweight


def _fake(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one, row = (logits.new_empty(shape, dtype=statistics_dtype(logits.dtype)) for shape in ((), (targets.numel(),)))
    return one, torch.empty_like(one), row, torch.empty_like(row)


def _fake_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, maxima: Tensor, totals: Tensor, scale: Tensor, ignore_index: int
) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_linear(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one = x.new_empty((), dtype=statistics_dtype(x.dtype))
    dx = one.new_empty((targets.numel() if need_dx else 0, x.shape[-1]))
    return one, torch.empty_like(one), dx, one.new_empty((weight.shape[0] if need_dweight else 0, x.shape[-1]))


register(
    "cross_entropy(Tensor logits, Tensor targets, int ignore_index) -> (Tensor, Tensor, Tensor, Tensor)",
    triton_impl=_cross_entropy_triton,
    cpu_impl=_crossentropy_cpu.cross_entropy,
    fake=_fake,
    cpu="native",
)
register(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor targets, Tensor maxima, Tensor totals, Tensor scale,"
    " int ignore_index) -> Tensor",
    triton_impl=_cross_entropy_backward_triton,
    cpu_impl=_crossentropy_cpu.cross_entropy_backward,
    fake=_fake_backward,
    cpu="native",
)
register(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool need_dx, bool need_dweight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    triton_impl=_linear_cross_entropy_triton,
    cpu_impl=_crossentropy_cpu.linear_cross_entropy,
    fake=_fake_linear,
    cpu="native",
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        loss, scale, maxima, totals = torch.ops.gpt2_kernels.cross_entropy(logits, targets, ignore_index)
        ctx.save_for_backward(logits, targets, maxima, totals, scale)
        ctx.ignore_index = ignore_index
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dlogits = torch.ops.gpt2_kernels.cross_entropy_backward(grad, *ctx.saved_tensors, ctx.ignore_index)
        return dlogits, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_dx: bool, need_dweight: bool
    ) -> Tensor:
        loss, scale, dx, dweight = torch.ops.gpt2_kernels.linear_cross_entropy(
            x, weight, targets, ignore_index, need_dx, need_dweight
        )
        ctx.save_for_backward(x, weight, targets, scale)
        ctx.gradients, ctx.options = (dx, dweight), (ignore_index, need_dx, need_dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets, scale = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # second backward through a retained graph: the first consumed them
            gradients = torch.ops.gpt2_kernels.linear_cross_entropy(x, weight, targets, *ctx.options)[2:]
        _, need_dx, need_dweight = ctx.options
        factor = grad * scale  # stays on the device
        # In place: allocating another d weight would cost a CPU half a matmul's time in page faults alone.
        dx, dweight = (gradient.mul_(factor).to(x.dtype) for gradient in gradients)
        return dx.view(x.shape) if need_dx else None, dweight if need_dweight else None, *(None,) * 4


def _check_arguments(op: str, tensor: Tensor, targets: Tensor, V: int, ignore_index: int) -> None:
    if not 1 <= V <= MAX_VOCABULARY:
        _check.fail(op, f"the vocabulary must have 1..{MAX_VOCABULARY} entries", V)
    _check.index(op, "targets", targets, torch.int64, tensor)
    _check.shape(op, "targets", targets, tuple(tensor.shape[:-1]), "the leading axes (...)")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool) or not -(2**63) <= ignore_index < 2**63:
        _check.fail(op, "ignore_index must be an integer of 64 bits", repr(ignore_index))


@autocast("float32")
def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Mean of -log softmax(logits)[target]: logits (..., V), targets (...) int64 -> float32 scalar, in nats.

    Rows whose target is ignore_index are left out of the mean and get a gradient of 0; if none is left the mean is NaN,
    as in torch. The loss is float32 for every dtype of logits: in bfloat16 it would have three digits. The gradient has
    the dtype of logits. Raises ValueError on a shape, dtype or device that does not fit and, for tensors on a CPU, on a
    target outside 0..V-1; on a GPU such a target makes the loss and its row's gradient NaN, and fails a device
    assertion under TRITON_DEBUG=1.
    """
    if logits.dim() < 1:
        _check.fail("cross_entropy", "logits must be (..., V)", tuple(logits.shape))
    _check.same_kind("cross_entropy", "logits", logits)
    _check_arguments("cross_entropy", logits, targets, logits.shape[-1], ignore_index)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(logits, targets, ignore_index)
    return torch.ops.gpt2_kernels.cross_entropy(logits, targets, ignore_index)[0]


@autocast("lower")
def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """cross_entropy(x weight^T, targets) without the logits: x (..., C), weight (V, C), targets (...) int64 -> scalar.

    At most 1/16 of the logits (or 512 rows) is alive at a time, in the dtype of x; the loss is float32. Gradients of x
    and weight, where needed, are computed in the forward pass, summed in float32 in a fixed order and rounded once, in
    backward; on a CPU each bfloat16 matmul is rounded as well. Float32 matmuls obey torch.backends.cuda.matmul as
    torch's own do. Ignored rows, targets outside the vocabulary and errors: as in `cross_entropy`.
    """
    _check.rank("linear_cross_entropy", "weight", weight, "(V, C)")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1] or not x.shape[-1]:
        _check.fail("linear_cross_entropy", f"last axis of x must be C = {weight.shape[1]}, at least 1", tuple(x.shape))
    _check.same_kind("linear_cross_entropy", "x", x, weight=weight)
    _check_arguments("linear_cross_entropy", x, targets, weight.shape[0], ignore_index)
    need_dx, need_dweight = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    if need_dx or need_dweight:
        return _LinearCrossEntropy.apply(*distinct(x, weight, targets, ignore_index, need_dx, need_dweight))
    return torch.ops.gpt2_kernels.linear_cross_entropy(x, weight, targets, ignore_index, False, False)[0]
