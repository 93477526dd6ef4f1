"""How an operator is made: registration, dispatch by device, autocast, and refusal of the gradients it lacks.

An operator has one schema under `torch.ops.gpt2_kernels`, and PyTorch dispatches it by device:

    CUDA                                     -> the Triton kernel
    CPU                                      -> the compiled extension where it has the operator, else PyTorch
    CPU, Triton in interpreter mode          -> the Triton kernel, interpreted: for tests and debugging
    meta, fake tensors, torch.compile        -> shapes alone
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

from gpt2_kernels import _native, _runtime

Function = TypeVar("Function", bound=Callable[..., Any])

OPS: dict[str, str] = {}  # operator -> what computes it on a CPU, see `register`, or everywhere ("torch only")
library = torch.library.Library("gpt2_kernels", "DEF")


def register(
    schema: str,
    *,
    triton_impl: Callable[..., Any],
    cpu_impl: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: str = "torch",
) -> None:
    """Define an operator of `torch.ops.gpt2_kernels`: its schema, its implementations and its shapes.

    `cpu` tells `path_of` what `cpu_impl` uses: "native" is the compiled extension, "products" the same where the CPU
    has dot-product instructions, "torch" PyTorch; "int8" has no GPU kernel, and "layer" is several operators in one
    call, on a CPU with dot-product instructions.
    """
    name = schema.split("(")[0]
    OPS[name] = cpu

    @functools.wraps(cpu_impl)
    def on_cpu(*args: Any) -> Any:
        if torch.is_grad_enabled():
            _refuse_gradient(name, args)
        if not _runtime.triton_on_cpu():
            if torch.is_autocast_enabled("cpu"):  # else PyTorch's functions inside would change the dtype of the result
                with torch.autocast("cpu", enabled=False):
                    return cpu_impl(*args)
            return cpu_impl(*args)
        if _runtime.interpreting() and not _runtime.interpreter_has_bfloat16:
            for a in args:
                if isinstance(a, torch.Tensor) and a.dtype in (torch.bfloat16, _runtime.FLOAT8):
                    raise ValueError(
                        f"{name}: dtype must be float32 or float16 in Triton's interpreter, which computes bfloat16 "
                        f"and float8 wrongly, got {a.dtype}"
                    )
        return triton_impl(*args)

    implementation = triton_impl if _runtime.HAS_TRITON else cpu_impl

    def on_cuda(*args: Any) -> Any:
        if torch.is_grad_enabled():
            _refuse_gradient(name, args)
        # Triton launches on the current device, which may not be the tensors' device; the first argument is a tensor.
        device = args[0].device
        if device.index == torch.cuda.current_device() and not torch.is_autocast_enabled("cuda"):
            return implementation(*args)
        with torch.cuda.device(device), torch.autocast("cuda", enabled=False):  # as on a CPU
            return implementation(*args)

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, on_cuda, "CUDA")
    library.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"gpt2_kernels::{name}", fake, lib=library)


def _refuse_gradient(name: str, args: tuple[Any, ...]) -> None:
    """Public functions record their own gradient and get here with grad mode off. A direct call of
    torch.ops.gpt2_kernels in grad mode would get no gradient, and PyTorch would only warn of it in backward."""
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.requires_grad:
            raise ValueError(
                f"{name}: torch.ops.gpt2_kernels.{name} records no gradient: call the function of gpt2_kernels, or use "
                f"torch.no_grad(), got a tensor with requires_grad=True"
            )


def path_of(op: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """What computes `op` on tensors of `device` ("cpu" or "cuda") and, where that is not the best path, why.

    `dtype` is that of the tensors, or of the cache for operators that have one.
    """
    if op not in OPS:
        raise ValueError(f"path_of: op must be one of {sorted(OPS)}, got {op!r}")
    like = torch.empty(0, dtype=dtype)
    if OPS[op] == "torch only":
        return "PyTorch"
    if OPS[op] == "int8":
        if device == "cuda":
            return "none: int8 weights are for CPUs"
        return "compiled C++" if _runtime.native_products(torch.empty(0)) else "PyTorch"
    if OPS[op] == "layer":
        serves = device != "cuda" and not _runtime.triton_on_cpu() and _runtime.native_products(like)
        return "compiled C++" if serves else "none: its operators run one by one"
    if device == "cuda":
        if not _runtime.HAS_TRITON:
            return "PyTorch (Triton is not installed)"
        refusal = torch.cuda.is_available() and _runtime.gpu_refusal(cache_dtype=dtype)
        return f"none: {refusal}" if refusal else "Triton kernel"
    if _runtime.triton_on_cpu():
        return "Triton kernel, interpreted"
    if OPS[op] == "torch":
        return "PyTorch"
    if dtype not in _runtime.NATIVE_DTYPES:
        return f"PyTorch (the compiled operators know no {str(dtype).removeprefix('torch.')})"
    if not _runtime.native(like):
        return f"PyTorch ({_native.status()})"
    if OPS[op] == "products" and not _runtime.native_products(like):
        if _runtime.simd_level() >= _runtime.DOT_PRODUCTS:
            return "PyTorch (AMX)"
        return "PyTorch (products need AVX-512 with BF16 and VNNI, in the CPU and in its C++ compiler)"
    return "compiled C++"


def autocast(to: str) -> Callable[[Function], Function]:
    """Decorates a public function whose tensors share a dtype: under torch.autocast it first casts them to one.

    to="lower" is autocast's own dtype, for matrix products and attention; to="float32" is for normalisation and losses.
    PyTorch makes the same choices for its functions on a GPU; here they hold on a CPU too. The casts are ordinary ones,
    outside the operator, so gradients come back in the dtype of the parameters. float64 is left alone. A fused residual
    is cast like the rest; add it outside if the residual stream is to stay in float32.

    Since these are the functions that have gradients, forward-mode differentiation is refused here: PyTorch does not
    check whether an operator has a rule for it, and would treat the result as a constant.
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
            if forward_ad._current_level >= 0:  # checked here too, to save the call
                refuse_tangents(function.__name__.lstrip("_"), *args, *kwargs.values())
            if torch._C._is_any_autocast_enabled():  # one check instead of one per device type
                return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})
            return function(*args, **kwargs)

        return on_cast  # type: ignore[return-value]

    return decorate


def refuse_tangents(op: str, *args: Any) -> None:
    if forward_ad._current_level < 0:  # neither in torch.func.jvp nor in forward_ad.dual_level: no tensor has a tangent
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


def distinct(*args: Any) -> tuple[Any, ...]:
    """The arguments of an autograd.Function, with repeated tensors replaced by views of themselves while Dynamo traces:
    it rejects attention(x, x, x) otherwise."""
    if not torch.compiler.is_compiling():
        return args
    found: list[Any] = []
    for arg in args:
        again = isinstance(arg, torch.Tensor) and any(arg is earlier for earlier in found)
        found.append(arg.view_as(arg) if again else arg)
    return tuple(found)
