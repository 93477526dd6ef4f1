"""How long a call takes, and how much memory: the one place where clocks are read.

Rivals take turns (A, B, A, B ...), so that drift of the machine's clock rate affects all alike; a figure is the median
over the turns, with the 20th and 80th percentiles beside it: a difference inside that spread is noise. Each rival is a
list of calls, each on its own inputs, which together are larger than the cache: no call finds its inputs there.

    device   a CUDA graph of all calls in the list, replayed many times between two events: the GPU's time without the
             host's. The time of an empty replay is measured in the same way and subtracted.
    wall     on the host until the result is ready, host work included; on a CPU it is the only clock.
    host     what the host spends on a call before it returns, while the GPU is still at work.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Call = Callable[[], object]
SAMPLE_SECONDS = 1e-3  # a sample is at least this long, by repetition: clock ticks and launch gaps are not


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds per call."""

    samples: tuple[float, ...]
    clock: str  # "device", "wall", or "events" where a call cannot be captured: includes host gaps

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def measure(
    rivals: Mapping[str, Sequence[Call]], device: torch.device, clock: str, seconds: float, turns: int = 30
) -> dict[str, Time]:
    """Times of all rivals, in at most `turns` turns and about `seconds` per rival, but at least three turns."""
    if clock not in ("device", "wall"):
        raise ValueError(f"measure: clock must be 'device' or 'wall', got {clock!r}")
    runners = {}
    for name, calls in rivals.items():
        on_device = clock == "device" and device.type == "cuda"
        runners[name] = _Replayed(calls) if on_device else _Called(calls, device)
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds * len(rivals)
    for turn in range(turns):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, runner in runners.items():
            samples[name].append(runner.sample())
    return {name: Time(tuple(values), runners[name].clock) for name, values in samples.items()}


class _Called:
    """Wall time: several calls, continuing the list where the last sample left off, then one wait."""

    clock = "wall"

    def __init__(self, calls: Sequence[Call], device: torch.device):
        self.calls, self.device, self.at, self.repeat = calls, device, 0, 1
        self.sample()  # warms up
        self.repeat = max(1, min(1000, round(SAMPLE_SECONDS / self.sample())))

    def sample(self) -> float:
        wait(self.device)
        start = time.perf_counter()
        for i in range(self.at, self.at + self.repeat):
            self.calls[i % len(self.calls)]()
        wait(self.device)
        taken = time.perf_counter() - start
        self.at = (self.at + self.repeat) % len(self.calls)
        return taken / self.repeat


class _Replayed:
    """Device time by replaying a graph; by events around plain calls where a call cannot be captured."""

    def __init__(self, calls: Sequence[Call]):
        self.count, self.repeat, self.empty = len(calls), 1, 0.0
        try:
            self.replay, self.clock = capture(calls), "device"
        except RuntimeError:
            torch.cuda.synchronize()

            def again() -> None:
                for call in calls:
                    call()

            self.replay, self.clock = again, "events"
        self.sample()
        first = self.sample()
        self.repeat = max(1, min(1000, round(SAMPLE_SECONDS / max(first * self.count, 1e-7))))
        self.empty = launch_floor() if self.clock == "device" else 0.0

    def sample(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.replay()  # keeps the GPU busy while the host gets ahead of it
        start.record()
        for _ in range(self.repeat):
            self.replay()
        end.record()
        end.synchronize()
        return max(1e-3 * start.elapsed_time(end) / self.repeat - self.empty, 0.0) / self.count


_stream: list[torch.cuda.Stream] = []


def capture_stream() -> torch.cuda.Stream:
    """The stream of all captures. A backward runs on its forward's stream: prepare both on this one."""
    if not _stream:
        _stream.append(torch.cuda.Stream())
    return _stream[0]


def capture(calls: Sequence[Call]) -> Call:
    """One CUDA graph of all calls; RuntimeError where they cannot be captured."""
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, plans and allocates outside the capture
        for call in (*calls, calls[0]):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


_floor: list[float] = []


def launch_floor() -> float:
    """Seconds per replay of a graph that does next to nothing, including the gap between replays."""
    if not _floor:
        one = torch.zeros(1, device="cuda")
        replay = capture([lambda: one.add_(1)])
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        values = []
        for _ in range(10):
            torch.cuda.synchronize()
            replay()
            start.record()
            for _ in range(200):
                replay()
            end.record()
            end.synchronize()
            values.append(1e-3 * start.elapsed_time(end) / 200)
        _floor.append(statistics.median(values))
    return _floor[0]


def host_seconds(calls: Sequence[Call], device: torch.device) -> float:
    """Host time per call in the fastest of a few loops, without waiting for the GPU in between."""
    found = []
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        for i in range(20):  # few enough not to fill the launch queue
            calls[i % len(calls)]()
        found.append((time.perf_counter() - start) / 20)
    wait(device)
    return min(found)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Peak memory that PyTorch held during a call, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    del kept
    held = most = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def tensors(result: object) -> list[Tensor]:
    """The tensors in a result, which may be one or several."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in tensors(part)] if isinstance(result, (tuple, list)) else []


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
