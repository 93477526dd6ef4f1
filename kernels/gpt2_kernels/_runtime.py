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
from typing import Any, TypeVar

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

from gpt2_kernels import _native

try:
    import triton
    import triton.language as tl
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    HAS_TRITON = True
    _triton_run = JITFunction.run  # a tool that watches launches or turns them into compilations replaces it
except ImportError:  # Triton is published for Linux alone; everywhere else its kernels are never launched
    HAS_TRITON = False

    class _Absent:
        """Stands in for `triton` and `tl` while kernels are defined: accepts any use, launches nothing."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else self

    triton = tl = _Absent()

Function = TypeVar("Function", bound=Callable[..., Any])

NATIVE_DTYPES = (torch.float32, torch.bfloat16)  # of the compiled operators for CPUs
ALL_INSTRUCTIONS = 4  # the highest level of csrc's simd_level, with AMX
DOT_PRODUCTS = 3  # from here on products are compiled: AVX-512 with BF16 and VNNI

OPS: dict[str, str] = {}  # operator -> what computes it on a CPU, see `register`, or everywhere ("torch only")
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


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which those are stored: `accumulator` as torch names it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU that runs tensors of `device`; without one, an H200's."""
    return _multiprocessors(device.index) if device.type == "cuda" else 132


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


_tickets: dict[tuple[int, int, int], torch.Tensor] = {}


def tickets(number: int, device: torch.device) -> torch.Tensor:
    """At least that many int32 zeros, for programs that count each other; the kernel leaves them zero, for the next.

    Launches on one stream follow each other and share them. A CUDA graph captures their address, so they live for ever,
    and two graphs captured on one stream must not be replayed at the same time. What a stream has not used before it is
    captured is zeroed in the graph, at each replay: warm up on the stream that captures to save those launches.
    """
    if device.type != "cuda":
        return torch.zeros(number, dtype=torch.int32, device=device)  # a kernel that fails there may leave others
    size = max(4096, 1 << (number - 1).bit_length())  # a size that a graph holds stays when a larger one is needed
    key = device.index, driver.active.get_current_stream(device.index), size
    found = _tickets.get(key)
    if found is None:
        found = torch.zeros(size, dtype=torch.int32, device=device)
        if not torch.cuda.is_current_stream_capturing() and not _in_private_pool(found):
            _tickets[key] = found
    return found


def _in_private_pool(tensor: torch.Tensor) -> bool:
    """Whether its memory belongs to a graph, which gives it back with its other memory, or to torch.compile's.

    Allocators other than PyTorch's own, such as cudaMallocAsync, raise at the question: then it may.
    """
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:
        return True
    address = tensor.data_ptr()
    return any(
        segment["segment_pool_id"] != (0, 0) and 0 <= address - segment["address"] < segment["total_size"]
        for segment in segments
    )


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
    return tensor.dtype in NATIVE_DTYPES and native_indices(tensor)


def native_indices(tensor: torch.Tensor) -> bool:
    """`native` for an operation on integers alone."""
    if tensor.device.type != "cpu" or _forced == "torch":
        return False
    if _forced == "native" and not _native.load():
        raise RuntimeError(f"the compiled operators were asked for: {_native.status()}")
    return _native.load()


@functools.cache
def _simd_level() -> int:
    """What the compiled extension uses of the CPU's instructions. Its compiler may be too old for AMX, or the system
    refuse it."""
    return _native.ops().simd_level(ALL_INSTRUCTIONS)


@functools.cache
def has_amx() -> bool:
    """Whether the CPU has AMX, by PyTorch, whose oneDNN then multiplies bfloat16 there."""
    return torch.cpu._is_amx_tile_supported()


def native_products(x: torch.Tensor) -> bool:
    """Whether products of `x` with weights of its dtype go to the compiled extension."""
    if not native(x) or _simd_level() < DOT_PRODUCTS:
        return False
    return x.dtype == torch.float32 or _simd_level() == ALL_INSTRUCTIONS or not has_amx()


def torch_products(x: torch.Tensor) -> bool:
    """Whether PyTorch multiplies `x` faster, where rows need not be batch-invariant and no activation is to be fused.

    In float32 on an Intel Xeon ours takes 1.05 to 1.5 times as long from 128 rows on, on an AMD EPYC as long; in
    bfloat16 by AMX 1 to 1.9 times.
    """
    return _forced != "native" and x.numel() >= 128 * x.shape[-1] and (x.dtype == torch.float32 or has_amx())


def multiplies(x: torch.Tensor) -> bool:
    """Whether the CPU multiplies the dtype of `x` itself, so that PyTorch's products of it are fast."""
    if x.dtype == torch.bfloat16:
        return has_amx() or native_products(x)
    return x.dtype in (torch.float32, torch.float64)


def cpu_dtype() -> torch.dtype:
    """The faster dtype to generate in on this CPU: bfloat16 where it multiplies that itself, else float32."""
    if triton_on_cpu():  # the interpreter's bfloat16 is wrong
        return torch.float32
    return torch.bfloat16 if multiplies(torch.empty(0, dtype=torch.bfloat16)) else torch.float32


def path_of(op: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """What computes `op` on tensors of `device` ("cpu" or "cuda"), and why where it is not the best there is.

    `dtype` is that of the tensors; of the cache, for operators that have one.
    """
    if op not in OPS:
        raise ValueError(f"path_of: op must be one of {sorted(OPS)}, got {op!r}")
    if OPS[op] == "torch only":
        return "PyTorch"
    if OPS[op] == "int8":
        if device == "cuda":
            return "none: int8 weights are for CPUs"
        return "compiled C++" if native_products(torch.empty(0)) else "PyTorch"
    if OPS[op] == "layer":
        serves = device != "cuda" and not triton_on_cpu() and native_products(torch.empty(0, dtype=dtype))
        return "compiled C++" if serves else "none: its operators run one by one"
    if device == "cuda":
        return "Triton kernel" if HAS_TRITON else "PyTorch (Triton is not installed)"
    if triton_on_cpu():
        return "Triton kernel, interpreted"
    if OPS[op] == "torch":
        return "PyTorch"
    if dtype not in NATIVE_DTYPES:
        return f"PyTorch (the compiled operators know no {str(dtype).removeprefix('torch.')})"
    if not native(torch.empty(0, dtype=dtype)):
        return f"PyTorch ({_native.status()})"
    if OPS[op] == "products" and not native_products(torch.empty(0, dtype=dtype)):
        return "PyTorch (AMX)" if _simd_level() >= DOT_PRODUCTS else "PyTorch (no AVX-512 with BF16 and VNNI)"
    return "compiled C++"


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


# All that a launch depends on -> the kernel, and its compiled variant's launcher. Kernels are known by their id, since
# Triton hashes the source at every question, and kept beside, so that no other object can take that id.
_variants: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_GRID_REST = ((), (1, 1), (1,), ())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`, for half of the host's time: run-time arguments by position, constexprs by name.

    Triton itself chooses and compiles a variant, the first time; a launch that is equal in all that Triton looks at
    goes to that compiled kernel directly, with the arguments themselves, so that Triton's launcher still checks them.
    Everything unusual takes Triton's own way every time: the interpreter, autotuned kernels, launch hooks (profilers),
    tools that replace JITFunction.run, a pointer that is not 16-byte aligned, an integer past 32 bits, and arguments
    of any type but Tensor, int, float and None.
    """
    if type(kernel) is not JITFunction or JITFunction.run is not _triton_run:
        kernel[grid](*args, **meta)
        return
    knobs, active = triton.knobs, driver.active
    runtime, device = knobs.runtime, active.get_current_device()
    plain = not (
        getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
        or kernel.pre_run_hooks
        or runtime.add_stages_inspection_hook
    )
    # One entry for each argument, at least as fine as Triton's own specialization (tests/test_launch.py compares).
    key: list[Any] = [id(kernel), active, device, runtime.debug, knobs.compilation.instrumentation_mode]
    addresses = 0
    for a in args:
        kind = type(a)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            addresses |= a.data_ptr()
            key.append(a.dtype)
        elif a is None or kind is float:
            key.append(kind)
        elif kind is int and -0x80000000 <= a <= 0x7FFFFFFF:
            key.append(2 if a == 1 else not a & 15)  # no string, so that the names in meta begin where strings do
        else:
            plain = False
    if not plain or addresses & 15:
        kernel[grid](*args, **meta)
        return
    variant = _variants.get(found := (*key, *meta, *meta.values()))
    if variant is None:
        compiled = kernel[grid](*args, **meta)
        rest = kernel.params[len(args) :]
        if (
            isinstance(compiled, CompiledKernel)
            and compiled.metadata.target.backend == "cuda"
            and not kernel.used_global_vals  # Triton compares these at every launch
            and all(p.is_constexpr and p.name in meta for p in rest)
        ):
            constants = tuple(meta[p.name] for p in rest)  # Triton's launcher counts them as arguments
            _variants[found] = kernel, compiled.run, compiled.function, compiled.packed_metadata, constants
        return
    _, run, function, packed, constants = variant
    stream = active.get_current_stream(device)
    run(*grid, *_GRID_REST[len(grid)], stream, function, packed, None, None, None, *args, *constants)


def autocast(to: str) -> Callable[[Function], Function]:
    """Decorates a public function, whose tensors share a dtype: under torch.autocast it casts them to one first.

    to="lower" is autocast's own dtype, for matrix products and attention; to="float32" is for normalisation and losses.
    These are the choices that PyTorch makes for its functions on a GPU, and here they hold on a CPU too. The casts are
    ordinary ones, outside of the operator: gradients come back in the dtype of the parameters. float64 is left alone. A
    fused residual is cast like the rest; add it outside where a stream of residuals is to stay in float32.

    These being the functions that have gradients, it is here that forward-mode differentiation is refused: PyTorch asks
    an operator without a rule for it no question, and its result would count as a constant.
    """
    if to not in ("lower", "float32"):
        raise ValueError(f"autocast: to must be 'lower' or 'float32', got {to!r}")

    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return value
        device = value.device.type
        if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
            return value
        return value.to(torch.get_autocast_dtype(device) if to == "lower" else torch.float32)

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def on_cast(*args: Any, **kwargs: Any) -> Any:
            if forward_ad._current_level >= 0:  # asked here too, to save the call
                refuse_tangents(function.__name__.lstrip("_"), *args, *kwargs.values())
            if torch._C._is_any_autocast_enabled():  # one question in place of one for each kind of device
                return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})
            return function(*args, **kwargs)

        return on_cast  # type: ignore[return-value]

    return decorate


def refuse_tangents(op: str, *args: Any) -> None:
    if forward_ad._current_level < 0:  # neither in torch.func.jvp nor in forward_ad.dual_level: no tensor has one
        return
    for arg in args:
        if isinstance(arg, torch.Tensor) and _has_tangent(arg):
            raise ValueError(
                f"{op}: has no forward-mode derivative (jvp, jacfwd and hessian need one, backward() does not), got a "
                f"tensor with a tangent"
            )


def _has_tangent(tensor: torch.Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return forward_ad.unpack_dual(tensor).tangent is not None


def _refuse_gradient(name: str, args: tuple[Any, ...]) -> None:
    """A public function records its gradient and comes here with recording off. Whoever calls torch.ops.gpt2_kernels
    itself with recording on would get none, and PyTorch says so only in a warning of the backward pass."""
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.requires_grad:
            raise ValueError(
                f"{name}: torch.ops.gpt2_kernels.{name} records no gradient: call the function of gpt2_kernels, or use "
                f"torch.no_grad(), got a tensor with requires_grad=True"
            )


def register(
    schema: str,
    *,
    triton_impl: Callable[..., Any],
    cpu_impl: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: str = "torch",
) -> None:
    """Define an operator of `torch.ops.gpt2_kernels`: its schema, its implementations and its shapes.

    `cpu` says what `cpu_impl` is made of, for `path_of`: "native" where it calls the compiled extension, "products"
    where that needs a CPU with dot products as well, "torch"; "int8" has no kernel for a GPU, and "layer" is several
    operators in one call, on a CPU with dot products.
    """
    name = schema.split("(")[0]
    OPS[name] = cpu

    @functools.wraps(cpu_impl)
    def on_cpu(*args: Any) -> Any:
        if torch.is_grad_enabled():
            _refuse_gradient(name, args)
        if not triton_on_cpu():
            if torch.is_autocast_enabled("cpu"):  # or PyTorch's functions inside would change the dtype of the result
                with torch.autocast("cpu", enabled=False):
                    return cpu_impl(*args)
            return cpu_impl(*args)
        if interpreting() and not interpreter_has_bfloat16:
            for a in args:
                if isinstance(a, torch.Tensor) and a.dtype in (torch.bfloat16, torch.float8_e4m3fn):
                    raise ValueError(
                        f"{name}: dtype must be float32 or float16 in Triton's interpreter, which computes bfloat16 "
                        f"and float8 wrongly, got {a.dtype}"
                    )
        return triton_impl(*args)

    implementation = triton_impl if HAS_TRITON else cpu_impl

    def on_cuda(*args: Any) -> Any:
        if torch.is_grad_enabled():
            _refuse_gradient(name, args)
        # Triton launches on the current device, which need not be that of the tensors; the first argument is one.
        device = args[0].device
        if device.index == torch.cuda.current_device() and not torch.is_autocast_enabled("cuda"):
            return implementation(*args)
        with torch.cuda.device(device), torch.autocast("cuda", enabled=False):  # as on a CPU
            return implementation(*args)

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, on_cuda, "CUDA")
    library.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"gpt2_kernels::{name}", fake, lib=library)
