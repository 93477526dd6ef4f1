"""How long a call takes: kernel time by graph replay on a GPU, the cache flushed before each; rivals take turns.

A figure is the median over the turns, with the spread between the 20th and the 80th percentile beside it: a difference
inside the spread is noise. On a CPU wall time is taken, which serves to try the benchmarks out, not to publish.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU


@dataclasses.dataclass(frozen=True)
class Time:
    """Microseconds of one call."""

    median: float
    low: float  # 20th percentile
    high: float  # 80th


def kernel_times(calls: Mapping[str, Callable[[], object]], device: torch.device, turns: int = 30) -> dict[str, Time]:
    """Device time of each call, without the host's: A, B, A, B ... A call must be fit for capture in a CUDA graph."""
    if device.type == "cpu":
        return wall_times(calls, device, turns)
    graphs = {name: _capture(call) for name, call in calls.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events = {name: [] for name in calls}  # type: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
    for _ in range(turns):
        for name, graph in graphs.items():
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: _time([1e3 * a.elapsed_time(b) for a, b in pairs]) for name, pairs in events.items()}


def wall_times(
    calls: Mapping[str, Callable[[], object]], device: torch.device, turns: int = 30, repeat: int = 1
) -> dict[str, Time]:
    """Time from the host's side, device included: `repeat` calls in a row, then one wait, divided by their number."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(turns):
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            _wait(device)
            samples[name].append(1e6 * (time.perf_counter() - start) / repeat)
    return {name: _time(values) for name, values in samples.items()}


def _capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, plans and allocates outside the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # which has what it keeps from launch to launch by now
        call()
    return graph


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(values: list[float]) -> Time:
    ordered = sorted(values)
    return Time(statistics.median(ordered), ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5])
