"""Which device a name means, checked before anything is read or allocated there."""

from __future__ import annotations

import torch

import gpt2_kernels as ops


def device_of(device: str | torch.device | None, option: str) -> torch.device:
    """The device of that name; None means the GPU if there is one that the kernels compile for, else the CPU.

    Raises ValueError, beginning with `option`, for what is not a device, is not here, or is too old a GPU.
    """
    if device is None:
        return torch.device("cpu" if ops.gpu_refusal() else "cuda")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{option} must be a device that PyTorch knows, such as cpu or cuda, got {device!r}") from None
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if (found.index or 0) >= count:
            raise ValueError(f"{option} must exist, got '{found}' with {count} GPUs")
        if refusal := ops.gpu_refusal(found):
            raise ValueError(f"{option} '{found}': {refusal}")
    return found
