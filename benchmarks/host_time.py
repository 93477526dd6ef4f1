"""What a call costs the host, in microseconds: `python -m benchmarks.host_time`.

Small tensors, so that only the host's work counts; the fastest of many short loops, since other load on the machine can
only add time. With a GPU this is the real cost. Without one, our code, PyTorch's and Triton's runs as it would, down to
Triton's C launcher, on CPU tensors: the launches go to a CUDA driver that is compiled here and does nothing. Then the
time of the real driver and allocator, and of the checks of the device, is missing. PyTorch's layer_norm is there for
scale: without a GPU it is the CPU operator on 8 elements, kernels included.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import gpt2_kernels as ops
from gpt2_kernels import _launch, _overlap, _runtime, layernorm

C, ROWS = 768, 8
# Every driver function that Triton's launcher and loader link against; 0 is success.
DRIVER = r"""
#include <stddef.h>
int launches = 0;
int cuLaunchKernelEx(const void *config, void *f, void **args, void **extra) { launches++; return 0; }
int cuPointerGetAttribute(void *out, int what, unsigned long long p) { *(unsigned long long *)out = p; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)16; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)16; return 0; }
int cuModuleLoadData(void **m, const void *image) { *m = (void *)16; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = (void *)16; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = 227 << 10; return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { *v = a == 0 ? 1024 : 0; return 0; } /* 0: threads per block */
int cuCtxGetLimit(size_t *v, int l) { *v = 0; return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuStreamIsCapturing(void *s, int *status) { *status = 0; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "none"; return 0; }
int cuOccupancyMaxActiveClusters(int *n, void *f, void *c) { *n = 1; return 0; }
#define NOTHING(name) int name() { return 0; }
NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuFuncSetCacheConfig) NOTHING(cuFuncSetAttribute)
NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col) NOTHING(cuModuleUnload)
"""


class _IdleDriver:
    """Triton's own loader and launcher for one architecture, over a CUDA driver that does nothing."""

    def __init__(self, cc: int):
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        self.cc, self.utils, self.launcher_cls = cc, CudaUtils(), CudaLauncher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def idle_driver(cc: int = 90) -> Iterator[Callable[[], int]]:
    """Triton kernels launched on CPU tensors do everything but run; yields a function that counts the launches."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("idle_driver: Triton runs in interpreter mode; use a process without TRITON_INTERPRET")
    folder, library = _idle_library()
    before, active = triton.knobs.nvidia.libcuda_path, driver._active
    triton.knobs.nvidia.libcuda_path = folder.name
    try:
        driver.set_active(_IdleDriver(cc))
        with _runtime.force("triton"):
            yield lambda: ctypes.c_int.in_dll(library, "launches").value
    finally:
        driver._active = active
        triton.knobs.nvidia.libcuda_path = before


@functools.cache
def _idle_library() -> tuple[tempfile.TemporaryDirectory, ctypes.CDLL]:
    """Triton links against a file of this name and opens it by name; once loaded, this library serves both."""
    folder = tempfile.TemporaryDirectory()
    source, library = Path(folder.name) / "driver.c", Path(folder.name) / "libcuda.so.1"
    source.write_text(DRIVER)
    subprocess.run(
        ["cc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)], check=True
    )
    return folder, ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def microseconds(call: Callable[[], Any], loops: int = 200, repeats: int = 60) -> float:
    """Time per call in the fastest of `repeats` loops: wall time with a GPU, else CPU time, which other processes do
    not affect."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for _ in range(loops):
        call()
    best = float("inf")
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else a full queue would make the host wait
        start = clock()
        for _ in range(loops):
            call()
        best = min(best, clock() - start)
    return best / loops * 1e6


def measure(device: torch.device, time_of: Callable[[Callable[[], Any]], float] = microseconds) -> dict[str, float]:
    """Name -> microseconds; an indented name is a part of the one above it."""
    x, dy = (torch.randn(ROWS, C, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight, bias = (torch.randn(C, device=device, dtype=torch.bfloat16) for _ in range(2))
    y, statistics = torch.empty_like(x), torch.empty(2, ROWS, device=device)
    arguments = (x, None, weight, bias, y, None, statistics, ROWS, C, 0, 1e-5)
    options = dict(C=C, BLOCK_C=1024, ACC=layernorm.accumulator(x.dtype), num_warps=1, **_overlap.options(device))
    kernel = layernorm.layer_norm_kernel
    found: dict[str, float] = {}
    with torch.no_grad():
        found["layer_norm, no gradient"] = total = time_of(lambda: ops.layer_norm(x, weight, bias))
        operator = time_of(lambda: layernorm._layer_norm_op(x, weight, bias, 1e-5, False))
        implementation = time_of(lambda: layernorm._layer_norm_triton(x, weight, bias, 1e-5, False))
        launched = time_of(lambda: _launch.launch(kernel, (ROWS,), *arguments, **options))
        allocated = time_of(lambda: torch.empty_like(x, memory_format=torch.contiguous_format))
        found["  checks, autocast, contiguous"] = total - operator
        found["  dispatcher"] = operator - implementation
        found["  allocation"] = allocated
        found["  launch"] = launched
        found["  the rest"] = implementation - allocated - launched
        found["launch"] = launched
        found["kernel[grid], Triton's own way"] = time_of(lambda: kernel[(ROWS,)](*arguments, **options))
        backward = time_of(
            lambda: layernorm._backward_op(dy, None, x, weight, statistics, True, True, True)
        )  # two launches, four allocations
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    found["layer_norm, with gradient"] = forward = time_of(lambda: ops.layer_norm(x, weight, bias))
    found["  autograd.Function, statistics"] = forward - total
    both = time_of(lambda: torch.autograd.grad(ops.layer_norm(x, weight, bias), leaves, dy))
    found["layer_norm, forward and backward"] = both
    found["  forward"] = forward
    found["  backward operator"] = backward
    found["  autograd engine"] = both - forward - backward

    shape = (ROWS, C) if device.type == "cuda" else (1, 8)
    x, dy = (torch.randn(shape, device=device) for _ in range(2))
    weight, bias = (torch.randn(shape[1], device=device) for _ in range(2))
    with torch.no_grad():
        found["F.layer_norm, no gradient"] = time_of(lambda: F.layer_norm(x, shape[1:], weight, bias))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    found["F.layer_norm, with gradient"] = time_of(lambda: F.layer_norm(x, shape[1:], weight, bias))
    found["F.layer_norm, forward and backward"] = time_of(
        lambda: torch.autograd.grad(F.layer_norm(x, shape[1:], weight, bias), leaves, dy)
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    with contextlib.nullcontext() if gpu else idle_driver():
        found = measure(torch.device("cuda" if gpu else "cpu"))
    machine = torch.cuda.get_device_name() if gpu else "no GPU: a driver that does nothing"
    if options.json:
        print(json.dumps({"machine": machine, "torch": torch.__version__, "triton": triton.__version__, "us": found}))
        return
    print(f"torch {torch.__version__}, triton {triton.__version__}, {machine}; us per call")
    for name, value in found.items():
        print(f"{name:38} {value:7.2f}")


if __name__ == "__main__":
    main()
