"""Each repair of interpreter.py and each fault that sanitizer.py finds, on kernels of a few lines."""

import math
import resource
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("triton is not in interpreter mode (TRITON_INTERPRET=1)", allow_module_level=True)

import interpreter  # noqa: E402
import triton.language as tl  # noqa: E402
from sanitizer import MemoryFault, nested_dims, sanitize  # noqa: E402
from triton.language.extra.cuda import gdc_wait, libdevice  # noqa: E402, F401
from triton.runtime import interpreter as stock  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

interpreter.install()

# Every kind of float32: zeros, a subnormal, ties, the limits of float8 and float16, infinities, NaN.
SPECIAL = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 448.0, 449.0, 6e4, 7e4, 1e-40, 3.4e38, math.inf, -math.inf, math.nan]


def mixed_values(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator) * torch.logspace(-8, 8, count)
    values[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return values


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    different = (ours.view(integer) != theirs.view(integer)).nonzero().flatten()
    assert ours.dtype == theirs.dtype and different.numel() == 0, (ours[different[:5]], theirs[different[:5]])


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings():
    """install(), with the usual settings restored afterwards."""
    yield interpreter.install
    interpreter.install()


def test_install_twice_repairs_once():
    before = interpreter.Builder.cast_impl
    interpreter.install()
    assert interpreter.Builder.cast_impl is before


# --- conversions ----------------------------------------------------------------------------------------------------


@triton.jit
def copy_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))  # the store converts


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr, ROUNDING: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(y_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@pytest.mark.parametrize("rounding", ["implicit", None, "rtne"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_is_rounded_to_16_bits_as_torch_rounds(dtype, rounding):
    x = mixed_values(4096)
    y = torch.empty(4096, dtype=dtype)
    if rounding == "implicit":
        copy_kernel[(1,)](x, y, 4096)
    else:
        cast_kernel[(1,)](x, y, 4096, rounding)
    assert torch.equal(y.isnan(), x.isnan())  # nobody promises a NaN's sign and payload
    number = ~x.isnan()
    assert_same_bits(y[number], x[number].to(dtype))


def test_rounding_toward_zero_truncates():
    x = torch.tensor([1.00390625, 1.0117, -1.0117, 3.0e38])
    y = torch.empty(4, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, 4, "rtz")
    assert_same_bits(y, (x.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16))


@pytest.mark.parametrize("dtype, largest", [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)])
def test_float8_both_ways(dtype, largest):
    """PTX saturates where torch's e5m2 would give infinity."""
    x = mixed_values(4096).nan_to_num(1.0, math.inf, -math.inf)
    narrow, wide = torch.empty(4096, dtype=dtype), torch.empty(4096)
    copy_kernel[(1,)](x, narrow, 4096)
    assert_same_bits(narrow, x.clamp(-largest, largest).to(dtype))
    copy_kernel[(1,)](narrow, wide, 4096)
    assert_same_bits(wide, narrow.float())


@pytest.mark.parametrize(
    "source, target",
    [(torch.int32, torch.bfloat16), (torch.bfloat16, torch.int32), (torch.bfloat16, torch.float16)],
)
def test_other_conversions_of_bfloat16_go_by_value(source, target):
    x = torch.arange(-512, 512).to(source)
    y = torch.empty(1024, dtype=target)
    copy_kernel[(1,)](x, y, 1024)
    assert_same_bits(y, x.to(target))


# --- arithmetic -----------------------------------------------------------------------------------------------------


@triton.jit
def binary_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr, OP: tl.constexpr):
    offsets = tl.arange(0, N)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "lt":
        z = x < y
    else:
        z = tl.fma(x, y, x)
    tl.store(z_ptr + offsets, z)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "lt"])
def test_bfloat16_arithmetic_equals_torch(op):
    x, y = torch.randn(2, 1024, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = getattr(torch, op)(x, y)
    z = torch.empty_like(expected)
    binary_kernel[(1,)](x, y, z, 1024, op)
    assert torch.equal(z, expected)


def test_bfloat16_fma_rounds_once():
    x, y = torch.randn(2, 1024, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    z = torch.empty_like(x)
    binary_kernel[(1,)](x, y, z, 1024, "fma")
    assert torch.equal(z, (x.double() * y.double() + x.double()).float().to(torch.bfloat16))


@triton.jit
def constant_kernel(y_ptr):
    offsets = tl.arange(0, 16)
    tl.store(y_ptr + offsets, tl.full((16,), 1.1, tl.bfloat16))


def test_bfloat16_constant():
    y = torch.zeros(16, dtype=torch.bfloat16)
    constant_kernel[(1,)](y)
    assert torch.equal(y, torch.full((16,), 1.1, dtype=torch.bfloat16))


@triton.jit
def invert_kernel(y_ptr):
    offsets = tl.arange(0, 16)
    tl.store(y_ptr + offsets, (~offsets.to(tl.uint32)).to(tl.int32, bitcast=True))


def test_bitwise_not_of_an_unsigned_integer():
    y = torch.zeros(16, dtype=torch.int32)
    invert_kernel[(1,)](y)
    assert torch.equal(y, ~torch.arange(16, dtype=torch.int32))


# --- tl.dot ---------------------------------------------------------------------------------------------------------


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, K: tl.constexpr, PRECISION: tl.constexpr):
    rows, inner = tl.arange(0, 16), tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + inner[None, :])  # (16, K)
    b = tl.load(b_ptr + inner[:, None] * 16 + rows[None, :])  # (K, 16)
    c = tl.dot(a, b, input_precision=PRECISION)
    tl.store(c_ptr + rows[:, None] * 16 + rows[None, :], c)


def dot_error(dtype: torch.dtype, precision: str) -> float:
    """Relative error of a 16x16x64 product against float64."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(16, 64, generator=generator).to(dtype)
    b = torch.randn(64, 16, generator=generator).to(dtype)
    c = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, 64, precision)
    exact = a.double() @ b.double()
    return float((c - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_dot_against_float64(dtype):
    assert dot_error(dtype, "ieee") < 1e-6


def test_tf32_rounds_the_operands_only_on_request(settings):
    assert dot_error(torch.float32, "tf32") < 1e-6
    settings(tf32=True)
    assert 1e-4 < dot_error(torch.float32, "tf32") < 1e-3
    assert dot_error(torch.float32, "ieee") < 1e-6


def test_dot_smaller_than_the_gpu_compiler_takes(settings):
    a, b, c = torch.ones(16, 8), torch.ones(8, 16), torch.empty(16, 16)
    with pytest.raises(InterpreterError, match="K >= 16"):
        dot_kernel[(1,)](a, b, c, 8, "ieee")
    settings(gpu_min_dot=False)
    dot_kernel[(1,)](a, b, c, 8, "ieee")
    assert torch.equal(c, torch.full((16, 16), 8.0))


# --- atomics, asserts, overflow -------------------------------------------------------------------------------------


@triton.jit
def atomic_kernel(x_ptr, y_ptr):
    lanes = tl.arange(0, 16)
    tl.atomic_add(y_ptr + lanes % 2, tl.load(x_ptr + lanes), mask=lanes < 12)


def test_bfloat16_atomic_add_counts_lanes_with_one_address():
    x, y = torch.arange(16).to(torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)
    atomic_kernel[(1,)](x, y)
    assert y.tolist() == [0 + 2 + 4 + 6 + 8 + 10, 1 + 3 + 5 + 7 + 9 + 11]


@triton.jit
def assert_kernel(x_ptr, limit):
    lanes = tl.arange(0, 4) + 4 * tl.program_id(0)
    tl.device_assert(tl.load(x_ptr + lanes) < 7, "too large", mask=lanes < limit)


def test_device_assert_raises_and_names_the_program(settings):
    x = torch.arange(8)
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\): too large"):
        assert_kernel[(2,)](x, 8)
    assert_kernel[(2,)](x, 7)  # the failing lane is masked off
    settings(debug_asserts=False)
    assert_kernel[(2,)](x, 8)


@triton.jit
def multiply_kernel(y_ptr, a, b):
    tl.store(y_ptr, a * b)


def test_int32_overflow_raises_on_request(settings):
    y = torch.zeros(1, dtype=torch.int32)
    multiply_kernel[(1,)](y, 1 << 20, 1 << 12)
    assert y.item() == 0  # it wraps, as on the GPU
    settings(overflow_checks=True)
    with pytest.raises(InterpreterError, match="overflow"):
        multiply_kernel[(1,)](y, 1 << 20, 1 << 12)


# --- control flow, calls, errors ------------------------------------------------------------------------------------


@triton.jit
def count_kernel(y_ptr, n):
    total = 0
    for i in range(0, n):
        total += i
    tl.store(y_ptr, total)


def test_range_up_to_a_run_time_argument():
    """Without the repair it fails in triton 3.6 with numpy 2.4; triton 3.7 fixed it."""
    y = torch.zeros(1, dtype=torch.int32)
    count_kernel[(1,)](y, 5)
    assert y.item() == 10


@triton.jit
def add_one(x):
    return x + 1.0


@triton.jit
def repeated_call_kernel(y_ptr, n):
    x = tl.zeros((4,), tl.float32)
    for _ in range(0, n):
        x = add_one(x) + tl.sum(x) * 0
    tl.store(y_ptr + tl.arange(0, 4), x)


def test_device_calls_patch_the_language_once_per_launch_and_leave_it_as_it_was():
    language_before = tl.load, tl.sum, tl.range
    y, patches = torch.empty(4), []
    repeated_call_kernel[(1,)](y, 1)  # the very first launch also adds names to the functions' modules
    for calls in (1, 20):
        with mock.patch.object(stock, "_patch_lang_core", wraps=stock._patch_lang_core) as patch:
            repeated_call_kernel[(2,)](y, calls)
        patches.append(patch.call_count)
        assert y.tolist() == [calls] * 4
    assert patches[0] == patches[1]
    assert (tl.load, tl.sum, tl.range) == language_before


@triton.jit
def fails(x):
    return x + tl.load(x)  # not a pointer


@triton.jit
def fails_deep(x):
    return fails(x)


@triton.jit
def failing_kernel(y_ptr):
    tl.store(y_ptr, fails_deep(tl.zeros((4,), tl.float32)))


def test_an_error_in_a_device_function_is_wrapped_once():
    with pytest.raises(InterpreterError) as caught:
        failing_kernel[(1,)](torch.empty(4))
    assert str(caught.value).count("InterpreterError") == 1


@triton.jit
def infinity_kernel(y_ptr):
    x = tl.full((4,), float("-inf"), tl.float32)
    tl.store(y_ptr + tl.arange(0, 4), tl.exp(x - x))


def test_infinities_give_nan_without_a_warning():
    y = torch.empty(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infinity_kernel[(1,)](y)
    assert y.isnan().all()


# --- reductions and scans -------------------------------------------------------------------------------------------

COMBINE_CALLS: list[int] = []


@triton.jit
def affine(a0, b0, a1, b1):
    """Composes maps x -> a x + b, which do not commute."""
    COMBINE_CALLS.append(1)
    return a0 * a1, a1 * b0 + b1


@triton.jit
def affine_kernel(a_ptr, b_ptr, y_ptr, z_ptr):
    rows, columns = tl.arange(0, 4)[:, None], tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + rows * 16 + columns), tl.load(b_ptr + rows * 16 + columns)
    _, last = tl.reduce((a, b), 1, affine)
    _, running = tl.associative_scan((a, b), 1, affine)
    tl.store(y_ptr + tl.arange(0, 4), last)
    tl.store(z_ptr + rows * 16 + columns, running)


def test_reduce_and_scan_with_a_combine_function_keep_order_and_take_few_calls():
    a, b = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(4))
    expected = torch.zeros(4, 16)
    for column in range(16):
        previous = expected[:, column - 1] if column else torch.zeros(4)
        expected[:, column] = a[:, column] * previous + b[:, column]
    last, running = torch.empty(4), torch.empty(4, 16)
    COMBINE_CALLS.clear()
    affine_kernel[(1,)](a, b, last, running)
    torch.testing.assert_close(running, expected)
    torch.testing.assert_close(last, expected[:, -1])
    assert len(COMBINE_CALLS) == 2 * math.log2(16)


# --- autotune and GPU functions -------------------------------------------------------------------------------------


@triton.autotune(configs=[triton.Config({"BLOCK": size}) for size in (8, 16)], key=[])
@triton.jit
def autotuned_kernel(y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), 1.0)


def test_autotune_takes_its_first_configuration():
    y = torch.zeros(16)
    autotuned_kernel[(1,)](y)
    assert y.sum() == 8


@triton.jit
def gpu_function_kernel(x_ptr, y_ptr, ASM: tl.constexpr):
    tl.extra.cuda.gdc_wait()
    offsets = tl.arange(0, 16)
    x = tl.load(x_ptr + offsets)
    y = tl.inline_asm_elementwise(ASM, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    tl.store(y_ptr + offsets, y)
    tl.store(y_ptr + 16 + offsets, libdevice.tanh(x))
    tl.extra.cuda.gdc_launch_dependents()


def test_libdevice_inline_assembly_and_dependent_launch():
    x, y = torch.randn(16, generator=torch.Generator().manual_seed(5)), torch.empty(2, 16)
    gpu_function_kernel[(1,)](x, y, "tanh.approx.f32 $0, $1;")
    torch.testing.assert_close(y, x.tanh().expand(2, 16))


@pytest.mark.parametrize("asm", ["sin.approx.f32 $0, $1;", "ex2.approx.f32 $0, $1; ex2.approx.f32 $0, $0;"])
def test_unknown_inline_assembly_is_refused(asm):
    with pytest.raises(InterpreterError, match="give its meaning"):
        gpu_function_kernel[(1,)](torch.zeros(16), torch.empty(2, 16), asm)


# --- sanitizer: where an access falls -------------------------------------------------------------------------------


@triton.jit
def shift_kernel(x_ptr, y_ptr, load_shift, store_shift, limit, N: tl.constexpr):
    lanes = tl.arange(0, N)
    x = tl.load(x_ptr + lanes + load_shift, mask=lanes < limit)  # the load
    tl.store(y_ptr + lanes + store_shift, x, mask=lanes < limit)  # the store


def line_of(comment: str) -> int:
    """The line of this file that ends with a comment."""
    lines = Path(__file__).read_text().splitlines()
    return 1 + next(number for number, line in enumerate(lines) if line.endswith(f"# {comment}"))


@pytest.mark.parametrize("shift", [-1, 1, 1 << 40])
@pytest.mark.parametrize("kind", ["load", "store"])
def test_out_of_bounds_names_kernel_program_line_and_argument(kind, shift):
    x, y = torch.ones(16), torch.zeros(16)
    shifts = (shift, 0) if kind == "load" else (0, shift)
    lanes = 1 if abs(shift) == 1 else 16
    with sanitize(), pytest.raises(MemoryFault) as caught:
        shift_kernel[(1,)](x, y, *shifts, 16, 16)
    message = str(caught.value)
    assert message.startswith(
        f"out-of-bounds {kind} ({lanes} of 16 active lanes) in kernel shift_kernel, program (0, 0, 0)"
    )
    assert f"test_interpreter.py:{line_of(f'the {kind}')}: " in message
    if lanes == 1:
        assert f"nearest argument '{'x_ptr' if kind == 'load' else 'y_ptr'}' shape (16,) strides (1,)" in message
        assert f"element offset {-1 if shift < 0 else 16} of 16" in message
    assert torch.equal(y, torch.zeros(16)), "a launch that failed leaves the caller's tensors alone"


def test_masked_lanes_may_point_anywhere():
    x, y = torch.ones(16), torch.zeros(16)
    with sanitize() as watch:
        shift_kernel[(1,)](x, y, 4, 0, 12, 16)
        assert watch.unwritten("y_ptr") == 4
    assert y.sum() == 12


def test_an_overrun_cannot_land_in_a_neighbour():
    """Both are parts of one hand-made allocation, where the stock interpreter sees nothing wrong."""
    memory = bytearray(256)
    x = torch.frombuffer(memory, dtype=torch.float32, count=16)
    y = torch.frombuffer(memory, dtype=torch.float32, count=16, offset=64)
    shift_kernel[(1,)](x, y, 16, 0, 16, 16)
    with sanitize(), pytest.raises(MemoryFault, match="out-of-bounds load"):
        shift_kernel[(1,)](x, y, 16, 0, 16, 16)


def test_hole_of_a_strided_view():
    x, y = torch.ones(4, 8)[:, :4], torch.zeros(4)
    with sanitize():
        shift_kernel[(1,)](x, y, 8, 0, 4, 4)
        with pytest.raises(MemoryFault, match="load in a hole of a strided view.*'x_ptr'.*element offset 4 of 28"):
            shift_kernel[(1,)](x, y, 2, 0, 4, 4)
    with sanitize(strict_views=False):
        shift_kernel[(1,)](x, y, 2, 0, 4, 4)


def test_interleaved_views_of_one_storage_are_not_holes_of_each_other():
    """q, k and v of a fused projection, and a result written into the same rows."""
    fused = torch.arange(12.0).reshape(2, 6)
    q, k = fused[:, :2], fused[:, 2:4]
    with sanitize() as watch:
        shift_kernel[(1,)](k, q, 6, 6, 2, 2)
        assert watch.unwritten("y_ptr") == 2
        with pytest.raises(MemoryFault, match="hole"):
            shift_kernel[(1,)](k, q, 2, 0, 2, 2)
    assert fused.tolist() == [[0, 1, 2, 3, 4, 5], [8, 9, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    "shape, strides, dims",
    [
        ((4, 8), (8, 1), [(1, 32)]),
        ((8, 4), (1, 8), [(1, 32)]),  # transposed
        ((2, 16, 12, 64), (16 * 2304, 2304, 64, 1), [(2304, 32), (1, 768)]),  # q of a fused projection
        ((5, 8), (0, 1), [(1, 8)]),  # expanded
        ((1, 3), (7, 2), [(2, 3)]),
        ((), (), []),
        ((4, 4), (1, 1), None),  # sliding windows
        ((3, 8), (6, 1), None),
    ],
)
def test_nested_dims(shape, strides, dims):
    assert nested_dims(shape, strides) == dims


@triton.jit
def bytes_kernel(x_ptr, y_ptr, shift):
    pointer = (x_ptr.to(tl.pointer_type(tl.int8)) + shift).to(tl.pointer_type(tl.int32))
    tl.store(y_ptr, tl.load(pointer))


def test_misaligned_access_and_access_across_the_end():
    words, octets, y = (
        torch.ones(4, dtype=torch.int32),
        torch.ones(6, dtype=torch.int8),
        torch.zeros(1, dtype=torch.int32),
    )
    with sanitize():
        bytes_kernel[(1,)](octets, y, 0)
        with pytest.raises(MemoryFault, match="misaligned load"):
            bytes_kernel[(1,)](words, y, 2)
        with pytest.raises(MemoryFault, match="load across the end"):
            bytes_kernel[(1,)](octets, y, 4)


# --- sanitizer: who touches what ------------------------------------------------------------------------------------


@triton.jit
def program_kernel(x_ptr, y_ptr, load_at, store_at):
    """Program p loads x[p % load_at] and stores y[p % store_at]."""
    program = tl.program_id(0)
    x = tl.load(x_ptr + program % load_at)
    tl.store(y_ptr + program % store_at, x + program)


def test_two_programs_that_store_one_element():
    x, y = torch.zeros(9), torch.zeros(9)
    with sanitize(), pytest.raises(MemoryFault, match="race: store to an element that another program stored"):
        program_kernel[(4,)](x, y, 4, 3)
    with sanitize():
        program_kernel[(4,)](x, y, 4, 4)
    with sanitize(races=False):
        program_kernel[(4,)](x, y, 4, 3)


def test_a_program_that_loads_what_another_stores():
    x = torch.zeros(9)
    with (
        sanitize(shuffle=False),
        pytest.raises(MemoryFault, match="race: load of an element that another program stored"),
    ):
        program_kernel[(4,)](x, x, 2, 4)


@triton.jit
def loads_ahead_kernel(x_ptr, n):
    """Program p loads the element of the next program, then stores its own."""
    program = tl.program_id(0)
    x = tl.load(x_ptr + (program + 1) % n)
    tl.store(x_ptr + program, x)


def test_a_program_that_stores_what_another_loaded():
    with (
        sanitize(shuffle=False),
        pytest.raises(MemoryFault, match="race: store to an element that another program loaded"),
    ):
        loads_ahead_kernel[(4,)](torch.zeros(4), 4)


@triton.jit
def last_adds_kernel(
    x_ptr, ticket_ptr, y_ptr, LAST: tl.constexpr, BARRIER: tl.constexpr, LATE: tl.constexpr, SEM: tl.constexpr
):
    """Each program stores an element of x; the one with ticket LAST adds them all up and resets the tickets."""
    program = tl.program_id(0)
    if not LATE:
        tl.store(x_ptr + program, program + 1.0)
    if BARRIER:
        tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem=SEM)
    if LATE:
        tl.store(x_ptr + program, program + 1.0)
    if ticket == LAST:
        tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, 4)), 0))
        tl.store(ticket_ptr, 0)


def test_the_last_program_adds_up_what_the_others_stored() -> None:
    x, ticket, y = torch.zeros(4), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    for _ in range(2):
        with sanitize():
            last_adds_kernel[(4,)](x, ticket, y, 3, True, False, "acq_rel")
        assert (y.item(), ticket.item()) == (10, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SEM": "relaxed"}, "load of an element that another program stored"),
        ({"SEM": "release"}, "load of an element that another program stored"),
        ({"SEM": "acquire"}, "load of an element that another program stored"),
        ({"BARRIER": False}, "load of an element that another program stored"),
        ({"LATE": True}, "load of an element that another program stored"),
        (
            {"LAST": 2},
            "store to an element that another program loaded|atomic on an element that another program stored",
        ),
    ],
    ids=str,
)
def test_a_last_program_that_knows_too_little(change: dict, message: str) -> None:
    """An atomic that does not order, one that does not come after the stores, and one that is not the last."""
    x, ticket, y = torch.zeros(4), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    options = {"LAST": 3, "BARRIER": True, "LATE": False, "SEM": "acq_rel"} | change
    with sanitize(), pytest.raises(MemoryFault, match=f"race: ({message})"):
        last_adds_kernel[(4,)](x, ticket, y, **options)


@triton.jit
def counted_kernel(x_ptr, ATOMIC_FIRST: tl.constexpr):
    """Each program updates x and loads it."""
    if ATOMIC_FIRST:
        tl.atomic_add(x_ptr, 1.0)
    tl.load(x_ptr)
    if not ATOMIC_FIRST:
        tl.atomic_add(x_ptr, 1.0)


def test_an_atomic_and_a_load_of_one_element() -> None:
    with sanitize():
        counted_kernel[(1,)](torch.zeros(1), True)
    with sanitize(), pytest.raises(MemoryFault, match="race: atomic on an element that another program loaded"):
        counted_kernel[(2,)](torch.zeros(1), True)
    with sanitize(), pytest.raises(MemoryFault, match="race: load of an element that another program updated"):
        counted_kernel[(2,)](torch.zeros(1), False)


@triton.jit
def duplicate_kernel(y_ptr):
    lanes = tl.arange(0, 16)
    tl.store(y_ptr + lanes // 2, lanes)


def test_one_store_that_writes_an_element_twice():
    y = torch.zeros(8, dtype=torch.int32)
    with sanitize(), pytest.raises(MemoryFault, match="one store writes an element twice"):
        duplicate_kernel[(1,)](y)
    with sanitize(races=False):
        duplicate_kernel[(1,)](y)


def test_unwritten_counts_stores_and_atomics_of_the_last_launch():
    y = torch.zeros(5, 3)[:, :2]
    with sanitize() as watch:
        shift_kernel[(1,)](torch.ones(8), y, 0, 0, 2, 8)
        assert watch.unwritten("y_ptr") == 8
        assert watch.unwritten("x_ptr") == 8
        atomic_kernel[(1,)](torch.ones(16), torch.zeros(2))
        assert watch.unwritten("y_ptr") == 0
        assert watch.launches == 2
        with pytest.raises(KeyError, match="has no tensor argument 'z_ptr'"):
            watch.unwritten("z_ptr")


@triton.jit
def ticket_kernel(counter_ptr, order_ptr):
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(order_ptr + program, tl.atomic_add(counter_ptr, 1))


def test_programs_run_in_random_but_repeatable_order():
    def order(**options):
        order = torch.zeros(32, dtype=torch.int32)
        with sanitize(**options):
            ticket_kernel[(8, 4)](torch.zeros(1, dtype=torch.int32), order)
        return order.tolist()

    assert order(shuffle=False) == list(range(32))
    assert sorted(order()) == list(range(32)) != order()
    assert order(seed=1) == order(seed=1) != order(seed=2)


# --- sanitizer: arguments of every kind -----------------------------------------------------------------------------


@triton.jit
def tuple_kernel(pointers, y_ptr):
    lanes = tl.arange(0, 4)
    tl.store(y_ptr + lanes, tl.load(pointers[0] + lanes) + tl.load(pointers[1] + lanes))


def test_tensors_in_a_tuple():
    a, b, y = torch.ones(4), torch.ones(3), torch.zeros(4)
    with sanitize():
        tuple_kernel[(1,)]((a, a), y)
        with pytest.raises(MemoryFault, match=r"out-of-bounds load.*'pointers\[1\]'"):
            tuple_kernel[(1,)]((a, b), y)
    assert y.tolist() == [2, 2, 2, 2]


@triton.jit
def descriptor_kernel(x_desc, y_desc):
    y_desc.store([0, 0], x_desc.load([2, 0]) + 1.0)


def test_tensor_descriptors():
    x, y = torch.ones(4, 8), torch.zeros(4, 8)
    with sanitize() as watch:
        descriptor_kernel[(1,)](TensorDescriptor.from_tensor(x, [4, 8]), TensorDescriptor.from_tensor(y, [4, 8]))
        assert watch.unwritten("y_desc") == 0
    assert y.tolist() == [[2.0] * 8] * 2 + [[1.0] * 8] * 2  # rows past the end load as 0


@triton.jit
def table_kernel(table_ptr, y_ptr):
    lanes = tl.arange(0, 4)
    pointer = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + lanes, tl.load(pointer + lanes))


def test_memory_behind_a_table_of_pointers():
    x, y = torch.ones(4), torch.zeros(4)
    table = torch.tensor([x.data_ptr()])
    with sanitize(), pytest.raises(MemoryFault, match="out-of-bounds load"):
        table_kernel[(1,)](table, y)
    with sanitize(extra=[x]):
        table_kernel[(1,)](table, y)
    assert y.sum() == 4


def test_the_innermost_sanitizer_watches_and_all_traces_go():
    before = stock.GridExecutor.__call__, stock.InterpreterBuilder.create_masked_load
    x, y = torch.ones(4), torch.zeros(4)
    with sanitize() as outer:
        with sanitize() as inner:
            shift_kernel[(1,)](x, y, 0, 0, 4, 4)
        assert (outer.launches, inner.launches) == (0, 1)
        assert y.sum() == 4
        shift_kernel[(1,)](x, y, 0, 0, 4, 4)
        assert (outer.launches, inner.launches) == (1, 1)
    assert (stock.GridExecutor.__call__, stock.InterpreterBuilder.create_masked_load) == before


def test_redzone_of_zero_runs_on_the_callers_memory():
    x, y = torch.ones(4), torch.zeros(4)
    with sanitize(redzone=0):
        shift_kernel[(1,)](x, y, 0, 0, 4, 4)
        with pytest.raises(MemoryFault):
            shift_kernel[(1,)](x, y, 1, 0, 4, 4)
    assert y.sum() == 4
    with pytest.raises(ValueError, match="redzone must be a multiple of 64, .* got 100"), sanitize(redzone=100):
        pass


# --- sanitizer: a buffer of more than 2**31 elements ----------------------------------------------------------------

ROW = 1 << 30


@triton.jit
def far_rows_kernel(x_ptr, row, shift, WIDE: tl.constexpr):
    lanes = tl.arange(0, 16)
    if WIDE:
        row = row.to(tl.int64)
    pointers = x_ptr + row * ROW_STRIDE + shift + lanes
    tl.store(pointers, tl.load(pointers) + 1)


ROW_STRIDE = tl.constexpr(ROW)


def test_a_lazily_committed_buffer_of_any_size():
    """Neither copied nor tracked over its span, yet a wrapped 32-bit offset and a hole are found."""
    x = torch.empty(2 * ROW + 16, dtype=torch.int8).as_strided((3, 16), (ROW, 1))
    x.zero_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with sanitize() as watch:
        far_rows_kernel[(1,)](x, 2, 0, True)
        assert watch.unwritten("x_ptr") == 32
        with pytest.raises(MemoryFault, match="out-of-bounds load"):
            far_rows_kernel[(1,)](x, 2, 0, False)  # 2 * 2**30 wraps to -2**31
        with pytest.raises(MemoryFault, match="hole of a strided view"):
            far_rows_kernel[(1,)](x, 1, 8, True)
        with pytest.raises(MemoryFault, match="race: load of an element that another program stored"):
            far_rows_kernel[(2,)](x, 1, 0, True)
    assert x.sum(dim=1).tolist() == [0, 16, 16], "in place: what ran before a fault is kept"
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 64 * 1024


def test_a_large_dense_buffer_is_bounds_checked_alone():
    x = torch.empty((1 << 28) + 16, dtype=torch.int8)
    with sanitize() as watch:
        far_rows_kernel[(2,)](x, 0, 1 << 28, True)
        with pytest.raises(MemoryFault, match="out-of-bounds load"):
            far_rows_kernel[(1,)](x, 0, (1 << 28) + 1, True)
        with pytest.raises(ValueError, match="not tracked"):
            watch.unwritten("x_ptr")
