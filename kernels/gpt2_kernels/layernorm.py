"""Layer normalisation, alone and fused with the residual addition before it, forward and backward.

    xhat = (x - mean(x)) * rstd(x),   rstd = 1 / sqrt(var(x) + eps),   y = xhat * weight + bias     (Ba et al., 2016)
    dx = (wdy - mean(wdy) - xhat * mean(wdy * xhat)) * rstd + dtotal,   wdy = weight * dy
    dweight = sum over rows of dy * xhat,   dbias = sum over rows of dy

Layout: rows of C elements, C <= 16384, each held in the registers of one program. Statistics are float32 (2, R), the
means of all rows and then their rstd; the variance comes from the centred row, so a large mean cancels no digits.

Bytes, for R rows of element size s; the weights, 2 C s, stay in the caches. About 9 FLOP per element forward and 13
backward: memory-bound everywhere.

    layer_norm                                  2 R C s, + 8 R of statistics where a gradient may be asked for
    add_layer_norm                              4 R C s, where the two steps apart take 5 R C s
    layer_norm_backward                         3 R C s + 8 R
      with dtotal, the gradient of the sum      4 R C s + 8 R: added in the same pass
      dweight and dbias                         + 16 P C: partial sums of P <= 1056 programs, written and read once
      wider than 8192                           + 2 R C s: dweight and dbias take a pass of their own

    bfloat16, C = 768     layer_norm    add_layer_norm    backward          backward with dtotal
    R = 4096              12.6 MB       25.2 MB           18.9 + 12.6 MB    25.2 + 12.6 MB
    R = 65536             201 MB        403 MB            302 + 13.0 MB     403 + 13.0 MB

The partial sums fit in L2. Bitwise reproducible, without atomics: a row's y and dx depend on that row alone; which rows
a program sums, in which order, and the order of the partial sums depend on R and C, not on the GPU; on a CPU they
depend on R, not on the number of threads (csrc/cpu_layernorm.h).
Specification: gpt2_kernels.reference.layer_norm, add_layer_norm, layer_norm_backward.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2_kernels import _check, _native, _overlap, _runtime, reference
from gpt2_kernels._launch import launch
from gpt2_kernels._operator import autocast, distinct, register
from gpt2_kernels._overlap import wait
from gpt2_kernels._runtime import accumulator, statistics_dtype, tl, triton

MAX_WIDTH = 16384  # one row fits in the registers of one program

# The tables are derived from compiled code (sm_80, sm_90, sm_100; Triton 3.6 and 3.7), not yet timed on a GPU.
#
# Forward: maximum width -> warps. Few warps: at 32 elements per thread, 49 KB or more of rows are in flight on a Hopper
# SM, and a row of 768 costs 344 warp instructions of the roughly 750 that the SM issues while memory delivers it. With
# 4 warps, each of which computes addresses and exchanges sums, it costs 864.
WARPS = ((1024, 1), (2048, 2), (4096, 4), (8192, 8), (MAX_WIDTH, 16))
# Backward: maximum width -> warps, stages (rows in flight or in use), programs: at most what an H200 holds at once, and
# a fixed number, so that the bits of dweight do not depend on the GPU.
BACKWARD = ((1024, 1, 2, 1056), (2048, 4, 3, 396), (4096, 8, 2, 264), (8192, 16, 2, 132))
ROWS_PER_PROGRAM = 4  # at least: with fewer, the partial sums would be as large as the rows
# Wider rows leave no registers for the dweight and dbias sums: one launch for dx, another for those, by column blocks.
WIDE_WARPS, WIDE_COLUMNS, WIDE_PROGRAMS = 16, 1024, 66
SUM_ROWS, SUM_COLUMNS = 256, 16  # rows of partial sums that a program reads at a time, and its columns


@triton.jit(do_not_specialize=["R"])
def layer_norm_kernel(
    x_ptr,  # (R, C)
    residual_ptr,  # (R, C) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,) or None
    y_ptr,  # (R, C), contiguous
    total_ptr,  # (R, C), contiguous, where there is a residual: x + residual
    statistics_ptr,  # (2, R) or None
    R,
    stride_x,
    stride_residual,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program owns one row and sums it in the tree order of one tl.sum."""
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    # Nothing reads x again soon: it is evicted first from L2, to make room for y, which the next matmul reads.
    x = tl.load(x_ptr + row * stride_x + c, mask=inside, other=0.0, eviction_policy="evict_first")  # (BLOCK_C,)
    if residual_ptr is not None:
        residual = tl.load(
            residual_ptr + row * stride_residual + c, mask=inside, other=0.0, eviction_policy="evict_first"
        )
        # Rounded like the stored sum, so that backward, which reads that sum, sees the row that was normalised.
        x = (x.to(ACC) + residual).to(x.dtype)
        tl.store(total_ptr + row * C + c, x, mask=inside)
    x = x.to(ACC)
    mean = tl.sum(x, 0) / C
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    y = centred * rstd * tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=inside, other=0.0).to(ACC)
    tl.store(y_ptr + row * C + c, y.to(y_ptr.dtype.element_ty), mask=inside)
    if statistics_ptr is not None:
        tl.store(statistics_ptr + row, mean)
        tl.store(statistics_ptr + R + row, rstd)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=["R"])
def layer_norm_backward_kernel(
    dy_ptr,  # (R, C)
    dtotal_ptr,  # (R, C) or None
    x_ptr,  # (R, C)
    weight_ptr,  # (C,)
    statistics_ptr,  # (2, R)
    dx_ptr,  # (R, C), contiguous, or None
    partial_ptr,  # (DWEIGHT + DBIAS, programs, C) or None
    R,
    stride_dy,
    stride_dtotal,
    stride_x,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program p owns rows p, p + programs, ... and adds them, in this order, to one partial sum per parameter."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # the whole row wherever dx is wanted
    inside = c < C
    dweight = tl.zeros([BLOCK_C], ACC)
    dbias = tl.zeros([BLOCK_C], ACC)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)  # (BLOCK_C,)
    for i in tl.range(program, R, programs, num_stages=STAGES):  # loads of later rows are pipelined
        row = tl.cast(i, tl.int64)
        dy = tl.load(dy_ptr + row * stride_dy + c, mask=inside, other=0.0, eviction_policy="evict_first").to(ACC)
        x = tl.load(x_ptr + row * stride_x + c, mask=inside, other=0.0, eviction_policy="evict_first").to(ACC)
        rstd = tl.load(statistics_ptr + R + row)
        xhat = (x - tl.load(statistics_ptr + row)) * rstd  # not 0 outside, but all it is multiplied with there is
        if dx_ptr is not None:
            wdy = weight * dy
            along, across = tl.reduce((wdy * xhat, wdy), 0, _add_pairs)  # one reduction: one exchange between warps
            dx = (wdy - (xhat * (along / C) + across / C)) * rstd
            if dtotal_ptr is not None:
                dx += tl.load(
                    dtotal_ptr + row * stride_dtotal + c, mask=inside, other=0.0, eviction_policy="evict_first"
                ).to(ACC)
            tl.store(dx_ptr + row * C + c, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if DWEIGHT:
            dweight += dy * xhat
        if DBIAS:
            dbias += dy
    first = program.to(tl.int64) * C
    if DWEIGHT:
        tl.store(partial_ptr + first + c, dweight, mask=inside)
        first += tl.cast(programs, tl.int64) * C
    if DBIAS:
        tl.store(partial_ptr + first + c, dbias, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def sum_partials_kernel(
    partial_ptr,  # (as many as there are results, programs, C)
    first_ptr,  # (C,)
    second_ptr,  # (C,) or None
    programs,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_C columns of one result: adds rows BLOCK_P apart in order, then those sums as a tree."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    partial_ptr += tl.program_id(1).to(tl.int64) * programs * C
    acc = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for start in tl.range(0, programs, BLOCK_P, num_stages=3):
        inside = (start + p < programs)[:, None] & (c < C)[None, :]
        acc += tl.load(partial_ptr + (start + p).to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0)
    total = tl.sum(acc, 0)  # (BLOCK_C,)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + c, total.to(first_ptr.dtype.element_ty), mask=c < C)
    else:
        if second_ptr is not None:
            tl.store(second_ptr + c, total.to(second_ptr.dtype.element_ty), mask=c < C)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """A tensor, of any rank, that holds the rows of x with a dense last axis, and the row stride."""
    if x.is_contiguous():  # nearly always, and then not even a view is needed
        return x, x.shape[-1]
    rows = _check.as_rows(x)
    return rows, rows.stride(0)


def _forward_warps(C: int) -> int:
    for width, warps in WARPS:
        if C <= width:
            return warps
    raise AssertionError(C)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    C = x.shape[-1]
    R = x.numel() // C
    rows, stride_x = _rows(x)
    other, stride_residual = (None, 0) if residual is None else _rows(residual)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(y)
    kept = torch.empty(2, R, dtype=statistics_dtype(x.dtype), device=x.device) if statistics else None
    if R:
        launch(
            layer_norm_kernel,
            (R,),
            rows,
            other,
            weight,
            bias,
            y,
            total,
            kept,
            R,
            stride_x,
            stride_residual,
            eps,
            C=C,
            BLOCK_C=_check.power_of_2(C),
            ACC=accumulator(x.dtype),
            num_warps=_forward_warps(C),
            **_overlap.options(x.device),
        )
    return y, total, kept


def _layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, statistics: bool
) -> tuple[Tensor, Tensor | None]:
    y, _, kept = _launch(x, None, weight, bias, eps, statistics)
    return y, kept


def _add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, statistics: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    y, total, kept = _launch(x, residual, weight, bias, eps, statistics)
    assert total is not None
    return y, total, kept


def _backward_triton(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    statistics: Tensor,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    C = x.shape[-1]
    R, wanted = x.numel() // C, want_dweight + want_dbias
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if want_dx else None
    dweight = torch.empty_like(weight) if want_dweight else None
    dbias = torch.empty_like(weight) if want_dbias else None
    tensors = (dy, dtotal if want_dx else None, x, weight, statistics)
    programs = 0
    for width, warps, stages, most in BACKWARD:
        if C <= width:
            programs = min(-(-R // ROWS_PER_PROGRAM), most)
            partial = _partial(wanted, programs, x, statistics)
            if R and (want_dx or wanted):
                _launch_backward(
                    tensors, dx, partial, want_dweight, want_dbias, (programs, 1), _check.power_of_2(C), warps, stages
                )
            break
    else:
        if R and want_dx:
            _launch_backward(tensors, dx, None, False, False, (R, 1), _check.power_of_2(C), WIDE_WARPS, 1)
        programs = min(-(-R // ROWS_PER_PROGRAM), WIDE_PROGRAMS)
        partial = _partial(wanted, programs, x, statistics)
        if R and wanted:
            blocks = -(-C // WIDE_COLUMNS)
            tensors = (dy, None, x, weight, statistics)
            _launch_backward(tensors, None, partial, want_dweight, want_dbias, (programs, blocks), WIDE_COLUMNS, 1, 2)
    if wanted:
        launch(
            sum_partials_kernel,
            (-(-C // SUM_COLUMNS), wanted),
            partial,
            dweight if want_dweight else dbias,
            dbias if want_dweight else None,
            programs,
            C=C,
            ACC=accumulator(x.dtype),
            BLOCK_P=SUM_ROWS,
            BLOCK_C=SUM_COLUMNS,
        )
    return dx, dweight, dbias


def _partial(wanted: int, programs: int, x: Tensor, statistics: Tensor) -> Tensor | None:
    if not wanted:
        return None
    return torch.empty(wanted, programs, x.shape[-1], dtype=statistics.dtype, device=x.device)


def _launch_backward(
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
    dx: Tensor | None,
    partial: Tensor | None,
    want_dweight: bool,
    want_dbias: bool,
    grid: tuple[int, int],
    columns: int,
    warps: int,
    stages: int,
) -> None:
    dy, dtotal, x, weight, statistics = tensors
    dy, stride_dy = _rows(dy)
    dtotal, stride_dtotal = (None, 0) if dtotal is None else _rows(dtotal)
    rows, stride_x = _rows(x)
    launch(
        layer_norm_backward_kernel,
        grid,
        dy,
        dtotal,
        rows,
        weight,
        statistics,
        dx,
        partial,
        x.numel() // x.shape[-1],
        stride_dy,
        stride_dtotal,
        stride_x,
        DWEIGHT=want_dweight,
        DBIAS=want_dbias,
        C=x.shape[-1],
        BLOCK_C=columns,
        ACC=accumulator(x.dtype),
        STAGES=stages,
        num_warps=warps,
    )


def _layer_norm_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, statistics: bool
) -> tuple[Tensor, Tensor | None]:
    if _runtime.native(x):
        y, kept = _native.ops().layer_norm(_rows(x)[0], weight, bias, eps)
        return _check.as_shape(y, x.shape), kept if statistics else None
    wide = reference.wide  # PyTorch keeps the statistics in the dtype of the input, and backward needs float32
    y, mean, rstd = torch.native_layer_norm(
        wide(x), (x.shape[-1],), wide(weight), None if bias is None else wide(bias), eps
    )
    return y.to(x.dtype).contiguous(), torch.stack((mean.view(-1), rstd.view(-1))) if statistics else None


def _add_layer_norm_cpu(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, statistics: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    if _runtime.native(x):
        y, total, kept = _native.ops().add_layer_norm(_rows(x)[0], _rows(residual)[0], weight, bias, eps)
        return _check.as_shape(y, x.shape), _check.as_shape(total, x.shape), kept if statistics else None
    total = torch.add(x, residual).contiguous()
    y, kept = _layer_norm_cpu(total, weight, bias, eps, statistics)
    return y, total, kept


def _backward_cpu(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    statistics: Tensor,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if _runtime.native(x):
        others = None if dtotal is None else _rows(dtotal)[0]
        dx, dweight, dbias = _native.ops().layer_norm_backward(
            _rows(dy)[0], others, _rows(x)[0], weight, statistics, want_dx, want_dweight, want_dbias
        )
        return None if dx is None else _check.as_shape(dx, x.shape), dweight, dbias
    wide, C = reference.wide, x.shape[-1]
    mean, rstd = statistics.view(2, -1, 1)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        wide(dy).reshape(-1, C),
        wide(x).reshape(-1, C),
        (C,),
        mean,
        rstd,
        wide(weight),
        wide(weight),  # stands in for the bias, of which only the shape matters
        (want_dx, want_dweight, want_dbias),
    )
    if want_dx:
        dx = dx.view(x.shape)
        dx = (dx if dtotal is None else dx + wide(dtotal)).to(x.dtype).contiguous()
    return (
        dx if want_dx else None,
        dweight.to(weight.dtype) if want_dweight else None,
        dbias.to(weight.dtype) if want_dbias else None,
    )


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, statistics: bool) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    R = x.numel() // x.shape[-1]
    return y, x.new_empty((2, R), dtype=statistics_dtype(x.dtype)) if statistics else None


def _fake_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, statistics: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    y, kept = _fake(x, weight, bias, eps, statistics)
    return y, torch.empty_like(y), kept


def _fake_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    statistics: Tensor,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if want_dx else None,
        torch.empty_like(weight) if want_dweight else None,
        torch.empty_like(weight) if want_dbias else None,
    )


# A result that was not asked for is None, as in PyTorch's own native_layer_norm_backward.
register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool statistics) -> (Tensor, Tensor)",
    triton_impl=_layer_norm_triton,
    cpu_impl=_layer_norm_cpu,
    fake=_fake,
    cpu="native",
)
register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, bool statistics)"
    " -> (Tensor, Tensor, Tensor)",
    triton_impl=_add_layer_norm_triton,
    cpu_impl=_add_layer_norm_cpu,
    fake=_fake_add,
    cpu="native",
)
register(
    "layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor statistics,"
    " bool want_dx, bool want_dweight, bool want_dbias) -> (Tensor, Tensor, Tensor)",
    triton_impl=_backward_triton,
    cpu_impl=_backward_cpu,
    fake=_fake_backward,
    cpu="native",
)
# The overloads themselves: going through the packet costs the host a lookup per call.
_layer_norm_op = torch.ops.gpt2_kernels.layer_norm.default
_add_layer_norm_op = torch.ops.gpt2_kernels.add_layer_norm.default
_backward_op = torch.ops.gpt2_kernels.layer_norm_backward.default


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, prenorm: bool) -> Any:
        y, statistics = _layer_norm_op(x, weight, bias, eps, True)
        ctx.save_for_backward(x, weight, statistics)
        ctx.set_materialize_grads(False)  # no zeros to read where one of the results is not used
        return (y, x) if prenorm else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None = None) -> tuple[Tensor | None, ...]:
        want_dx, want_dweight, want_dbias, *_ = ctx.needs_input_grad
        if dy is None:
            return dstream, None, None, None, None
        x, weight, statistics = ctx.saved_tensors
        return *_backward_op(dy, dstream, x, weight, statistics, want_dx, want_dweight, want_dbias), None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, total, statistics = _add_layer_norm_op(x, residual, weight, bias, eps, True)
        ctx.save_for_backward(total, weight, statistics)
        ctx.set_materialize_grads(False)  # no zeros to read where one of the results is not used
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        want_dx, want_dresidual, want_dweight, want_dbias, _ = ctx.needs_input_grad
        if dy is None:
            return dtotal, dtotal, None, None, None
        total, weight, statistics = ctx.saved_tensors
        want = want_dx or want_dresidual
        dx, dweight, dbias = _backward_op(dy, dtotal, total, weight, statistics, want, want_dweight, want_dbias)
        return dx if want_dx else None, dx if want_dresidual else None, dweight, dbias, None


def _check_arguments(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    if x.dim() < 1 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        _check.fail(op, f"last axis of x must lie in 1..{MAX_WIDTH}", tuple(x.shape))
    _check.same_kind(op, "x", x, weight=weight, bias=bias)
    _check.shape(op, "weight", weight, (x.shape[-1],), "(C,)")
    _check.shape(op, "bias", bias, (x.shape[-1],), "(C,)")
    if not eps >= 0.0:
        _check.fail(op, "eps must be at least 0", eps)


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, prenorm: Literal[False] = False
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, prenorm: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, prenorm: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation over the last axis: x (..., C) -> (..., C), in the dtype of x.

    weight and bias are (C,); statistics are float32; C <= 16384. Differentiable in x, weight and bias. With prenorm the
    result is (y, x): that x, not to be modified in place, continues as the residual stream, x + f(y), and its gradient
    is added to that of y in the backward kernel; autograd would need a separate pass over 3 elements per element of x.
    Raises ValueError on a shape, dtype or device that does not fit. Source: Ba et al., 2016, arXiv:1607.06450.
    """
    if not prenorm:
        return _layer_norm(x, weight, bias, eps, False)
    fused = (
        torch.is_grad_enabled()
        and x.requires_grad
        and not torch.compiler.is_compiling()  # it rejects a result that is an input, and fuses the addition itself
        and (x.dtype == torch.float32 or not torch.is_autocast_enabled(x.device.type))  # which would cast x
    )
    y = _layer_norm(x, weight, bias, eps, fused)
    return y if fused else (y, x)


@autocast("float32")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, prenorm: bool) -> Any:
    _check_arguments("layer_norm", x, weight, bias, eps)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _LayerNorm.apply(*distinct(x, weight, bias, eps, prenorm))
    return _layer_norm_op(x, weight, bias, eps, False)[0]


@autocast("float32")
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual) in one pass: x and residual (..., C), weight and bias (C,).

    The sum is rounded to the dtype of x before it is normalised, as two separate steps would do. Differentiable.
    Raises ValueError on a shape, dtype or device that does not fit.
    """
    _check_arguments("add_layer_norm", x, weight, bias, eps)
    _check.same_kind("add_layer_norm", "x", x, residual=residual)
    _check.shape("add_layer_norm", "residual", residual, tuple(x.shape), "the shape of x")
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    inputs = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _AddLayerNorm.apply(*distinct(x, residual, weight, bias, eps))
    y, total, _ = _add_layer_norm_op(x, residual, weight, bias, eps, False)
    return y, total
