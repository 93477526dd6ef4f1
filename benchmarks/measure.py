"""What is measured: a case is one operation at one size, in all its implementations. Every benchmark goes through here.

`bench_<module>.py` yields cases; `pytest benchmarks/` (conftest.py) and `python -m benchmarks.gpu` measure them with
`compare`. It checks every rival's result against float64, in poisoned memory, before any timing; then the rivals are
timed in turns and compared with what the machine reached in the same process: the bytes/s of a copy, the FLOP/s of a
matrix product. FLOPs are useful ones, without a tile's padding; bytes are what the operation has to move.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.timing import Call

Row = dict[str, Any]
Inputs = tuple[Any, ...]
Bind = Callable[
    ..., "Call | tuple[Call, Call]"
]  # inputs -> a call; of two, the time of the second is taken off the first

# Largest error allowed, as a share of the largest value. At least twice that of PyTorch's own kernels: it tells a wrong
# kernel from a right one; which of two right ones is more accurate is for the tests to say.
LIMIT = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-3}
ROTATED_BYTES = {"cuda": 256 << 20, "cpu": 128 << 20}  # several times the last-level cache of any GPU, of most CPUs
MOST_SETS = 64
LATE = "the time was up"


class Absent(Exception):
    """Raised for a rival that this machine does not have; the message says what is missing."""


@dataclasses.dataclass
class Run:
    """Where and at which sizes to measure, and the machine's ceilings."""

    device: torch.device
    sizes: str  # "gpu", "cpu", or "tiny" to try the benchmarks out
    ceilings: dict[str, float] = dataclasses.field(default_factory=dict)  # copy bytes/s, matmul FLOP/s, launch s
    seconds: float = 1.0  # of timing, per rival
    turns: int = 30

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU; float32 on a CPU, where it is faster."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def pick(self, gpu: Any, cpu: Any, tiny: Any) -> Any:
        return {"gpu": gpu, "cpu": cpu, "tiny": tiny}[self.sizes]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)


def default_run(sizes: str = "auto") -> Run:
    """sizes "auto": "gpu" where there is one, else "cpu"."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if sizes == "auto":
        sizes = "gpu" if device.type == "cuda" else "cpu"
    return Run(device, sizes, seconds=0.05 if sizes == "tiny" else 1.0, turns=3 if sizes == "tiny" else 30)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one size. `rivals` bind inputs to a call; "ours" is the one that the gates judge."""

    name: str  # operation and size; the group of pytest-benchmark
    make: Callable[[], Inputs]  # a fresh set of random inputs
    rivals: Mapping[str, Bind]
    check: Callable[[Inputs, Any], float]  # (inputs, result) -> largest error as a share of the largest true value
    flops: float = 0.0
    moved: float = 0.0  # bytes
    units: float = 0.0  # what a user counts (see unit), per call
    unit: str = "tokens"
    clock: str = "device"  # or "wall", where the host's work counts too
    limit: float | None = None  # largest error; None: by dtype
    facts: Callable[[], dict[str, Any]] | None = None  # further facts that are not times
    whole: bool = False  # a whole model: one set of inputs; no host time and, on a CPU, no memory is measured


# --- binding and checking -------------------------------------------------------------------------------------------


def forward(function: Callable[..., Any]) -> Bind:
    """Calls `function` on the inputs."""
    return lambda *inputs: lambda: function(*inputs)


def backward(function: Callable[..., Tensor]) -> Bind:
    """The backward pass alone of function(*leaves), for inputs (*leaves, grad): the forward ran, its graph is kept."""

    def bind(*inputs: Tensor) -> Call:
        *leaves, grad = (t.detach() for t in inputs)
        leaves = [t.requires_grad_() for t in leaves]
        with torch.enable_grad():
            out = function(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return bind


def both(function: Callable[..., Tensor]) -> Bind:
    """Forward and backward."""

    def bind(*inputs: Tensor) -> Call:
        *leaves, grad = (t.detach() for t in inputs)
        leaves = [t.requires_grad_() for t in leaves]

        def call() -> Any:
            with torch.enable_grad():
                return torch.autograd.grad(function(*leaves), leaves, grad)

        return call

    return bind


def against(truth: Bind, part: Callable[[Tensor], Tensor] = lambda t: t) -> Callable[[Inputs, Any], float]:
    """Compares `part` of each result tensor with what `truth` computes in float64 from that part of each input."""

    def check(inputs: Inputs, result: Any) -> float:
        double = [part(t).detach().double() if _real(t) else t for t in inputs]
        call = truth(*double)
        assert callable(call)
        return error([part(t) for t in timing.tensors(result)], timing.tensors(call()))

    return check


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference, as a share of the largest expected value, over corresponding tensors."""
    if len(found) != len(expected):
        raise ValueError(f"error: both must be as many tensors, got {len(found)} and {len(expected)}")
    worst = 0.0
    for a, b in zip(found, expected):
        if a.shape != b.shape:
            raise ValueError(f"error: shapes must agree, got {tuple(a.shape)} and {tuple(b.shape)}")
        share = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
        worst = max(worst, math.inf if math.isnan(share) else share)
    return worst


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _poisoned(call: Call, inputs: Inputs) -> Any:
    """The result of a call into memory that held NaN, if the allocator reuses it: what the call fails to write then
    cannot look right by chance. CUDA's does; a CPU's gives large results fresh zeros."""
    owned = {t.data_ptr() for t in timing.tensors(inputs)}
    first = timing.tensors(call())
    with torch.no_grad():
        for t in first:
            if t.is_floating_point() and t.data_ptr() not in owned and not t.requires_grad:
                t.fill_(math.nan)
    del first  # for the next call to reuse
    return call()


# --- measuring ------------------------------------------------------------------------------------------------------


def compare(
    run: Run, case: Case, only: Collection[str] | None = None, timed: bool = True, end: float = math.inf
) -> Row:
    """Checks and times the rivals of a case (those in `only`), in turns. For each, the row holds its figures, or in
    `not_run` why it could not run, or in `wrong` what is wrong with its result, which is then not timed. After `end`
    (time.monotonic) only the first rival is still started, so that there is a row for those that are ready."""
    row: Row = {"name": case.name, "rivals": {}, "not_run": {}, "wrong": {}}
    row |= {key: value for key in ("flops", "moved", "units") if (value := getattr(case, key))}
    if case.units:
        row["unit"] = case.unit
    torch._dynamo.reset()  # else another case's rivals would make this a second shape, compiled as dynamic
    torch.manual_seed(0)
    limit = LIMIT[run.dtype] if case.limit is None else case.limit
    timings: dict[str, list[Call]] = {}
    less: dict[str, str] = {}
    with torch.no_grad(), _on_capture_stream(run, case):
        sets = _input_sets(run, case)
        chosen = [(name, bind) for name, bind in case.rivals.items() if only is None or name in only]
        for at, (name, bind) in enumerate(chosen):
            if at and time.monotonic() > end:
                row["not_run"][name] = LATE
                continue
            try:
                bound = [bind(*inputs) for inputs in sets]
                calls = [b[0] if isinstance(b, tuple) else b for b in bound]
                found = case.check(sets[0], calls[0]() if case.whole else _poisoned(calls[0], sets[0]))
                if not found <= limit:
                    row["wrong"][name] = f"error {found:.3g} of the largest value, at most {limit:.3g} is allowed"
                    continue
                facts = {"error": found}
                if not case.whole or run.device.type == "cuda":
                    facts["peak_bytes"] = timing.peak_bytes(calls[0], run.device)
                if run.device.type == "cuda" and not case.whole:
                    facts["host_us"] = 1e6 * timing.host_seconds(calls, run.device)
                row["rivals"][name] = facts
                timings[name] = calls
                if isinstance(bound[0], tuple):
                    less[name] = f"{name} - "
                    timings[less[name]] = [b[1] for b in bound]
            except Exception as problem:  # noqa: BLE001 - a rival that cannot run must not end the benchmark
                row["not_run"][name] = _reason(problem)
                row["rivals"].pop(name, None)
                timings.pop(name, None)
                if run.device.type == "cuda":
                    torch.cuda.empty_cache()
    if case.facts is not None:
        row |= case.facts()
    if timed and timings:
        with torch.no_grad():
            times = timing.measure(timings, run.device, case.clock, run.seconds, run.turns)
        for name in row["rivals"]:
            _add_figures(run, case, row, name, times[name], times.get(less.get(name, "")))
        if ours := row["rivals"].get("ours", {}).get("us"):  # 0: too short for the clock
            row["faster_than"] = {n: r["us"] / ours for n, r in row["rivals"].items() if n != "ours"}
    timings.clear()
    sets.clear()
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _on_capture_stream(run: Run, case: Case) -> contextlib.AbstractContextManager[Any]:
    if run.device.type == "cuda" and case.clock == "device":
        torch.cuda.synchronize()
        return torch.cuda.stream(timing.capture_stream())
    return contextlib.nullcontext()


def _input_sets(run: Run, case: Case) -> list[Inputs]:
    """Enough sets of inputs to be larger than the cache together."""
    first = case.make()
    size = sum(t.nbytes for t in timing.tensors(first))
    if case.whole or not size:
        return [first]
    most = 2 if run.sizes == "tiny" else MOST_SETS
    return [first, *(case.make() for _ in range(min(most, -(-ROTATED_BYTES[run.device.type] // size)) - 1))]


def _reason(problem: Exception) -> str:
    if isinstance(problem, Absent):
        return str(problem)
    lines = [line for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0][:200] if lines else ''}"


def _add_figures(run: Run, case: Case, row: Row, name: str, took: timing.Time, less: timing.Time | None) -> None:
    without = less.median if less else 0.0
    seconds, facts = took.median - without, row["rivals"][name]
    facts |= {"clock": took.clock, "turns": len(took.samples), "samples": [s - without for s in took.samples]}
    facts |= {"us": 1e6 * seconds}
    facts |= {key: 1e6 * (took.percentile(share) - without) for key, share in (("us_low", 0.2), ("us_high", 0.8))}
    if seconds <= 0:  # too short for the clock
        return
    for work, figure, scale, ceiling in ((case.flops, "tflops", 1e12, "matmul"), (case.moved, "gb_s", 1e9, "copy")):
        if work:
            facts[figure] = work / seconds / scale
            if ceiling in run.ceilings:  # else it could not be measured
                facts[f"of_{ceiling}"] = work / seconds / run.ceilings[ceiling]
    if case.units:
        facts["per_second"] = case.units / seconds


def without_samples(row: Row) -> Row:
    """The row as it is stored in a file."""
    rivals = {name: {k: v for k, v in facts.items() if k != "samples"} for name, facts in row["rivals"].items()}
    return {**row, "rivals": rivals}


def failed(row: Row) -> bool:
    """Whether something is wrong, rather than slow or absent: a wrong result, ours not running, or a failed test."""
    return bool(row.get("wrong")) or "ours" in row.get("not_run", {}) or bool(row.get("failed"))


# --- ceilings -------------------------------------------------------------------------------------------------------


def ceilings(run: Run) -> dict[str, float]:
    """The most this machine reaches, on random data: bytes/s of a copy, read and written ones both counted, and FLOP/s
    of a matrix product in the dtype of the run; on a GPU also the seconds of a replay that does nothing."""
    numbers, n = run.pick(1 << 31, 1 << 26, 1 << 20), run.pick(8192, 2048, 128)
    if run.device.type == "cuda":  # 8.6 GB at two bytes per number, or what fits
        numbers = min(numbers, torch.cuda.mem_get_info()[0] // 8)
    pair = [run.random(numbers), run.random(numbers)]
    found = {"copy": [lambda: pair[0].copy_(pair[1])]}
    copy = timing.measure(found, run.device, "device", run.seconds, run.turns)["copy"].median
    moved = 2.0 * pair[0].nbytes
    pair.clear()
    a, b = run.random(n, n), run.random(n, n)
    product = timing.measure({"matmul": [lambda: a @ b]}, run.device, "device", run.seconds, run.turns)["matmul"].median
    values = {"copy": moved / copy, "matmul": 2.0 * n**3 / product}
    if run.device.type == "cuda":
        values["launch"] = timing.launch_floor()
    run.ceilings = values
    return values
