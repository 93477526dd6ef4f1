"""Programmatic dependent launch (Hopper and later): kernels of a decode step start while the previous one ends.

A decode step for one text is some 90 kernels of a few microseconds, and between two of them an SM waits for the launch
and for the last program: an estimated 1 to 1.5 us, not yet measured. A kernel launched with launch_pdl may start once
every program of the previous kernel, on its stream or in its graph, has called gdc_launch_dependents or exited.

- Every program calls `wait` before it reads or writes global memory. It blocks until the previous kernel has ended and
  its stores are visible. That one waited in the same way, so all earlier ones have ended too. Before the call a program
  may `prefetch`, which reads nothing: L2 is coherent with what others store.
- Only then does `wait` let the next kernel start, so that at most two are in flight.

The instructions are the same where the previous kernel is not one of these: then there is little to wait for.
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
    """Each launch waits for the previous kernel, as on older GPUs. For tests and benchmarks that compare."""
    global _enabled
    previous, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = previous


def options(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that calls wait(OVERLAP)."""
    on = _enabled and not _runtime.interpreting() and _runtime.architecture(device) >= 90
    on = on and (device.type != "cuda" or _in_graphs())
    return {"OVERLAP": on, "launch_pdl": on}


@functools.cache
def _in_graphs() -> bool:
    """Whether the driver can capture such launches in a graph: from CUDA 12.3 on."""
    version = ctypes.c_int(0)
    return ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value >= 12030


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Waits until the previous kernel has ended, then lets the next one start."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Prefetches the 128-byte cache lines that hold these addresses into L2, without waiting."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )
