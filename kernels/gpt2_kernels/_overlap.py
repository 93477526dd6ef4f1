"""Kernels of a decode step that start while the one before them ends: programmatic dependent launch, Hopper and later.

A step of one text is some 90 kernels of a few microseconds, and between two of them a multiprocessor waits for the
launch and for the last program: 1 to 1.5 us by estimate, not yet measured. A kernel launched with launch_pdl may start
once every program of the one before it, on its stream or in its graph, has called gdc_launch_dependents or ended.

- Every program calls `wait` before it reads or writes global memory. There it waits until the kernel before it has
  ended and its stores are visible. That one has waited in the same way, so all before it have ended too. Ahead of the
  call a program may `prefetch`, which reads nothing: lines in L2 are one with what others store.
- `wait` lets the next kernel start only then, so that no more than two are under way.

The instructions are the same where the kernel before is not one of these: then there is little to wait for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
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
    on = on and (device.type != "cuda" or _in_graphs())
    return {"OVERLAP": on, "launch_pdl": on}


@functools.cache
def _in_graphs() -> bool:
    """Whether the driver captures such launches in a graph: it does from CUDA 12.3 on."""
    version = ctypes.c_int(0)
    return ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value >= 12030


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
