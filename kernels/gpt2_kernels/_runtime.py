"""What this machine has: GPU, Triton, the compiled extension, and the dtypes its CPU multiplies natively.

All such queries are here and none runs at import: `import gpt2_kernels` works with no GPU, no driver and no Triton.
What is slow to find out is cached.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from gpt2_kernels import _native

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # Triton is published for Linux only; everywhere else its kernels are never launched
    HAS_TRITON = False

    class _Absent:
        """Stands in for `triton` and `tl` while kernels are defined: accepts any use, launches nothing."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else self

    triton = tl = _Absent()

FLOAT8 = torch.float8_e4m3fn  # for key-value caches only
OLDEST_GPU = 80  # compute capability, 10 major + minor, from which all kernels compile
OLDEST_FLOAT8_GPU = 89  # for float8 caches: Triton compiles float8_e4m3fn for GPUs that convert it in hardware
NATIVE_DTYPES = (torch.float32, torch.bfloat16)  # of the compiled CPU operators
ALL_INSTRUCTIONS = 4  # the highest level of csrc's simd_level, with AMX
DOT_PRODUCTS = 3  # matmuls are compiled from this level on: AVX-512 with BF16 and VNNI

_forced: str | None = None  # set by `force` only
interpreter_has_bfloat16 = False  # set to True by a test suite that has repaired Triton's interpreter


@functools.cache
def interpreting() -> bool:
    """True where Triton runs kernels on the CPU (TRITON_INTERPRET=1 at its first import; 0 means off)."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)


def accumulator(dtype: torch.dtype) -> Any:
    """The type in which kernels accumulate and keep statistics: float32.

    float64 for float64 tensors, which no public function takes: tests use it in the interpreter to check the kernels'
    own gradients against finite differences.
    """
    return tl.float64 if dtype == torch.float64 else tl.float32


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics are stored: `accumulator` as a torch dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def architecture(device: torch.device) -> int:
    """Compute capability (80, 90, 100 ...) of the GPU whose launch tables apply to tensors on `device`.

    For CPU tensors it is the target of offline compilation; the interpreter uses Hopper's tables.
    """
    if device.type == "cuda":
        return _capability(device.index)
    return 90 if interpreting() else triton.runtime.driver.active.get_current_target().arch


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def gpu_refusal(device: torch.device | None = None, cache_dtype: torch.dtype | None = None) -> str | None:
    """Why the kernels do not support a GPU (None: the current one), or a cache of that dtype on it; None if they do.

    The text names the rule and the GPU's compute capability.
    """
    if device is None and not torch.cuda.is_available():
        return "there is no GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return too_old(10 * major + minor, cache_dtype)


def too_old(architecture: int, cache_dtype: torch.dtype | None) -> str | None:
    """`gpu_refusal` for a compute capability, 10 major + minor."""
    what, oldest = "kernels need", OLDEST_GPU
    if cache_dtype == FLOAT8:
        what, oldest = f"a {FLOAT8} cache needs", OLDEST_FLOAT8_GPU
    if architecture >= oldest:
        return None
    need, got = ("{}.{}".format(*divmod(capability, 10)) for capability in (oldest, architecture))
    return f"{what} a GPU of compute capability {need} or later, got {got}"


def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors (SMs) of `device`; without a GPU, an H200's."""
    return _multiprocessors(device.index) if device.type == "cuda" else 132


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@contextlib.contextmanager
def force(path: str) -> Iterator[None]:
    """Force one path for CPU tensors whatever the machine has: "triton", "native" or "torch". For tests and tools."""
    global _forced
    if path not in ("triton", "native", "torch"):
        raise ValueError(f"force: path must be 'triton', 'native' or 'torch', got {path!r}")
    previous, _forced = _forced, path
    try:
        yield
    finally:
        _forced = previous


def triton_on_cpu() -> bool:
    """Whether CPU tensors go to the Triton kernels: in interpreter mode, or while a tool compiles them offline."""
    return _forced == "triton" or (_forced is None and interpreting())


def native(tensor: torch.Tensor) -> bool:
    """Whether an operation on `tensor` goes to the compiled extension; the first call builds it."""
    return tensor.dtype in NATIVE_DTYPES and native_indices(tensor)


def native_indices(tensor: torch.Tensor) -> bool:
    """`native` for an operation on integers only."""
    if tensor.device.type != "cpu" or _forced == "torch":
        return False
    if _forced == "native" and not _native.load():
        raise RuntimeError(f"the compiled operators were asked for: {_native.status()}")
    return _native.load()


@functools.cache
def simd_level() -> int:
    """The level of CPU instructions that the compiled extension uses. Its compiler may be too old for AMX, or the
    system may refuse it."""
    return _native.ops().simd_level(ALL_INSTRUCTIONS)


@functools.cache
def has_amx() -> bool:
    """Whether the CPU has AMX according to PyTorch, whose oneDNN then multiplies bfloat16 with it."""
    return torch.cpu._is_amx_tile_supported()


def native_products(x: torch.Tensor) -> bool:
    """Whether matmuls of `x` with weights of its dtype go to the compiled extension."""
    if not native(x) or simd_level() < DOT_PRODUCTS:
        return False
    return x.dtype == torch.float32 or simd_level() == ALL_INSTRUCTIONS or not has_amx()


def torch_products(x: torch.Tensor) -> bool:
    """Whether PyTorch's matmul of `x` is faster, if rows need not be batch-invariant and no activation is fused.

    From 128 rows on, ours takes 1.05 to 1.5 times as long in float32 on an Intel Xeon and as long on an AMD EPYC; in
    bfloat16 with AMX, 1 to 1.9 times.
    """
    return _forced != "native" and x.numel() >= 128 * x.shape[-1] and (x.dtype == torch.float32 or has_amx())


def multiplies(x: torch.Tensor) -> bool:
    """Whether the CPU multiplies the dtype of `x` natively, so that PyTorch's matmuls in it are fast."""
    if x.dtype == torch.bfloat16:
        return has_amx() or native_products(x)
    return x.dtype in (torch.float32, torch.float64)


def cpu_dtype() -> torch.dtype:
    """The faster dtype for generation on this CPU: bfloat16 where the CPU multiplies it natively, else float32."""
    if triton_on_cpu():  # the interpreter's bfloat16 is wrong
        return torch.float32
    return torch.bfloat16 if multiplies(torch.empty(0, dtype=torch.bfloat16)) else torch.float32
