"""Repairs of Triton's interpreter, so that kernels run on a CPU give the numbers that a GPU would give.

The stock interpreter (triton 3.6 and 3.7) multiplies bfloat16 bit patterns as integers, truncates float32 -> bfloat16,
ignores `tl.device_assert`, and refuses autotuned kernels, libdevice and inline assembly. `install()` fixes that, in
this process only:

    os.environ["TRITON_INTERPRET"] = "1"    # before the first `import triton`
    import interpreter
    interpreter.install()

The interpreter holds bfloat16 as uint16 and float8 as uint8: the repairs of arithmetic decide when to decode and when
to encode those. A kernel must call libdevice through its module (`libdevice.tanh(x)`), or import the function after
`install()`.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import TensorHandle as Handle  # true when `data.all()`: never write `handle or other`

# Only these two float8 formats exist on NVIDIA GPUs; a conversion saturates at the largest finite value.
FLOAT8 = {tl.float8e4nv: (torch.float8_e4m3fn, 448.0), tl.float8e5: (torch.float8_e5m2, 57344.0)}

# What a one-instruction piece of inline assembly computes. Extend it when a kernel uses another instruction.
ASM: dict[str, Callable] = {
    "ex2.approx.f32": np.exp2,
    "ex2.approx.ftz.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "lg2.approx.ftz.f32": np.log2,
    "rcp.approx.ftz.f32": np.reciprocal,
    "rsqrt.approx.ftz.f32": lambda x: 1 / np.sqrt(x),
    "tanh.approx.f32": np.tanh,
}

LIBDEVICE: dict[str, Callable] = {
    "exp": np.exp,
    "fast_expf": np.exp,
    "fast_log2f": np.log2,
    "fast_logf": np.log,
    "log": np.log,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
}


def install(
    *, debug_asserts: bool = True, overflow_checks: bool = False, tf32: bool = False, gpu_min_dot: bool = True
) -> None:
    """Repairs the interpreter once; a later call only changes the settings.

    debug_asserts: `tl.device_assert` raises.
    overflow_checks: int32 overflow raises (about twice as slow; needs debug_asserts).
    tf32: float32 operands of `tl.dot` are rounded as tensor cores round them, unless the kernel asks for "ieee".
    gpu_min_dot: `tl.dot` refuses K < 16 (K < 32 for 8-bit operands), as the GPU compiler does.
    """
    if not isinstance(tl.sum, stock.InterpretedFunction):
        raise RuntimeError("interpreter.install: set TRITON_INTERPRET=1 before the first import of triton")
    builder = stock.interpreter_builder
    if not hasattr(builder, "round_tf32"):
        for repair in REPAIRS:
            repair()
    builder.round_tf32 = tf32
    builder.options = dataclasses.replace(builder.options, debug=debug_asserts, sanitize_overflow=overflow_checks)
    builder.codegen_fns["min_dot_size"] = _gpu_min_dot_size if gpu_min_dot else _any_dot_size


def _gpu_min_dot_size(lhs: tl.dtype, rhs: tl.dtype) -> tuple[int, int, int]:
    return (1, 1, 32 if lhs.scalar.primitive_bitwidth == 8 else 16)


def _any_dot_size(lhs: tl.dtype, rhs: tl.dtype) -> tuple[int, int, int]:
    return (1, 1, 1)


# --- number formats -------------------------------------------------------------------------------------------------


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Decodes uint16 bit patterns; exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """Encodes as uint16 bit patterns: round to nearest, ties to even; a NaN stays a NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    if toward_zero:
        return (bits >> 16).astype(np.uint16)
    ties_to_even = np.uint32(0x7FFF) + ((bits >> 16) & 1)
    rounded = ((bits + ties_to_even) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def float32_to_tf32(values: np.ndarray) -> np.ndarray:
    """Keeps ten bits of mantissa: round to nearest, ties away from zero, as `cvt.rna.tf32.f32` does."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def float8_to_float32(bits: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Decodes uint8 bit patterns of one of the FLOAT8 formats; exact."""
    torch_dtype, _ = FLOAT8[dtype]
    return torch.from_numpy(np.array(bits)).view(torch_dtype).float().numpy()


def float32_to_float8(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Encodes as uint8 bit patterns: round to nearest even, saturating at the largest number (PTX `satfinite`)."""
    torch_dtype, largest = FLOAT8[dtype]
    clamped = torch.from_numpy(np.array(values, dtype=np.float32)).clamp(-largest, largest)
    return clamped.to(torch_dtype).view(torch.uint8).numpy()


def _decode(handle: Handle) -> np.ndarray:
    """The handle's values: bfloat16 and float8 as float32, everything else unchanged."""
    dtype = handle.dtype.scalar
    if dtype == tl.bfloat16:
        return bfloat16_to_float32(handle.data)
    if dtype in FLOAT8:
        return float8_to_float32(handle.data, dtype)
    return handle.data


def _convert(source: Handle, target: tl.dtype, toward_zero: bool = False) -> Handle | None:
    """The conversions that the stock interpreter gets wrong; None for all others."""
    origin = source.dtype.scalar
    if origin == target:
        return None
    if target == tl.bfloat16:
        return Handle(float32_to_bfloat16(_decode(source), toward_zero), target)
    if target in FLOAT8:
        return Handle(float32_to_float8(_decode(source), target), target)
    if origin == tl.bfloat16 or origin in FLOAT8:
        return Handle(_decode(source).astype(stock._get_np_dtype(target)), target)
    return None


# --- the repairs, each one independent of the others ----------------------------------------------------------------


def _repair_conversions() -> None:
    """Conversions from and to bfloat16 and float8 convert values and round to nearest even."""
    stock_cast, stock_fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self, source, target_type):
        converted = _convert(source, target_type.scalar)
        return stock_cast(self, source, target_type) if converted is None else converted

    def create_fp_to_fp(self, source, target_type, rounding_mode):
        toward_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
        target = target_type.scalar
        converted = _convert(source, target, toward_zero)
        if converted is None and target == tl.float16 and not toward_zero:
            converted = Handle(source.data.astype(np.float16), target)
        return stock_fp_to_fp(self, source, target_type, rounding_mode) if converted is None else converted

    Builder.cast_impl = cast_impl
    Builder.create_fp_to_fp = create_fp_to_fp


def _repair_arithmetic() -> None:
    """bfloat16 operations compute in float32 and round once each; comparisons compare values, not bit patterns, and
    give int1: stock ones keep the operands' type, so that a block made of one scalar comparison is not a mask.

    The functions of tl.math take no bfloat16, and tl.sum, max, clamp and the like promote it themselves.
    """
    stock_binary_op, stock_fma = Builder.binary_op, Builder.create_fma

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar != tl.bfloat16:
            result = stock_binary_op(self, lhs, rhs, op)
            return Handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result
        result = op(_decode(lhs), _decode(rhs))
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return Handle(float32_to_bfloat16(result), tl.bfloat16)

    def create_fma(self, x, y, z):
        if z.dtype.scalar != tl.bfloat16:
            return stock_fma(self, x, y, z)
        return Handle(float32_to_bfloat16(_decode(x) * _decode(y) + _decode(z)), tl.bfloat16)

    Builder.binary_op = binary_op
    Builder.create_fma = create_fma


def _repair_dot() -> None:
    """tl.dot multiplies decoded operands and adds in the accumulator's type, or in float32 if that is wider."""

    def create_dot(self, lhs, rhs, accumulator, input_precision, max_num_imprecise_acc):
        a, b = _decode(lhs), _decode(rhs)
        if self.round_tf32 and lhs.data.dtype == np.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            a, b = float32_to_tf32(a), float32_to_tf32(b)
        accumulator_type = accumulator.data.dtype
        product = np.matmul(a, b, dtype=np.promote_types(accumulator_type, a.dtype))
        return Handle((product + accumulator.data).astype(accumulator_type), accumulator.dtype.scalar)

    Builder.create_dot = create_dot


def _repair_atomics() -> None:
    """tl.atomic_add on bfloat16, lane by lane, so that all lanes with the same address count."""
    stock_rmw = Builder.create_atomic_rmw

    def create_atomic_rmw(self, operation, pointer, value, mask, semantics, scope):
        if value.dtype.scalar != tl.bfloat16:
            return stock_rmw(self, operation, pointer, value, mask, semantics, scope)
        if operation != ir.ATOMIC_OP.FADD:
            raise NotImplementedError("bfloat16 atomics other than add")
        previous = np.zeros(pointer.data.shape, np.uint16)
        for lane in zip(*np.nonzero(mask.data), strict=True):
            previous[lane] = _add_bfloat16_at(pointer.data[lane], value.data[lane])
        return Handle(previous, tl.bfloat16)

    Builder.create_atomic_rmw = create_atomic_rmw


def _add_bfloat16_at(address: np.uint64, addend: np.uint16) -> np.uint16:
    """Adds to the bfloat16 in memory at `address` and returns what was there."""
    where, active = np.array([address]), np.ones(1, bool)
    before = stock._interpreter.load(where, active, np.zeros(1, np.uint16), np.dtype(np.uint16))
    after = bfloat16_to_float32(before) + bfloat16_to_float32(np.array([addend]))
    stock._interpreter.store(where, float32_to_bfloat16(after), active)
    return before[0]


def _repair_constants() -> None:
    """bfloat16 constants, and `~x` on unsigned integers (numpy 2 refuses to build a uint32 from -1)."""
    stock_all_ones = Builder.get_all_ones_value

    def get_bf16(self, value):
        return Handle(float32_to_bfloat16(np.array([value], np.float32)), tl.bfloat16)

    def get_all_ones_value(self, dtype):
        numpy_dtype = stock._get_np_dtype(dtype)
        if numpy_dtype.kind != "u":
            return stock_all_ones(self, dtype)
        return Handle(np.array([np.iinfo(numpy_dtype).max], numpy_dtype), dtype.scalar)

    Builder.get_bf16 = get_bf16
    Builder.get_all_ones_value = get_all_ones_value


def _repair_asserts() -> None:
    """tl.device_assert names the program that failed (install() also switches it on)."""

    def create_assert(self, condition, message):
        if not np.all(condition.data):
            raise AssertionError(f"device_assert in program {self.grid_idx}: {message}")

    Builder.create_assert = create_assert


def _repair_index() -> None:
    """`range(0, n)` with a run-time n: triton 3.6 calls int() on an array of one element, which numpy 2.4 refuses."""
    stock_patch = stock._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        stock_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    stock._patch_lang_tensor = patch_lang_tensor


def _repair_reductions() -> None:
    """tl.reduce and tl.associative_scan with any combine function: log2(n) calls on blocks, not n calls on scalars."""
    stock.ReduceOps.generic_reduce = _reduce_by_halves
    stock.ScanOps.generic_scan = _scan_by_doubling


def _combine(function, left: list[np.ndarray], right: list[np.ndarray], dtypes: list[tl.dtype]) -> list[np.ndarray]:
    """One call of the combine function on whole blocks; each result keeps its input's numpy type."""

    def block(data, dtype):
        return tl.core.tensor(Handle(data, dtype.scalar), tl.block_type(dtype.scalar, list(data.shape)))

    arguments = [block(data, dtype) for side in (left, right) for data, dtype in zip(side, dtypes, strict=True)]
    results = function.fn(*arguments)
    results = results if isinstance(results, (tuple, list)) else (results,)
    return [
        np.asarray(result.handle.data).astype(data.dtype, copy=False)
        for result, data in zip(results, left, strict=True)
    ]


def _reduce_by_halves(self, inputs):
    """Combines neighbours until one is left, which keeps the order for a non-commutative combine function."""
    dtypes = [tensor.dtype for tensor in inputs]
    arrays = [tensor.handle.data for tensor in inputs]
    rank = arrays[0].ndim
    if self.axis is None:
        blocks = [array.reshape(-1) for array in arrays]
    else:
        blocks = [np.moveaxis(array, self.axis, 0) for array in arrays]
    while len(blocks[0]) > 1:
        blocks = _combine(self.combine_fn, [block[0::2] for block in blocks], [block[1::2] for block in blocks], dtypes)
    results = [block[0] for block in blocks]
    if self.keep_dims:
        every_axis = tuple(range(rank))
        results = [np.expand_dims(result, every_axis if self.axis is None else self.axis) for result in results]
    return [
        self.to_tensor(result if np.ndim(result) else result.item(), dtype)
        for result, dtype in zip(results, dtypes, strict=True)
    ]


def _scan_by_doubling(self, inputs):
    """Hillis-Steele scan: after step k each element holds the combination of the 2**k elements up to it."""
    dtypes = [tensor.dtype for tensor in inputs]
    blocks = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in inputs]
    distance = 1
    while distance < len(blocks[0]):
        shifted = [np.roll(block, distance, axis=0) for block in blocks]
        combined = _combine(self.combine_fn, shifted, blocks, dtypes)
        blocks = [
            np.concatenate([block[:distance], new[distance:]]) for block, new in zip(blocks, combined, strict=True)
        ]
        distance *= 2
    return [
        self.to_tensor(np.moveaxis(block, 0, self.axis), dtype) for block, dtype in zip(blocks, dtypes, strict=True)
    ]


@dataclasses.dataclass
class _LanguagePatches:
    """The active patches of triton.language, by the id of the module globals that they were made for."""

    scopes: dict[int, Any] = dataclasses.field(default_factory=dict)

    def restore(self) -> None:
        for scope in reversed(self.scopes.values()):
            scope.restore()
        self.scopes.clear()


def _repair_calls() -> None:
    """Device functions (such as tl.sum and tl.zeros) patch triton.language once per launch, not on every call.

    NumPy's floating-point warnings are off during a launch: a GPU gives none, and exp(-inf - m) is ordinary there.
    """
    stock_launch, stock_patch = stock.GridExecutor.__call__, stock._patch_lang
    patches = _LanguagePatches()

    def patch_lang(function):
        key = id(function.__globals__)
        if key not in patches.scopes:
            patches.scopes[key] = stock_patch(function)
        return patches  # whose restore() the launch calls at its end

    def launch(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            return stock_launch(self, *args, **kwargs)

    stock._patch_lang = patch_lang
    stock.GridExecutor.__call__ = launch


def _repair_errors() -> None:
    """An error deep in device functions is wrapped once, not once more at every level."""

    def call(self, *args, **kwargs):
        stock._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except InterpreterError:
            raise
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    stock.InterpretedFunction.__call__ = call


def _repair_autotune() -> None:
    """@triton.autotune takes the first configuration that survives pruning, and times nothing."""

    def bench(self, *args, config, **kwargs):
        rank = self.configs.index(config) if config in self.configs else 0
        return [float(rank)] * 3

    Autotuner._bench = bench


def _repair_gpu_functions() -> None:
    """libdevice, programmatic dependent launch (nothing to wait for here) and inline assembly.

    triton.language.extra loads its backends itself, so `tl.extra.cuda` and the module that
    `import triton.language.extra.cuda` gives are two objects; both are repaired.
    """
    backends = [importlib.import_module("triton.language.extra.cuda"), tl.extra.cuda]
    libraries = [backend.libdevice for backend in backends]
    libraries += [importlib.import_module("triton.language.extra.libdevice"), tl.extra.libdevice]
    libraries.append(sys.modules.get("triton.language.extra.cuda.libdevice"))
    for library in libraries:
        for name, function in LIBDEVICE.items():
            if hasattr(library, name):
                setattr(library, name, _elementwise(function))
    for backend in backends:
        backend.gdc_wait = backend.gdc_launch_dependents = lambda _semantic=None: None
    Builder.create_inline_asm = _inline_asm


def _elementwise(function):
    """Makes a device function of one argument from a NumPy function."""

    def device_function(x, _semantic=None):
        data = np.asarray(function(x.handle.data), dtype=x.handle.data.dtype)
        return tl.core.tensor(Handle(data, x.handle.dtype), x.type)

    return device_function


@dataclasses.dataclass(frozen=True)
class _AsmResult:
    """What tl.inline_asm_elementwise expects back from the builder."""

    handle: Handle

    def get_result(self, index: int) -> Handle:
        return self.handle


def _inline_asm(self, source, constraints, values, types, is_pure, pack):
    """Inline assembly of exactly one instruction in ASM, with all operands of one type."""
    instructions = [line.strip() for line in source.split(";") if line.strip()]
    name = instructions[0].split()[0] if len(instructions) == 1 else source
    if name not in ASM:
        raise NotImplementedError(f"inline assembly {name!r}: give its meaning in tests/interpreter.py, ASM")
    first = values[0]
    result = np.asarray(ASM[name](*[value.data for value in values]), dtype=first.data.dtype)
    return _AsmResult(Handle(result, first.dtype.scalar))


REPAIRS = (
    _repair_conversions,
    _repair_arithmetic,
    _repair_dot,
    _repair_atomics,
    _repair_constants,
    _repair_asserts,
    _repair_index,
    _repair_reductions,
    _repair_calls,
    _repair_errors,
    _repair_autotune,
    _repair_gpu_functions,
)
