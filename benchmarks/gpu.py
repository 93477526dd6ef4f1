"""Everything to measure in a short stay on a GPU machine, in one command, from a source tree:

    PYTHONPATH=kernels:. python -m benchmarks.gpu --minutes 9 --out benchmarks/results

Stages run one after another, each in its own process: a crash or a hang ends that stage alone. Every row is on disk as
soon as it is measured. A stage may use its share of the remaining time: what one leaves over goes to the next, and none
starves; `--limit tests=200` sets a limit in seconds by hand. What is not installed is reported and left out: neither
pytest-benchmark nor a network is needed. Without a GPU the same stages run at CPU sizes.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gates, measure, results
from benchmarks.measure import Row
from benchmarks.results import ROOT, Results
from benchmarks.stages import STAGES

MARK = "ROW "  # begins each line of a stage's output that is a row; all other lines come from libraries
GRACE = 5.0  # seconds that a stage may overrun before it is killed


def stage_process(stage: str, options: argparse.Namespace) -> int:
    """What a stage's process does: prints its rows, one per line."""
    end = options.end
    run = measure.default_run(options.sizes)
    run.ceilings = json.loads(options.ceilings)
    if run.device.type == "cuda":
        run.seconds = 0.25  # graphs are replayed for at least a millisecond per sample: enough for a stable median
    try:
        for row in STAGES[stage][0](run, end):
            print(MARK + json.dumps(row), flush=True)
    except Exception as problem:  # noqa: BLE001 - its rows so far are printed; this adds the failure
        print(MARK + json.dumps({"name": stage, "failed": 1, "failures": [measure._reason(problem)]}), flush=True)
        raise
    return 0


def run_stage(
    stage: str, options: argparse.Namespace, seconds: float, ceilings: dict[str, float], take: Callable[[Row], None]
) -> str:
    """Runs a stage and hands over its rows as they come; returns what ended it early, or ""."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", stage, "--sizes", options.sizes]
    end = time.monotonic() + seconds  # all processes share this clock; startup counts too
    command += ["--end", f"{end:.1f}", "--ceilings", json.dumps(ceilings)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    words: collections.deque[str] = collections.deque(maxlen=20)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                take(json.loads(line.removeprefix(MARK)))
            else:
                words.append(line.rstrip()[:300])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    late = False
    try:
        process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # and its children: pytest, compilers
        except ProcessLookupError:
            pass
    reader.join(10)
    if late:
        return f"ended after {seconds:.0f} s, at its limit"
    code = process.wait()
    return "" if code == 0 else f"exit status {code}: " + " | ".join(list(words)[-5:])


def compile_native() -> subprocess.Popen[bytes]:
    """Starts compiling the C++ operators, on a core that GPU measurements leave idle: it takes up to a minute, and
    otherwise each test process would do it."""
    command = [sys.executable, "-c", "from gpt2_kernels import _native; _native.load()"]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, stdin=nothing, stdout=nothing, stderr=nothing)


def limits(stages: list[str], left: float, fixed: dict[str, float]) -> float:
    """Seconds for the first of the remaining stages."""
    first = stages[0]
    if first in fixed:
        return min(fixed[first], left)
    kept = sum(seconds for stage, seconds in fixed.items() if stage in stages)
    free = max(left - kept, 0.0)
    return free * STAGES[first][1] / sum(STAGES[stage][1] for stage in stages if stage not in fixed)


def chosen(only: str | None) -> list[str]:
    """The stages that `--only` names, by part of the name; always the environment, and the ceilings, since figures are
    shares of them."""
    if only is None:
        return list(STAGES)
    parts = [part.strip() for part in only.split(",") if part.strip()]
    for part in parts:
        if not any(part in stage for stage in STAGES):
            raise ValueError(f"--only must name stages ({', '.join(STAGES)}), got {part!r}")
    return [s for s in STAGES if s in ("environment", "ceilings") or any(part in s for part in parts)]


def _limit(text: str) -> tuple[str, float]:
    stage, _, seconds = text.partition("=")
    if stage not in STAGES or not re.fullmatch(r"\d+(\.\d+)?", seconds):
        raise argparse.ArgumentTypeError(f"must be STAGE=SECONDS with one of {', '.join(STAGES)}, got {text!r}")
    return stage, float(seconds)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default 9)")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="DIR/<device>/<date>.json")
    parser.add_argument("--only", metavar="A,B", help=f"stages, by a part of their names: {', '.join(STAGES)}")
    parser.add_argument("--limit", type=_limit, action="append", default=[], metavar="STAGE=SECONDS", help="repeatable")
    parser.add_argument("--sizes", choices=("auto", "gpu", "cpu", "tiny"), default="auto", help="tiny: a dry run")
    for name, kind in (("--stage", str), ("--end", float), ("--ceilings", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # for a stage's process
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    try:
        options.stages = chosen(options.only)
    except ValueError as problem:
        parser.error(str(problem))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.stage:
        status = stage_process(options.stage, options)
        sys.stdout.flush()
        os._exit(status)  # without waiting for compilers that still try candidates for a rival
    end = time.monotonic() + 60 * options.minutes
    run = measure.default_run(options.sizes)
    kept = Results(options.out, results.device_name(run.device))
    facts, reached, fixed, bad = results.environment(run.device), {}, dict(options.limit), False
    if run.device.type == "cuda" and "tests" in options.stages:
        compile_native()
    for at, stage in enumerate(options.stages):
        seconds = limits(options.stages[at:], end - time.monotonic() - GRACE, fixed)
        kept.begin(stage, run.sizes, facts, reached)

        def take(row: Row, stage: str = stage) -> None:
            kept.add(stage, row)
            print(f"[{stage}] {line(row)}", flush=True)

        note = run_stage(stage, options, seconds, reached, take) if seconds > 1 else "no time was left"
        kept.end(stage, note)
        rows = kept.stages[stage]["rows"]
        bad |= any(measure.failed(row) for row in rows) or note.startswith("exit status")
        if stage == "ceilings" and rows:
            reached = {name: value for name, value in rows[0].items() if isinstance(value, float)}
        if stage == "ceilings" and "copy" not in reached:
            print(f"the ceilings could not be measured: figures are no shares of them ({note})", file=sys.stderr)
            bad = True
    print(table(kept.content, options.stages))
    print(f"\n{kept.path} ({kept.path.stat().st_size / 1e3:.0f} kB)")
    return 1 if bad else 0


# --- the page at the end --------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """A row as one line."""
    name, found = row["name"], row.get("rivals", {})
    if row.get("not_run", {}).get("all") or "rivals" not in row:
        facts = row.get("not_run") or {k: v for k, v in row.items() if k not in ("name", "failures", "tail")}
        return f"{name:46} {json.dumps(facts)[:150]}"
    ours = found.get("ours", {})
    text = f"{name:46} "
    if "us" in ours:
        share = max(((ours[key], key[3:]) for key in ("of_matmul", "of_copy") if key in ours), default=None)
        text += f"{ours['us']:11.1f} us" + (f" {100 * share[0]:5.1f} % of {share[1]:6}" if share else " " * 17)
        if "per_second" in ours:
            text += f" {ours['per_second']:,.0f} {row['unit']}/s"
        text += "".join(f"  {times:.2f}x {rival}" for rival, times in row.get("faster_than", {}).items())
    for key, label in (("wrong", "WRONG"), ("not_run", "not run")):
        text += "".join(f"  [{label} {rival}: {why[:80]}]" for rival, why in row.get(key, {}).items())
    return text.rstrip()


def table(content: dict[str, Any], stages: list[str]) -> str:
    """One page: the gates, how long each stage took, and what failed."""
    found = [f"{content['device']}, {content['date']}"]
    rows = gates.rows_of({stage: content["stages"][stage] for stage in stages})
    for gate in gates.GATES:
        value, status = gate.judge(rows)
        asked = " ".join(f"{n} {v:.4g}" for n, v in (("gate", gate.gate), ("goal", gate.goal)) if v is not None)
        shown = "" if value is None else f"{value:.3g} {gate.what}"
        found.append(f"{gate.number:>3} {gate.item[:46]:46} {shown:32} {status:10} {asked}")
    for stage in stages:
        entry = content["stages"][stage]
        counts = collections.Counter()
        for row in entry["rows"]:
            counts.update({key: row[key] for key in ("passed", "failed", "skipped") if key in row})
        words = [f"{len(entry['rows'])} rows", *(f"{n} {what}" for what, n in counts.items()), entry["note"][:100]]
        found.append(f"{stage:19} {entry['seconds']:6.1f} s  {', '.join(word for word in words if word)}")
        found += [f"    {line(row)}"[:200] for row in entry["rows"] if measure.failed(row)]
    return "\n".join(found)


if __name__ == "__main__":
    sys.exit(main())
