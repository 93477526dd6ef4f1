"""Programmatic dependent launch (Hopper and later): a decode step's kernels start while the previous one is ending.

A step of one text is some 90 kernels of a few microseconds each, and between two of them a multiprocessor idles for the
launch and the last program: an estimated 1 to 1.5 us, not yet measured. A kernel launched with launch_pdl may start
once every program of the previous kernel, on its stream or in its graph, has called gdc_launch_dependents or exited.

- Every program calls `wait` before it reads or writes global memory. It blocks until the previous kernel has finished
  and its stores are visible. That kernel waited in the same way, so all earlier ones have finished too. Before the call
  a program may `prefetch`, which reads nothing: L2 is coherent, so lines in it see later stores.
- `wait` lets the next kernel start only afterwards, so that at most two are in flight.

After a kernel that is not one of these the code is the same: there is just little to wait for.
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
    """Launch without overlap, as on older GPUs. For tests and benchmarks that compare the two."""
    global _enabled
    previous, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = previous


def options(device: torch.device) -> dict[str, Any]:
    """Launch options for a kernel that calls wait(OVERLAP)."""
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
    """Block until the previous kernel has finished, then let the next one start."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Request the 128-byte cache lines of these addresses into L2, without waiting."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )
