"""Cross-entropy on a CPU, and the chunking of linear_cross_entropy, which its Triton path shares.

In C++ where the compiled extension supports the dtype; else in PyTorch, CHUNK logits at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2_kernels import _check, _native, _runtime
from gpt2_kernels._runtime import statistics_dtype

ALIVE = 16  # linear_cross_entropy holds 1 / ALIVE of the logits, or FEWEST_ROWS of them where those are more
FEWEST_ROWS = 512  # matmuls of fewer rows read the weight, and add to its gradient, for too little work
TILE_ROWS = 128  # chunks hold a multiple of a GEMM's row tile where that needs no extra chunk
CHUNK = 1 << 20  # logits that cross_entropy processes at a time: float32 copies stay in the cache


def chunk_rows(R: int, row_bytes: int, alive_row_bytes: int) -> int:
    """Rows per chunk: it fits in R * row_bytes / ALIVE bytes at alive_row_bytes per row, or has FEWEST_ROWS rows."""
    most = max(FEWEST_ROWS, R * row_bytes // (ALIVE * alive_row_bytes))
    chunks = max(1, -(-R // most))
    even = max(1, -(-R // chunks))  # rows spread evenly
    return min(most, -(-even // TILE_ROWS) * TILE_ROWS)


def outputs(rows: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (R,), buffers for d x (R, C) and d weight (V, C); a gradient that is not needed has no rows.

    The first chunk writes d weight and the others add to it; with no rows there is no chunk, and it is 0. The gradients
    are those of the sum, in float32: neither 1 / rows nor a loss scale applied later may push float16 out of its range,
    and there is one rounding, in backward.
    """
    losses = rows.new_empty(rows.shape[0], dtype=statistics_dtype(rows.dtype))
    dx = losses.new_empty(rows.shape[0] if need_dx else 0, rows.shape[1])
    dweight = losses.new_empty(weight.shape[0] if need_dweight else 0, rows.shape[1])
    return losses, dx, dweight if rows.shape[0] else dweight.zero_()


def _rows_(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, maxima and sums of a chunk (n, V) in float32, which is overwritten by exp(logits - maximum)."""
    keep = targets != ignore_index
    chosen = logits.gather(1, targets.where(keep, 0)[:, None]).squeeze(1)
    maxima = logits.amax(1)
    totals = logits.sub_(maxima[:, None]).exp_().sum(1)
    losses = (totals.log() + (maxima - chosen)).where(keep, 0.0)
    return losses, maxima, totals


def _gradient_(weights: Tensor, targets: Tensor, totals: Tensor, ignore_index: int) -> Tensor:
    """exp(logits - maximum), (n, V) in float32, turned in place into the gradient of the sum of the losses."""
    keep = targets != ignore_index
    weights.div_(totals[:, None])
    weights[torch.arange(weights.shape[0]), targets.where(keep, 0)] -= 1.0
    return weights.masked_fill_(~keep[:, None], 0.0)


def mean(losses: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    count = (targets != ignore_index).sum().to(losses.dtype)
    return losses.sum() / count, (1.0 / count).where(count > 0, 0.0)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    V = logits.shape[-1]
    _check.targets("cross_entropy", targets, V, ignore_index)
    rows, targets = logits.reshape(targets.numel(), V), targets.reshape(-1).contiguous()
    if _runtime.native(rows):
        losses, maxima, totals = _native.ops().cross_entropy(_check.unit_last_stride(rows), targets, ignore_index)
        return *mean(losses, targets, ignore_index), maxima, totals
    losses, maxima, totals = (rows.new_empty(rows.shape[0], dtype=statistics_dtype(logits.dtype)) for _ in range(3))
    step = max(1, CHUNK // V)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        copy = rows[part].to(statistics_dtype(logits.dtype), copy=True)
        losses[part], maxima[part], totals[part] = _rows_(copy, targets[part], ignore_index)
    return *mean(losses, targets, ignore_index), maxima, totals


def cross_entropy_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, maxima: Tensor, totals: Tensor, scale: Tensor, ignore_index: int
) -> Tensor:
    V = logits.shape[-1]
    rows, targets = logits.reshape(targets.numel(), V), targets.reshape(-1).contiguous()
    dlogits = rows.new_empty(rows.shape)
    if _runtime.native(rows):
        rows, factor = _check.unit_last_stride(rows), float(grad * scale)
        _native.ops().cross_entropy_backward_(rows, targets, maxima, totals, factor, ignore_index, dlogits)
        return dlogits.view(logits.shape)
    step = max(1, CHUNK // V)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        weights = (rows[part].to(statistics_dtype(logits.dtype)) - maxima[part, None]).exp_()
        dlogits[part] = _gradient_(weights, targets[part], totals[part], ignore_index).mul_(grad * scale)
    return dlogits.view(logits.shape)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    V, C = weight.shape
    _check.targets("linear_cross_entropy", targets, V, ignore_index)
    rows, targets = x.reshape(targets.numel(), C), targets.reshape(-1).contiguous()
    R, dtype = rows.shape[0], rows.dtype
    if not _runtime.multiplies(rows):
        dtype = statistics_dtype(dtype)
        rows, weight = rows.to(dtype), weight.to(dtype)
    losses, dx, dweight = outputs(rows, weight, need_dx, need_dweight)
    chunk = chunk_rows(R, x.element_size(), dtype.itemsize)
    buffer = rows.new_empty(min(chunk, R), V)
    for start in range(0, R, chunk):
        part = slice(start, start + chunk)
        logits = torch.mm(rows[part], weight.T, out=buffer[: rows[part].shape[0]])
        losses[part] = _gradient_of_chunk_(logits, targets[part], ignore_index, need_dx or need_dweight)
        if need_dx:
            dx[part] = torch.mm(logits, weight)
        if need_dweight and dtype == dweight.dtype:
            dweight.addmm_(logits.T, rows[part], beta=int(start > 0))
        elif need_dweight:
            product = torch.mm(logits.T, rows[part])
            dweight.add_(product) if start else dweight.copy_(product)
    return *mean(losses, targets, ignore_index), dx, dweight


def _gradient_of_chunk_(logits: Tensor, targets: Tensor, ignore_index: int, wanted: bool) -> Tensor:
    """The losses of a chunk, which is overwritten by the gradient of their sum where that is wanted."""
    if not _runtime.native(logits):
        wide = logits if logits.dtype == statistics_dtype(logits.dtype) else logits.to(statistics_dtype(logits.dtype))
        losses, _, totals = _rows_(wide, targets, ignore_index)
        if wanted:
            logits.copy_(_gradient_(wide, targets, totals, ignore_index))
        return losses
    losses, maxima, totals = _native.ops().cross_entropy(logits, targets, ignore_index)
    if wanted:
        _native.ops().cross_entropy_backward_(logits, targets, maxima, totals, 1.0, ignore_index, logits)
    return losses
