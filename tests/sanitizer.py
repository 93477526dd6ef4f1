"""A memory and race sanitizer for Triton kernels in the interpreter.

    with sanitize() as watch:
        my_op(x)                            # raises MemoryFault at the first bad access of any kernel
    assert watch.unwritten("y_ptr") == 0    # elements of that argument that the last launch never stored

Every active lane of every load, store and atomic must fall on an element of some tensor argument of the launch: not
beside it, not in a hole of a strided view, not across an element boundary. Within one launch, two programs must not
store the same element, nor may one load what another stores. Programs run in random order, since a GPU guarantees none.

Atomics may order programs, and then sharing is not a race: what a program stored or loaded before a
`tl.debug_barrier()`, and then released by an atomic on one address, is ordered before what another program does after
acquiring it there. Nothing less counts: a relaxed atomic orders nothing, nor does an atomic without a barrier before
it, which waits for its own thread alone, nor one on many addresses. An element that is updated atomically may be loaded
or stored by the program whose atomic on it was the last.

Kernels run on copies of their arguments' storages, each between two red zones, and what they stored is copied back: an
overrun of one argument can then never look like a legal access to its neighbour. A storage above IN_PLACE_BYTES stays
where it is, so that a test may use a lazily committed buffer of any size: costs grow with a view's number of elements,
not with its span.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError

IN_PLACE_BYTES = 256 << 20  # larger storages are neither copied nor given red zones
TRACKED_ELEMENTS = 1 << 26  # larger arguments are only bounds-checked: no races, no unwritten()
SEVERAL_PROGRAMS = -1  # in Region.reader
ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)


class MemoryFault(InterpreterError):
    """A kernel touched memory it must not; the message names kernel, program, line, argument and element."""


# --- one argument ---------------------------------------------------------------------------------------------------


def nested_dims(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]] | None:
    """A view's (stride, size) pairs, widest first, adjacent ones merged; None where elements of the view overlap.

    Dimensions of stride 0 repeat the same elements and are left out.
    """
    dims: list[tuple[int, int]] = []
    for stride, size in sorted(zip(strides, shape, strict=True), reverse=True):
        if stride == 0 or size == 1:
            continue
        if dims and dims[-1][0] == stride * size:
            size *= dims.pop()[1]
        dims.append((stride, size))
    reach = 0  # the largest offset within the narrower dimensions
    for stride, size in reversed(dims):
        if stride <= reach:
            return None
        reach += (size - 1) * stride
    return dims


class Region:
    """The memory of one tensor argument of a launch, and which programs touched each of its elements."""

    def __init__(self, name: str, tensor: torch.Tensor):
        self.name, self.tensor = name, tensor
        self.item_size = tensor.element_size()
        self.span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.start = tensor.data_ptr()
        self.end = self.start + self.span * self.item_size
        dims = nested_dims(tensor.shape, tensor.stride())
        self.dims = [(1, self.span)] if dims is None else dims  # overlapping elements: taken as one block without holes
        self.count = int(np.prod([size for _, size in self.dims], dtype=np.int64))
        self.dense = self.count == self.span
        self.stored = False
        self.tracked = self.count <= TRACKED_ELEMENTS
        tracked = self.count if self.tracked else 0
        self.writer = np.zeros(tracked, np.int32)  # 0 = nobody, else the program's number + 1
        self.reader = np.zeros(tracked, np.int32)  # the same, or SEVERAL_PROGRAMS
        self.atomic = np.zeros(tracked, np.int32)  # like writer: whose atomic was the last
        self.written = np.zeros(tracked, np.int32)  # how many barriers the writer had passed
        self.read = np.zeros(tracked, np.int32)  # and the reader

    def ordinals(self, offsets: np.ndarray) -> np.ndarray:
        """Element offsets from the start -> the elements' numbers within the view, -1 for those in a hole."""
        if self.dense:
            return offsets
        ordinal = np.zeros_like(offsets)
        hole = np.zeros(offsets.shape, bool)
        for stride, size in self.dims:
            index, offsets = np.divmod(offsets, stride)
            hole |= index >= size
            ordinal = ordinal * size + index
        return np.where(hole | (offsets != 0), -1, ordinal)

    def distance(self, address: int) -> int:
        """Bytes from the region to an address; 0 inside."""
        return max(self.start - address, address - (self.end - 1), 0)


def named_tensors(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in one kernel argument: itself, the base of a descriptor, or the members of a tuple."""
    if isinstance(value, tuple):
        for index, member in enumerate(value):
            yield from named_tensors(f"{name}[{index}]", member)
    elif isinstance(value, stock.TensorDescriptor):
        yield from named_tensors(name, value.base)
    elif hasattr(value, "data_ptr"):
        yield name, stock._unwrap_tensor(value)


# --- copies with red zones ------------------------------------------------------------------------------------------


class Copies:
    """Copies of storages, each between two red zones; views of one storage stay views of one copy."""

    def __init__(self, redzone: int, in_place: set[int]):
        self.redzone, self.in_place = redzone, in_place
        self.copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # storage address -> (its bytes, the copy)

    def move(self, value):
        """A kernel argument with every tensor in it replaced by the same view of a copy."""
        if isinstance(value, tuple):
            members = [self.move(member) for member in value]
            return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
        if isinstance(value, stock.TensorDescriptor):
            return dataclasses.replace(value, base=self.move(value.base))
        if not hasattr(value, "data_ptr"):
            return value
        return stock._rewrap_tensor(self._move_tensor(stock._unwrap_tensor(value)), value)

    def _move_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if self.redzone == 0 or storage.nbytes() > IN_PLACE_BYTES or storage.data_ptr() in self.in_place:
            return tensor
        if storage.data_ptr() not in self.copies:
            self.copies[storage.data_ptr()] = self._copy(storage)
        _, copy = self.copies[storage.data_ptr()]
        offset = tensor.storage_offset() + self.redzone // tensor.element_size()
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(copy.untyped_storage(), offset, tensor.size(), tensor.stride())

    def _copy(self, storage: torch.UntypedStorage) -> tuple[torch.Tensor, torch.Tensor]:
        original = torch.empty(0, dtype=torch.uint8).set_(storage)
        copy = torch.full((storage.nbytes() + 2 * self.redzone,), 0xFF, dtype=torch.uint8)  # 0xFFFF.. is NaN and -1
        copy[self.redzone : self.redzone + storage.nbytes()] = original
        return original, copy

    def copy_back(self, regions: list[Region]) -> None:
        """Writes the copies that were stored to into the caller's storages; read-only memory is left alone."""
        stored = {region.tensor.untyped_storage().data_ptr() for region in regions if region.stored}
        for original, copy in self.copies.values():
            if copy.data_ptr() in stored:
                original.copy_(copy[self.redzone : self.redzone + original.numel()])


# --- the sanitizer --------------------------------------------------------------------------------------------------


class Sanitizer:
    """Watches launches. `launches` counts them; `kernel` is the name of the last one."""

    def __init__(
        self, races: bool, shuffle: bool, extra: Sequence[torch.Tensor], strict_views: bool, seed: int, redzone: int
    ):
        if redzone % 64 != 0:
            raise ValueError(f"sanitize: redzone must be a multiple of 64, which keeps alignment, got {redzone}")
        self.races, self.shuffle, self.extra = races, shuffle, tuple(extra)
        self.strict_views, self.redzone = strict_views, redzone
        self.random = random.Random(seed)
        self.launches = 0
        self.kernel = ""
        self.regions: list[Region] = []
        self.copies = Copies(0, set())
        self.program_order: list[int] = []  # the n-th program to run
        self.program = 0
        # Vector clocks that count barriers: whoever knows n of program p knows what p did before its n-th barrier.
        self.barriers = 0  # how many the running program has passed
        self.known: dict[int, int] = {}  # what the running program knows
        self.clocks: dict[int, dict[int, int]] = {}  # address of an atomic -> what acquiring it makes known

    def unwritten(self, name: str) -> int:
        """How many elements of argument `name` the last launch neither stored nor updated atomically."""
        regions = {region.name: region for region in self.regions}
        if name not in regions:
            raise KeyError(f"unwritten: {self.kernel} has no tensor argument {name!r}, only {sorted(regions)}")
        region = regions[name]
        if not region.tracked:
            raise ValueError(
                f"unwritten: {name} has {region.count} elements, more than {TRACKED_ELEMENTS} are not tracked"
            )
        return int(np.count_nonzero((region.writer == 0) & (region.atomic == 0)))

    def begin_launch(self, kernel: str, names: Sequence[str], args: Sequence, kwargs: dict) -> tuple[list, dict]:
        """Starts recording a launch; returns its arguments with copies in place of tensors."""
        extra_storages = {tensor.untyped_storage().data_ptr() for tensor in self.extra}
        self.copies = Copies(self.redzone, extra_storages)
        args = [self.copies.move(value) for value in args]
        kwargs = {name: self.copies.move(value) for name, value in kwargs.items()}
        arguments = [*zip(names, args, strict=False), *kwargs.items()]
        arguments += [(f"extra[{index}]", tensor) for index, tensor in enumerate(self.extra)]
        tensors = [pair for name, value in arguments for pair in named_tensors(name, value)]
        self.regions = [Region(name, tensor) for name, tensor in tensors if tensor.numel() > 0]
        self.kernel = kernel
        self.launches += 1
        self.clocks = {}
        return args, kwargs

    def end_launch(self) -> None:
        self.copies.copy_back(self.regions)

    def order_programs(self, number: int) -> None:
        self.program_order = list(range(number))
        if self.shuffle:
            self.random.shuffle(self.program_order)

    def begin_program(self, program: int) -> None:
        self.program, self.barriers, self.known = program, 0, {}

    def order(self, addresses: np.ndarray, semantic: ir.MEM_SEMANTIC) -> None:
        """What an atomic on one address tells its program, and whoever acquires that address later."""
        if addresses.size != 1:
            return
        clock = self.clocks.setdefault(int(addresses.flat[0]), {})
        if semantic in ACQUIRES:
            self.known = {p: max(self.known.get(p, 0), clock.get(p, 0)) for p in self.known.keys() | clock.keys()}
        if semantic in RELEASES:
            mine = {**self.known, self.program: self.barriers}
            clock.update({p: max(n, clock.get(p, 0)) for p, n in mine.items()})

    def check(self, addresses: np.ndarray, mask: np.ndarray, width: int, kind: str) -> None:
        """One access: `addresses` of all lanes, `width` bytes at each active one; kind is load, store or atomic."""
        addresses = addresses[np.broadcast_to(np.asarray(mask, bool), addresses.shape)]  # some masks come as int8
        if addresses.size == 0:
            return
        lowest, highest = int(addresses.min()), int(addresses.max())
        legal = np.zeros(addresses.size, bool)
        for region in self.regions:  # all regions: views of one storage interleave (q, k and v of a fused projection)
            if lowest < region.end and highest >= region.start:
                self._visit(region, addresses, width, kind, legal)
        if not legal.all():
            self._raise_illegal(addresses[~legal], addresses.size, width, kind)

    def _visit(self, region: Region, addresses: np.ndarray, width: int, kind: str, legal: np.ndarray) -> None:
        """Marks the lanes that fall on elements of the region as legal, and records them there."""
        lanes = np.flatnonzero((addresses >= np.uint64(region.start)) & (addresses < np.uint64(region.end)))
        offsets = (addresses[lanes] - np.uint64(region.start)).astype(np.int64)
        if width != region.item_size:  # a cast pointer: only its bounds are known
            legal[lanes] |= offsets + width <= region.end - region.start
            region.stored |= kind != "load"
            return
        ordinals = region.ordinals(offsets // width)
        aligned = offsets % width == 0
        on_element = aligned & (ordinals >= 0)
        legal[lanes] |= on_element if self.strict_views else aligned
        region.stored |= kind != "load" and lanes.size > 0
        if region.tracked:
            self._record(region, ordinals[on_element], addresses[lanes[on_element]], kind)

    def _record(self, region: Region, elements: np.ndarray, addresses: np.ndarray, kind: str) -> None:
        """Notes who touched which elements, and raises on a race."""
        me = self.program + 1
        if self.races:
            self._raise_race(region, elements, addresses, kind)
        if kind == "atomic":
            region.atomic[elements] = me
        elif kind == "store":
            if self.races:
                self._raise_duplicate(region, elements, addresses)
            region.writer[elements] = me
            region.written[elements] = self.barriers
        elif self.races:
            readers = region.reader[elements]
            alone = (readers == 0) | (readers == me) | self._ordered(readers, region.read[elements])
            region.reader[elements] = np.where(alone, me, SEVERAL_PROGRAMS)
            region.read[elements] = self.barriers

    def _ordered(self, programs: np.ndarray, barriers: np.ndarray) -> np.ndarray:
        """Whether this program knows that what each program (number + 1) did after so many barriers is over."""
        known = np.zeros(barriers.shape, np.int32)
        for program, number in self.known.items():
            known[programs == program + 1] = number
        return barriers < known

    def _raise_race(self, region: Region, elements: np.ndarray, addresses: np.ndarray, kind: str) -> None:
        """One program loads, stores or updates what another program of this launch stores, or updates what it loads."""
        me = self.program + 1
        what = {"load": "load of", "store": "store to", "atomic": "atomic on"}[kind]

        def race(programs: np.ndarray, over: np.ndarray | bool, did: str) -> None:
            conflict = (programs != 0) & (programs != me) & ~np.asarray(over)
            if conflict.any():
                first = int(np.argmax(conflict))
                who = "" if programs[first] < 0 else f"; program number {programs[first] - 1} {did} it"
                message = f"race: {what} an element that another program {did}"
                raise self._fault(message, addresses[first], who)

        writers, readers = region.writer[elements], region.reader[elements]
        if writers.any():
            race(writers, self._ordered(writers, region.written[elements]), "stored")
        if kind != "load" and readers.any():
            race(readers, self._ordered(readers, region.read[elements]), "loaded")
        if kind != "atomic":
            race(region.atomic[elements], False, "updated atomically")

    def _raise_duplicate(self, region: Region, elements: np.ndarray, addresses: np.ndarray) -> None:
        """One store has two lanes with the same address, so which of them wins is undefined."""
        lanes = np.arange(elements.size, dtype=np.int32)
        region.writer[elements] = lanes  # scratch: the caller writes the program there next
        beaten = region.writer[elements] != lanes
        if beaten.any():
            raise self._fault("one store writes an element twice", addresses[int(np.argmax(beaten))])

    def _raise_illegal(self, addresses: np.ndarray, active: int, width: int, kind: str) -> None:
        address = int(addresses[0])
        around = [region for region in self.regions if region.start <= address < region.end]
        lanes = f" ({addresses.size} of {active} active lanes)"
        if not around:
            raise self._fault(f"out-of-bounds {kind}{lanes}", address)
        if all(address + width > region.end for region in around):
            raise self._fault(f"{kind} across the end{lanes}", address)
        if all((address - region.start) % region.item_size for region in around):
            raise self._fault(f"misaligned {kind}{lanes}", address)
        raise self._fault(f"{kind} in a hole of a strided view{lanes}", address)

    def _fault(self, what: str, address: int, note: str = "") -> MemoryFault:
        address = int(address)
        message = f"{what} in kernel {self.kernel}, program {stock.interpreter_builder.grid_idx}, at {_kernel_line()}"
        if self.regions:
            near = min(self.regions, key=lambda region: region.distance(address))
            message += (
                f"; nearest argument '{near.name}' shape {tuple(near.tensor.shape)} strides {near.tensor.stride()}, "
                f"element offset {(address - near.start) / near.item_size:g} of {near.span}"
            )
        return MemoryFault(message + note)


def _kernel_line() -> str:
    """File, line and text of the innermost kernel statement on the stack."""
    library = str(Path(triton.__file__).parent)
    ours = (__file__, str(Path(__file__).with_name("interpreter.py")))
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(library) and frame.filename not in ours:
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "?"


# --- hooks in the interpreter ---------------------------------------------------------------------------------------

_watching: list[Sanitizer] = []  # only the innermost sanitizer sees a launch


@contextlib.contextmanager
def sanitize(
    *,
    races: bool = True,
    shuffle: bool = True,
    extra: Sequence[torch.Tensor] = (),
    strict_views: bool = True,
    seed: int = 0,
    redzone: int = 1 << 16,
) -> Iterator[Sanitizer]:
    """Checks every launch inside the `with`; CPU tensors only.

    races: report races between programs, and duplicate addresses in one store.
    shuffle, seed: run programs in random order.
    extra: tensors that kernels reach through a table of pointers.
    strict_views: forbid access to the holes of a strided view.
    redzone: bytes on either side of each copy; 0 runs the kernel on the caller's own memory.
    """
    sanitizer = Sanitizer(races, shuffle, extra, strict_views, seed, redzone)
    with contextlib.ExitStack() as hooks:
        if not _watching:
            for owner, name, hook in HOOKS:
                hooks.enter_context(mock.patch.object(owner, name, hook(getattr(owner, name))))
        _watching.append(sanitizer)
        try:
            yield sanitizer
        finally:
            _watching.pop()


def _width(pointers: stock.TensorHandle) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)  # int1 occupies a byte


def _hook_load(original):
    def create_masked_load(self, pointers, mask, *rest, **named):
        _watching[-1].check(pointers.data, mask.data, _width(pointers), "load")
        return original(self, pointers, mask, *rest, **named)

    return create_masked_load


def _hook_store(original):
    def create_masked_store(self, pointers, value, mask, *rest, **named):
        _watching[-1].check(pointers.data, mask.data, _width(pointers), "store")
        return original(self, pointers, value, mask, *rest, **named)

    return create_masked_store


def _hook_rmw(original):
    def create_atomic_rmw(self, operation, pointers, value, mask, semantic, *rest):
        _watching[-1].check(pointers.data, mask.data, _width(pointers), "atomic")
        _watching[-1].order(pointers.data[np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)], semantic)
        return original(self, operation, pointers, value, mask, semantic, *rest)

    return create_atomic_rmw


def _hook_cas(original):
    def create_atomic_cas(self, pointers, expected, value, semantic, *rest):
        _watching[-1].check(pointers.data, np.ones(1, bool), _width(pointers), "atomic")
        _watching[-1].order(pointers.data, semantic)
        return original(self, pointers, expected, value, semantic, *rest)

    return create_atomic_cas


def _hook_barrier(original):
    def create_barrier(self):
        _watching[-1].barriers += 1
        return original(self)

    return create_barrier


def _hook_grid_dim(original):
    def set_grid_dim(self, x, y, z):
        original(self, x, y, z)
        _watching[-1].order_programs(x * y * z)

    return set_grid_dim


def _hook_grid_idx(original):
    def set_grid_idx(self, x, y, z):
        _, height, depth = self.grid_dim
        program = _watching[-1].program_order[(x * height + y) * depth + z]
        _watching[-1].begin_program(program)
        original(self, program // (height * depth), program // depth % height, program % depth)

    return set_grid_idx


def _hook_arguments(original):
    def init_args_hst(self, args, kwargs):
        tensors = [tensor for value in (*args, *kwargs.values()) for _, tensor in named_tensors("", value)]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            raise ValueError("sanitize: CPU tensors only")
        args, kwargs = original(self, args, kwargs)
        return _watching[-1].begin_launch(self.fn.__name__, self.arg_names, args, kwargs)

    return init_args_hst


def _hook_restore(original):
    def restore_args_dev(self, args, args_host, kwargs, kwargs_host):
        _watching[-1].end_launch()  # in place of the original, which knows nothing of the copies

    return restore_args_dev


def _memory_fault_within(error: BaseException | None) -> MemoryFault | None:
    while error is not None and not isinstance(error, MemoryFault):
        error = error.__cause__
    return error


def _hook_launch(original):
    def launch(self, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        except InterpreterError as error:
            fault = _memory_fault_within(error)
            if fault is None:
                raise
            raise fault from None  # without the layers of InterpreterError around it
        finally:
            _watching[-1].copies = Copies(0, set())  # frees them

    return launch


HOOKS = (
    (stock.InterpreterBuilder, "create_masked_load", _hook_load),
    (stock.InterpreterBuilder, "create_masked_store", _hook_store),
    (stock.InterpreterBuilder, "create_atomic_rmw", _hook_rmw),
    (stock.InterpreterBuilder, "create_atomic_cas", _hook_cas),
    (stock.InterpreterBuilder, "create_barrier", _hook_barrier),
    (stock.InterpreterBuilder, "set_grid_dim", _hook_grid_dim),
    (stock.InterpreterBuilder, "set_grid_idx", _hook_grid_idx),
    (stock.GridExecutor, "_init_args_hst", _hook_arguments),
    (stock.GridExecutor, "_restore_args_dev", _hook_restore),
    (stock.GridExecutor, "__call__", _hook_launch),
)
