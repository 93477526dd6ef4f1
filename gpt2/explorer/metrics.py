"""Counters of the server in Prometheus' text format."""

from __future__ import annotations

import bisect
import collections
from collections.abc import Iterator, Mapping

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
PATHS = (
    "/", "/explorer.css", "/explorer.js", "/explorer/model", "/explorer/look", "/explorer/attention", "/v1/completions",
    "/v1/chat/completions", "/v1/models", "/health", "/metrics",
)  # fmt: skip

# The engine's own counters, stats() -> (name, kind, meaning).
ENGINE = {
    "prompt_tokens": ("gpt2_prompt_tokens_total", "counter", "Tokens of prompts that were taken."),
    "output_tokens": ("gpt2_output_tokens_total", "counter", "Tokens generated."),
    "prefix_hits": ("gpt2_prefix_hit_tokens_total", "counter", "Prompt tokens found in the cache."),
    "preemptions": ("gpt2_preemptions_total", "counter", "Sequences set aside because blocks ran out."),
    "running": ("gpt2_sequences_running", "gauge", "Sequences in the batch."),
    "waiting": ("gpt2_sequences_waiting", "gauge", "Sequences that wait for room."),
    "num_blocks": ("gpt2_cache_blocks", "gauge", "Blocks of the key-value cache."),
    "free_blocks": ("gpt2_cache_blocks_free", "gauge", "Blocks that no sequence holds."),
}


class Histogram:
    """Counts of durations, each in its bucket."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum!r}"
        yield f"{name}_count {total}"


class Metrics:
    """What has been asked and answered since the start; for the event loop's thread."""

    def __init__(self) -> None:
        self.answers: collections.Counter[tuple[str, int]] = collections.Counter()
        self.first_token = Histogram()  # of streams
        self.request = Histogram()

    def answered(self, path: str, status: int) -> None:
        """Any path that is not one of ours counts as "other": labels must not grow with what clients invent."""
        self.answers[path if path in PATHS else "other", status] += 1

    def text(self, stats: Mapping[str, int], *, active: int, jobs: int) -> str:
        lines = []

        def add(name: str, kind: str, meaning: str, *values: str) -> None:
            lines.extend([f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *values])

        requests = [f'gpt2_requests_total{{path="{p}",status="{s}"}} {n}' for (p, s), n in sorted(self.answers.items())]
        add("gpt2_requests_total", "counter", "Answers by path and HTTP status; 499: the client had gone.", *requests)
        add("gpt2_requests_active", "gauge", "Requests let in and not answered yet.", f"gpt2_requests_active {active}")
        add("gpt2_jobs", "gauge", "Completions requests that the engine has at hand.", f"gpt2_jobs {jobs}")
        for name, histogram, meaning in (
            ("gpt2_first_token_seconds", self.first_token, "Time to the first token of a stream."),
            ("gpt2_request_seconds", self.request, "Time to the end of a completion."),
        ):
            add(name, "histogram", meaning, *histogram.lines(name))
        for key, (name, kind, meaning) in ENGINE.items():
            if key in stats:
                add(name, kind, meaning, f"{name} {stats[key]}")
        return "\n".join(lines) + "\n"
