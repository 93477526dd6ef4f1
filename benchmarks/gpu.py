"""Everything that only a GPU can tell, in one command: `python -m benchmarks.gpu --out benchmarks/results/NAME.json`.

Runs the test suite on the GPU and a short set of it under compute-sanitizer, measures the machine's ceilings (copy and
matrix product), then every kernel against its strongest rival in the same process, checks its gate, and times the
candidates of the launch tables. The JSON is written again after every part, so that an interrupted run loses nothing.
`--smoke` runs all of it on tiny shapes on any machine: to try the script, not to publish.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernels, tune
from benchmarks.kernels import Row, Run
from benchmarks.timing import kernel_times

ROOT = Path(__file__).parents[1]

# For compute-sanitizer, which is some fifty times slower than a plain run: each kernel a few times.
SANITIZED = (
    "test_layernorm.py::test_forward",
    "test_layernorm.py::test_gradients",
    "test_gemm.py::test_forward",
    "test_gemm.py::test_gelu_mlp",
    "test_fused_attention.py::test_packed",
    "test_attention_backward.py::test_gradients",
    "test_attentionmap.py::test_chosen_heads_and_rows",
    "test_kv_cache.py::test_writes_the_slots_and_nothing_else",
    "test_paged.py::test_decode",
    "test_paged.py::test_decode_at_the_borders_of_splits",
    "test_paged.py::test_prefill",
    "test_crossentropy.py::test_cross_entropy",
    "test_crossentropy.py::test_linear_cross_entropy",
    "test_sampling.py::test_top_logprobs",
)
PYTEST_SECONDS = 500  # a run that takes longer is ended, and said to be


# --- the parts ------------------------------------------------------------------------------------------------------


def environment(run: Run) -> Iterator[Row]:
    row = {"python": platform.python_version(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    with contextlib.suppress(ImportError):
        import triton

        row["triton"] = triton.__version__
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        row |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
        }
        if smi := shutil.which("nvidia-smi"):
            query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,driver_version"
            row["nvidia_smi"] = _output([smi, f"--query-gpu={query}", "--format=csv"])
    commit = _output(["git", "rev-parse", "HEAD"])
    yield {"name": "environment", **row, "commit": commit}


def tests(run: Run) -> Iterator[Row]:
    """The whole suite, kernels on the GPU."""
    selection = ["tests/test_layernorm.py", "-k", "test_empty"] if run.smoke else []
    yield {"name": "tests", **_pytest([sys.executable], selection)}


def sanitizer(run: Run) -> Iterator[Row]:
    """memcheck and racecheck, each tensor in an allocation of its own, so that an overrun leaves it."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield {"name": "sanitizer", "not_run": "compute-sanitizer is not installed"}
        return
    selection = [f"tests/{test}" for test in SANITIZED] + ["-k", "triton and not float32"]
    for check in ("memcheck", "racecheck"):
        prefix = [tool, "--tool", check, "--error-exitcode", "9", sys.executable]
        yield {"name": check, **_pytest(prefix, selection, PYTORCH_NO_CUDA_MEMORY_CACHING="1")}


def ceilings(run: Run) -> Iterator[Row]:
    """What this machine does at its best: a copy of 8.6 GB, bytes read and written; 8192^3 in bfloat16, random data."""
    numbers, n = run.size(1 << 31, 1 << 20), run.size(8192, 128)
    pair = [run.random(numbers), run.random(numbers)]
    copy = kernel_times({"copy": lambda: pair[0].copy_(pair[1])}, run.device, 10)["copy"].median
    pair.clear()
    a, b = run.random(n, n), run.random(n, n)
    product = kernel_times({"matmul": lambda: a @ b}, run.device, 10)["matmul"].median
    run.ceilings.update(copy=4 * numbers / copy * 1e6, matmul=2 * n**3 / product * 1e6)
    yield {"name": "ceilings", **run.ceilings}


def tables(run: Run) -> Iterator[Row]:
    """The candidates of the launch tables, each timed; what is fastest belongs into the table."""
    yield from tune.sweep(run.device, run.smoke)


PARTS: dict[str, Callable[[Run], Iterator[Row]]] = {
    part.__name__: part
    for part in (
        environment, ceilings, tests, kernels.attention, kernels.layer_norm, kernels.linear, kernels.cross_entropy,
        kernels.generation, tables, sanitizer,
    )
}  # fmt: skip


# --- running them ---------------------------------------------------------------------------------------------------


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()
    except OSError as error:
        return str(error)


def _pytest(prefix: list[str], selection: list[str], **environment: str) -> dict[str, Any]:
    start = time.perf_counter()
    command = [*prefix, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
    env = {**os.environ, **environment}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PYTEST_SECONDS)
    except subprocess.TimeoutExpired as error:
        tail = (error.stdout or b"").decode(errors="replace").splitlines()[-40:]
        return {"exit_code": 124, "summary": f"ended after {PYTEST_SECONDS} s", "failures": [], "tail": tail}
    lines = done.stdout.splitlines()
    return {
        "exit_code": done.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "summary": lines[-1] if lines else done.stderr[-500:],
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "tail": lines[-40:] if done.returncode else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write; default: on the terminal alone")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some of the parts; ceilings are always measured")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any machine: tries the script out")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.exit(2, "benchmarks.gpu: no GPU is visible to torch; --smoke tries the script without one\n")
    run = Run(torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.smoke, {})
    torch.manual_seed(0)
    wanted = [name for name in PARTS if not options.only or name in (*options.only, "environment", "ceilings")]
    results: dict[str, Any] = {"smoke": options.smoke, "parts": {}}
    failed = False
    for name in wanted:
        rows = results["parts"].setdefault(name, [])
        try:
            for row in PARTS[name](run):
                rows.append(row)
                print(json.dumps(row), flush=True)
                failed |= bool(row.get("exit_code")) or "disagrees" in row  # an unmet gate is a result, no failure
        except Exception as error:  # noqa: BLE001 - the other parts are still worth their time
            rows.append({"name": name, "error": f"{type(error).__name__}: {error}"})
            print(json.dumps(rows[-1]), flush=True)
            failed = True
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
