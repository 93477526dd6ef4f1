"""One rule for "close enough": at most twice the error that PyTorch makes in the same dtype, against float64."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF_DTYPES)


def assert_accurate(
    ours: Tensor, theirs: Tensor, truth: Tensor, *, factor: float = 2.0, terms: float = 0.0, what: str = "result"
) -> None:
    """max|ours - truth| <= factor * max|theirs - truth| + a floor relative to the largest true value.

    `theirs` is PyTorch's answer in the dtype of `ours`, `truth` the answer in float64. The floor is for cases in which
    PyTorch happens to be nearly exact: in half precision, one rounding of the store; in float32, where sums in another
    order are legal, four units in the last place. Where large terms cancel, the floor is relative to `terms`, the
    largest of them: the derivative of a saturated softmax is what rounding leaves of them.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: dtype {ours.dtype}, expected {theirs.dtype}"
    assert torch.isfinite(ours).all(), f"{what}: {int((~torch.isfinite(ours)).sum())} values are not finite"
    if ours.numel() == 0:
        return
    truth = truth.to(ours.device)
    error = (ours.double() - truth).abs().max().item()
    allowed = factor * (theirs.double() - truth).abs().max().item()
    units = 4.0 if ours.dtype == torch.float32 else 0.5
    allowed += units * torch.finfo(ours.dtype).eps * max(truth.abs().max().item(), terms)
    assert error <= allowed, f"{what}: largest error {error:.3e}, allowed {allowed:.3e}"


def wide(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same values in float64, as new leaves that require gradients where the originals do."""
    return tuple(None if t is None else t.detach().double().clone().requires_grad_(t.requires_grad) for t in tensors)
