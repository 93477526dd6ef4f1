"""The memory layouts in which an operator may be handed a tensor, an incoming gradient included."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "rows sliced", "columns sliced", "transposed", "expanded", "last axis strided")
GRADIENT_LAYOUTS = (*LAYOUTS, "one value")  # what `.sum().backward()` hands back


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x with the same values (when expanded, those of its first part or its first value), laid out so in memory.

    What lies between the elements is NaN, which exposes a kernel that reads outside its tensor.
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "expanded":  # stride 0 in the leading axis
        return x[:1].expand_as(x)
    if layout == "one value":  # stride 0 in all of them
        return x.flatten()[0].expand_as(x)
    if layout == "transposed":  # of the two leading axes; of a matrix, the memory of its transpose
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    shape = list(x.shape)
    index: list[slice] = [slice(None)] * x.dim()
    if layout == "rows sliced":
        shape[-2], index[-2] = 2 * shape[-2] + 1, slice(1, None, 2)
    elif layout == "columns sliced":
        shape[-1], index[-1] = shape[-1] + 5, slice(3, -2)
    elif layout == "last axis strided":
        shape[-1], index[-1] = 2 * shape[-1], slice(None, None, 2)
    else:
        raise ValueError(f"in_layout: layout must be one of {GRADIENT_LAYOUTS}, got {layout!r}")
    space = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    view = space[tuple(index)]
    view.copy_(x)
    return view
