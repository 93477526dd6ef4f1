"""What `benchmarks.gpu` runs: stages are generators of rows that start nothing after `end` (time.monotonic)."""

from __future__ import annotations

import collections
import concurrent.futures
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from benchmarks import measure, results
from benchmarks.measure import Row, Run
from benchmarks.results import ROOT

# Rivals that take many seconds to compile or to run. They come in this order, one pass over the cases for each, after
# the rest of the stage is on disk: one that is slower than expected, or hangs, takes nothing from the others.
SLOW = (
    "compiled",
    "flex",
    "transformers, static cache + compile",
    "transformers, continuous batching",
    "transformers",
    "compiled, max-autotune",
)

# For compute-sanitizer, which is about fifty times slower than a plain run: each kernel a few times.
SANITIZED = (
    "test_layernorm.py::test_forward",
    "test_layernorm.py::test_gradients",
    "test_gemm.py::test_forward",
    "test_gemm.py::test_gelu_mlp",
    "test_gemm.py::test_decode",
    "test_fused_attention.py::test_packed",
    "test_attention_backward.py::test_gradients",
    "test_attentionmap.py::test_chosen_heads_and_rows",
    "test_decoding.py::test_state_moves_on_by_a_token",
    "test_kv_cache.py::test_writes_the_slots_and_nothing_else",
    "test_kv_cache.py::test_float8",
    "test_paged.py::test_decode",
    "test_paged.py::test_decode_at_the_borders_of_splits",
    "test_paged.py::test_prefill",
    "test_paged.py::test_a_float8_cache",
    "test_crossentropy.py::test_cross_entropy",
    "test_crossentropy.py::test_linear_cross_entropy",
    "test_sampling.py::test_top_logprobs",
)


def environment(run: Run, end: float) -> Iterator[Row]:
    found = results.environment(run.device)
    missing = [name for name, version in found["packages"].items() if version is None]
    yield {"name": "environment", **found, "missing": missing}


def ceilings(run: Run, end: float) -> Iterator[Row]:
    yield {"name": "ceilings", **measure.ceilings(run)}


def benchmark(module: str) -> Callable[[Run, float], Iterator[Row]]:
    """The cases of a module, in its order: most important first. A slow rival is measured with ours in a row of its
    own, which `Results.add` merges with the case's first row."""

    def stage(run: Run, end: float) -> Iterator[Row]:
        found = []
        for case in importlib.import_module(f"benchmarks.{module}").cases(run):
            found.append(case)
            yield _measured(run, case, [name for name in case.rivals if name not in SLOW], end)
        for name in SLOW:
            for case in found:
                if name in case.rivals:
                    yield _measured(run, case, ["ours", name], end)

    return stage


def _measured(run: Run, case: measure.Case, rivals: list[str], end: float) -> Row:
    """The row of a case, whatever happens; a slow rival is the last of `rivals`."""
    slow = rivals[-1] if rivals[-1] in SLOW else None
    if time.monotonic() < end:
        try:
            return measure.without_samples(measure.compare(run, case, rivals, end=end))
        except Exception as problem:  # noqa: BLE001 - as while it was timed: other cases may fare better
            why = {slow or "ours": measure._reason(problem)}
    else:
        why = {slow or "all": measure.LATE}
    return {"name": case.name, "rivals": {}, "wrong": {}, "not_run": why}


def host(run: Run, end: float) -> Iterator[Row]:
    """What calls cost the host, with the real driver."""
    from benchmarks import host_time

    if run.device.type != "cuda":
        yield {
            "name": "host",
            "not_run": {"all": "no GPU: python -m benchmarks.host_time has a driver that does nothing"},
        }
        return
    yield {"name": "host", "host_us": host_time.measure(run.device)}


def tests(run: Run, end: float) -> Iterator[Row]:
    """The test suite, one process per file, several at a time; kernels first."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    kernels = {path.stem for path in (ROOT / "kernels" / "gpt2_kernels").glob("*.py")}
    files.sort(key=lambda path: path.stem.removeprefix("test_") not in kernels)
    if run.sizes == "tiny":
        files = [ROOT / "tests" / "test_blocks.py"]
    work = [(path.name, [sys.executable], [f"tests/{path.name}"], {}) for path in files]
    yield from _side_by_side(_jobs(), work, end)


def sanitizer(run: Run, end: float) -> Iterator[Row]:
    """memcheck and racecheck, with each tensor in its own allocation, so that an overrun leaves it."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or run.device.type != "cuda":
        yield {"name": "sanitizer", "not_run": {"all": "no compute-sanitizer, or no GPU"}}
        return
    jobs = _jobs()
    parts = max(1, jobs // 2)  # of each kind: under the tool, importing PyTorch takes longer than most tests
    work = []
    for check in ("memcheck", "racecheck"):
        for at in range(parts):
            prefix = [tool, "--tool", check, "--error-exitcode", "9", sys.executable]
            selection = [*(f"tests/{test}" for test in SANITIZED[at::parts]), "-k", "triton and not float32"]
            work.append((f"{check} {at + 1} of {parts}", prefix, selection, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    yield from _side_by_side(jobs, work, end)


def _jobs() -> int:
    """How many processes compile kernels side by side: each keeps a compiler and an assembler busy."""
    return max(1, (os.cpu_count() or 1) // 2)


def _side_by_side(jobs: int, work: list[tuple[str, list[str], list[str], dict[str, str]]], end: float) -> Iterator[Row]:
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_pytest, *item, end) for item in work]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()


def _pytest(name: str, prefix: list[str], selection: list[str], environment: dict[str, str], end: float) -> Row:
    left = end - time.monotonic()
    if left <= 0:
        return {"name": name, "not_run": {"all": measure.LATE}}
    start = time.perf_counter()
    command = [*prefix, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *selection]
    clean = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    row: Row = {"name": name}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, timeout=left
        )
        said, complaint, status = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as ended:
        said, complaint, status = (ended.stdout or b"").decode(errors="replace"), "", 0  # bytes, whatever `text` says
        row["ended"] = "at its limit"
    if "No module named pytest" in complaint:
        return {"name": name, "not_run": {"all": "pytest is not installed"}}
    row["seconds"] = round(time.perf_counter() - start, 1)
    verdicts = re.findall(r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b", said, re.MULTILINE)
    row |= collections.Counter(verdict.lower() for _, verdict in verdicts)
    failures = [f"{verdict} {test}"[:300] for test, verdict in verdicts if verdict in ("FAILED", "ERROR")]
    if failures or status not in (0, 5):  # 5: nothing was selected
        tail = (said.splitlines() or complaint.splitlines())[-60:]
        row |= {"failed": len(failures) or 1, "failures": failures[:50], "tail": [line[:300] for line in tail]}
    return row


# Name -> (stage, share of the time). Measurements first, in order of value; tests take what is left over. The first two
# return most of their share, unless the disk is slow.
STAGES: dict[str, tuple[Callable[[Run, float], Iterable[Row]], float]] = {
    "environment": (environment, 2),
    "ceilings": (ceilings, 4),
    "paged": (benchmark("bench_paged"), 5),
    "engine": (benchmark("bench_engine"), 22),
    "layernorm": (benchmark("bench_layernorm"), 6),
    "crossentropy": (benchmark("bench_crossentropy"), 4),
    "fused_attention": (benchmark("bench_fused_attention"), 6),
    "attention_backward": (benchmark("bench_attention_backward"), 6),
    "gemm": (benchmark("bench_gemm"), 8),
    "training": (benchmark("bench_training"), 6),
    "sampling": (benchmark("bench_sampling"), 2),
    "apply": (benchmark("bench_apply"), 2),
    "host": (host, 3),
    "tuner": (benchmark("tune"), 6),
    "tests": (tests, 14),
    "sanitizer": (sanitizer, 6),
}
