"""What our kernels compile to, with no GPU: registers, spills, shared memory, occupancy, instructions.

    with offline(90) as launches:                       # sm_80, sm_86, sm_89, sm_90 or sm_100
        gpt2_kernels.attention(q, k, v)                 # the real host code, on CPU or meta tensors
    for entry in launches:
        print(analyse(entry, 90))

Inside the `with`, `kernel[grid](...)` compiles the variant that a real launch would use (same specialization of
pointers and integers, same options) but launches nothing: outputs keep whatever they held. An autotuned kernel compiles
every configuration. The process must not run Triton's interpreter: from a test session that does, use a child process
without TRITON_INTERPRET.

`offline(90, compile=False)` stops after Triton's front end, 20 ms instead of a second: enough to tell which launches
share a variant, and whether anything has changed since a report was written (`Entry.fingerprint`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import io
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one streaming multiprocessor (SM) holds, from CUDA's table of compute capabilities."""

    threads: int
    blocks: int
    shared_bytes: int
    shared_bytes_per_block: int
    registers: int = 65536


LIMITS = {
    80: Limits(threads=2048, blocks=32, shared_bytes=164 << 10, shared_bytes_per_block=163 << 10),
    86: Limits(threads=1536, blocks=16, shared_bytes=100 << 10, shared_bytes_per_block=99 << 10),
    89: Limits(threads=1536, blocks=24, shared_bytes=100 << 10, shared_bytes_per_block=99 << 10),
    90: Limits(threads=2048, blocks=32, shared_bytes=228 << 10, shared_bytes_per_block=227 << 10),
    100: Limits(threads=2048, blocks=32, shared_bytes=228 << 10, shared_bytes_per_block=227 << 10),
}
SHARED_RESERVED = 1024  # bytes of shared memory that the system reserves per block
PARTITIONS = 4  # an SM's registers belong to four partitions, and a warp lives in one of them
REGISTERS_PER_GRANT = 256  # the granularity in which a warp's registers are allocated

# Instructions that a report counts. "LDG.128" is LDG with .128 among its modifiers, and counts as LDG too.
COUNTED = (
    *("HGMMA", "QGMMA", "UTCMMA", "HMMA", "QMMA", "IMMA"),  # tensor cores: Hopper, Blackwell, Ampere
    *("UTMALDG", "UTMASTG", "UBLKCP", "LDGSTS"),  # asynchronous copies: TMA and cp.async
    *("LDG", "LDG.64", "LDG.128", "STG", "STG.64", "STG.128"),  # global memory
    *("LDS", "LDSM", "STS", "LDL", "STL"),  # shared and local memory; local memory holds spilled registers
    *("MUFU", "MUFU.EX2", "MUFU.TANH", "FFMA", "FADD", "FMUL", "SHFL", "BAR", "ATOM", "BRA"),
)
SPELLINGS = {"UTCMMA": r"UTC\w*MMA", "ATOM": r"(?:ATOM[GS]?|REDG?)", "FFMA": r"FFMA2?"}


# --- compiling instead of launching ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """One launch that the host code asked for."""

    name: str
    grid: tuple[int, ...]
    fingerprint: str  # of the compiler's whole input: equal fingerprints mean equal machine code
    kernel: Any  # triton's CompiledKernel: .asm["ptx"], .metadata.shared ...; None where nothing was compiled
    seconds: float  # of compilation; almost nothing for a variant compiled before


@dataclasses.dataclass(frozen=True)
class _Variant:
    """What a JIT function caches for a specialization, in place of the compiled kernel alone."""

    fingerprint: str
    kernel: Any


class _OfflineDriver:
    """Answers what Triton asks about the GPU before a launch, for one architecture."""

    def __init__(self, cc: int, device: int):
        self.cc = cc
        self.device = device  # a JIT function caches variants by device: one set per architecture and mode

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.cc, 10)

    def set_current_device(self, device: int) -> None:
        pass

    def get_benchmarker(self):
        """For @triton.autotune: runs each configuration once, so that it is compiled, and reports all equally fast."""

        def bench(call, quantiles=()):
            call()
            return [1.0] * max(1, len(quantiles))

        return bench

    @property
    def utils(self) -> NoReturn:
        raise RuntimeError("offline: there is no GPU to load a kernel on")

    launcher_cls = utils


@contextlib.contextmanager
def offline(cc: int = 90, *, compile: bool = True) -> Iterator[list[Entry]]:
    """Turns every Triton launch inside the `with` into a compilation for sm_<cc>; yields the list that they go to."""
    if cc not in LIMITS:
        raise ValueError(f"offline: cc must be one of {sorted(LIMITS)}, got {cc}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("offline: Triton runs in interpreter mode; use a child process without TRITON_INTERPRET")
    entries: list[Entry] = []
    launch, build, active = JITFunction.run, JITFunction._do_compile, driver._active

    def variant(source, target, options):
        kernel = triton.compile(source, target=target, options=options) if compile else None
        return _Variant(_fingerprint(source, target, options), kernel)

    def build_variant(self, *args):
        self.compile = variant  # Triton sets it anew for each architecture of a kernel, hence here
        try:
            return build(self, *args)
        finally:
            self.compile = triton.compile

    def compile_only(self, *args, grid, warmup, **kwargs):
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # a failing ptxas prints the whole PTX
            found = launch(self, *args, grid=(1,), warmup=True, **kwargs)
        grid = _grid_of(self, grid, args, kwargs)
        seconds = time.perf_counter() - start
        entries.append(Entry(self.fn.__name__, grid, found.fingerprint, found.kernel, seconds))
        return found.kernel

    JITFunction.run, JITFunction._do_compile = compile_only, build_variant
    driver.set_active(_OfflineDriver(cc, device=cc if compile else -cc))
    try:
        yield entries
    finally:
        JITFunction.run, JITFunction._do_compile = launch, build
        driver._active = active


def _fingerprint(source: Any, target: GPUTarget, options: dict[str, Any]) -> str:
    """A hash of the options and of the kernel after Triton's front end, without comments and line numbers."""
    backend = make_backend(target)
    options = backend.parse_options({**options, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementations, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = str(source.make_ir(target, options, implementations, modules, context))
    text = re.sub(r" loc\(#?\w*\)|^#loc.*\n", "", module, flags=re.MULTILINE)
    chosen = {name: value for name, value in vars(options).items() if name != "extern_libs"}  # it holds paths
    return hashlib.sha256(f"{text}{sorted(chosen.items())}".encode()).hexdigest()[:8]


def _grid_of(function: JITFunction, grid: Any, args: tuple, kwargs: dict) -> tuple[int, ...]:
    """The grid of a launch; a callable grid gets all arguments by name, as in a real launch."""
    if not callable(grid):
        return tuple(grid)
    signature = inspect.signature(function.fn)
    options = {name: value for name, value in kwargs.items() if name not in signature.parameters}
    bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name not in options})
    bound.apply_defaults()
    return tuple(grid({**bound.arguments, **options}))


# --- reading the machine code ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compiled kernel costs on one architecture."""

    name: str
    cc: int
    grid: tuple[int, ...]
    registers: int  # per thread
    spills: int  # loads from and stores to local memory in the code
    stack_bytes: int  # per thread
    shared_bytes: int  # per block; the kernel's own, without SHARED_RESERVED
    threads: int  # per block
    blocks_per_sm: int  # 0: does not fit at all
    occupancy: float  # resident threads / most threads that an SM holds
    instructions: dict[str, int]  # "total" and every name of COUNTED
    seconds: float  # of compilation

    @property
    def over_limit(self) -> bool:
        """Whether it needs more shared memory than a block may have: it compiles, but its launch fails."""
        return self.shared_bytes > LIMITS[self.cc].shared_bytes_per_block


def analyse(entry: Entry, cc: int) -> Report:
    """Disassembles an entry of `offline(cc)`."""
    usage, assembly = _run_tools(entry.kernel.asm["cubin"])
    registers = _resource(usage, "REG")
    shared = entry.kernel.metadata.shared  # all of it: cuobjdump's SHARED is what the system reserves, since sm_90
    threads = _threads_per_block(entry.kernel)
    blocks = blocks_per_sm(cc, registers, threads, shared)
    instructions = count_instructions(assembly)
    return Report(
        name=entry.name,
        cc=cc,
        grid=entry.grid,
        registers=registers,
        spills=instructions["LDL"] + instructions["STL"],
        stack_bytes=_resource(usage, "STACK"),
        shared_bytes=shared,
        threads=threads,
        blocks_per_sm=blocks,
        occupancy=blocks * threads / LIMITS[cc].threads,
        instructions=instructions,
        seconds=entry.seconds,
    )


def blocks_per_sm(cc: int, registers: int, threads: int, shared_bytes: int) -> int:
    """How many blocks of a kernel are resident on one SM at a time, as in CUDA's occupancy calculator."""
    limits = LIMITS[cc]
    if shared_bytes > limits.shared_bytes_per_block:
        return 0
    warps = -(-threads // 32)
    registers_per_warp = -(-registers * 32 // REGISTERS_PER_GRANT) * REGISTERS_PER_GRANT
    warps_per_partition = limits.registers // PARTITIONS // max(registers_per_warp, 1)
    return min(
        limits.blocks,
        limits.threads // (warps * 32),
        warps_per_partition * PARTITIONS // warps,
        limits.shared_bytes // (shared_bytes + SHARED_RESERVED),
    )


def count_instructions(assembly: str) -> dict[str, int]:
    """Counts instructions in the output of `nvdisasm -c`: each name in COUNTED, and "total"."""
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", assembly, re.MULTILINE)
    counts = {"total": len(opcodes)}
    seen = Counter(opcodes)  # a few dozen spellings among thousands of instructions
    for name in COUNTED:
        base, _, modifier = name.partition(".")
        pattern = SPELLINGS.get(base, base) + (rf"(?:\.\w+)*\.{modifier}" if modifier else "") + r"(?:\.\w+)*"
        counts[name] = sum(count for opcode, count in seen.items() if re.fullmatch(pattern, opcode))
    return counts


def _threads_per_block(kernel: Any) -> int:
    """From the PTX, since a warp-specialized kernel has more warps than num_warps."""
    declared = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", kernel.asm["ptx"])
    return int(declared.group(1)) if declared else kernel.metadata.num_warps * 32


def _resource(usage: str, name: str) -> int:
    """One number of `cuobjdump -res-usage`: REG:32 STACK:0 SHARED:0 LOCAL:0 ..."""
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"analyse: cuobjdump reports no {name} in {usage!r}")
    return int(found.group(1))


def _run_tools(cubin: bytes) -> tuple[str, str]:
    """The resource usage and the disassembly of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run_tool("cuobjdump", "-res-usage", file.name), _run_tool("nvdisasm", "-c", file.name)


def _run_tool(name: str, *arguments: str) -> str:
    tool = TOOLS / name
    if not tool.is_file():
        raise RuntimeError(f"analyse: {tool} is missing; the Linux wheel of triton brings it")
    result = subprocess.run([tool, *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"analyse: {name} failed: {result.stderr.strip()}")
    return result.stdout
