"""Kernels of a decode step that start while the one before them ends: programmatic dependent launch, Hopper and later.

A step of one text is some 90 kernels of a few microseconds, and between two of them a multiprocessor waits for the
launch and for the last program, 1 to 1.5 us. A kernel launched with launch_pdl may start once every program of the one
before it, on its stream or in its graph, has called gdc_launch_dependents or ended. Two rules make that safe:

- Each program calls `wait` before it reads or writes anything that another kernel writes or reads. There it waits until
  the kernel before it has ended and its stores are visible; what comes before the call may touch constants alone.
- `wait` lets the next kernel start only then, so that no more than two are under way, and whoever is past its own
  `wait` knows that everything before the kernel before it has ended too.

They are the same instructions where the kernel before is not one of these: then there is little to wait for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from gpt2_kernels import _runtime
from gpt2_kernels._runtime import tl, triton

_enabled = True  # set to False by `disabled` alone


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Kernels wait for each other in the launch, as on older GPUs. For tests and benchmarks that compare."""
    global _enabled
    previous, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = previous


def options(device: torch.device) -> dict[str, Any]:
    """Of the launch of a kernel that calls wait(OVERLAP)."""
    on = _enabled and not _runtime.interpreting() and _runtime.architecture(device) >= 90
    return {"OVERLAP": on, "launch_pdl": on}


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until the kernel before has ended; then lets the next one start."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Asks for the cache lines of 128 bytes that hold these addresses, into L2, and waits for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )
