"""What this machine has, which implementation an operator takes, and how operators are registered.

Every question about hardware, Triton and the compiled extension is answered here, in cached functions, none of them at
import: `import gpt2_kernels` works with no GPU, no driver and no Triton.

An operator has one schema under `torch.ops.gpt2_kernels`, and PyTorch dispatches it by device:

    CUDA                                     -> the Triton kernel
    CPU                                      -> the compiled extension where it has the operator, else PyTorch
    CPU, Triton in interpreter mode          -> the Triton kernel, interpreted: for tests and debugging
    meta, fake tensors, torch.compile        -> shapes alone
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpt2_kernels import _native

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # Triton is published for Linux alone; everywhere else its kernels are never launched
    HAS_TRITON = False

    class _Absent:
        """Stands in for `triton` and `tl` while kernels are defined: accepts any use, launches nothing."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else self

    triton = tl = _Absent()

OPS: dict[str, str] = {}  # operator -> what computes it on a CPU ("native", "torch"), or everywhere ("torch only")
library = torch.library.Library("gpt2_kernels", "DEF")

_forced: str | None = None  # set by `force` alone
interpreter_has_bfloat16 = False  # set to True by a test suite that has repaired Triton's interpreter


@functools.cache
def interpreting() -> bool:
    """True where Triton runs kernels on the CPU (TRITON_INTERPRET=1 at its first import; 0 means off)."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)


def accumulator(dtype: torch.dtype) -> Any:
    """The type in which kernels add and keep statistics: float32.

    float64 for float64 tensors, which no public function takes: in the interpreter, gradients of the very kernels are
    checked against finite differences in it.
    """
    return tl.float64 if dtype == torch.float64 else tl.float32


def architecture(device: torch.device) -> int:
    """Compute capability (80, 90, 100 ...) of the GPU whose launch table serves tensors of `device`.

    For CPU tensors it is the one that kernels are being compiled for offline; the interpreter takes Hopper's tables.
    """
    if device.type == "cuda":
        return _capability(device.index)
    return 90 if interpreting() else triton.runtime.driver.active.get_current_target().arch


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@contextlib.contextmanager
def force(path: str) -> Iterator[None]:
    """Take one path on CPU tensors whatever the machine offers: "triton", "native" or "torch". For tests and tools."""
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
    """Whether an operation on `tensor` goes to the compiled extension; builds it at the first question."""
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16) or _forced == "torch":
        return False
    if _forced == "native" and not _native.load():
        raise RuntimeError(f"the compiled operators were asked for: {_native.status()}")
    return _native.load()


def path_of(op: str, device: str) -> str:
    """What computes `op` on tensors of `device` ("cpu" or "cuda"), and why where it is not the best there is."""
    if op not in OPS:
        raise ValueError(f"path_of: op must be one of {sorted(OPS)}, got {op!r}")
    if OPS[op] == "torch only":
        return "PyTorch"
    if device == "cuda":
        return "Triton kernel" if HAS_TRITON else "PyTorch (Triton is not installed)"
    if triton_on_cpu():
        return "Triton kernel, interpreted"
    if OPS[op] == "torch":
        return "PyTorch"
    return "compiled C++" if native(torch.empty(0)) else f"PyTorch ({_native.status()})"


def distinct(*args: Any) -> tuple[Any, ...]:
    """The arguments of an autograd.Function, a tensor that comes again replaced by a view of itself while Dynamo
    traces: it refuses attention(x, x, x) otherwise."""
    if not torch.compiler.is_compiling():
        return args
    found: list[Any] = []
    for arg in args:
        again = isinstance(arg, torch.Tensor) and any(arg is earlier for earlier in found)
        found.append(arg.view_as(arg) if again else arg)
    return tuple(found)


def register(
    schema: str,
    *,
    triton_impl: Callable[..., Any],
    cpu_impl: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: str = "torch",
) -> None:
    """Define an operator of `torch.ops.gpt2_kernels`: its schema, its implementations and its shapes.

    `cpu` says what `cpu_impl` is made of ("native" where it calls the compiled extension), for `path_of`.
    """
    name = schema.split("(")[0]
    OPS[name] = cpu

    @functools.wraps(cpu_impl)
    def on_cpu(*args: Any) -> Any:
        if not triton_on_cpu():
            if torch.is_autocast_enabled("cpu"):  # or PyTorch's functions inside would change the dtype of the result
                with torch.autocast("cpu", enabled=False):
                    return cpu_impl(*args)
            return cpu_impl(*args)
        if interpreting() and not interpreter_has_bfloat16:
            if any(isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args):
                raise ValueError(
                    f"{name}: dtype must be float32 or float16 in Triton's interpreter, which computes bfloat16 "
                    f"wrongly, got torch.bfloat16"
                )
        return triton_impl(*args)

    def on_cuda(*args: Any) -> Any:
        # Triton launches on the current device, which need not be that of the tensors; the first argument is one.
        device = args[0].device
        if device.index == torch.cuda.current_device():
            return triton_impl(*args)
        with torch.cuda.device(device):
            return triton_impl(*args)

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, on_cuda if HAS_TRITON else cpu_impl, "CUDA")
    library.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"gpt2_kernels::{name}", fake, lib=library)
