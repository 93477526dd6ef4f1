"""Where results are kept: `<folder>/<device>/<date>.json`, rewritten after every row, so that nothing is lost.

    {"device": "NVIDIA H200", "date": "2026-11-24", "stages": {"layernorm": {
        "sizes": "gpu", "environment": {versions, commit, clocks}, "ceilings": {"copy": bytes/s, "matmul": FLOP/s},
        "seconds": 40.1, "note": "" or what ended it early, "rows": [a row of benchmarks.measure.compare, ...]}, ...}}

A stage that is measured again on the same day replaces only itself: each has its own environment and ceilings.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.measure import Row

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).with_name("results")
MOST_BYTES = 8 << 20


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found.group(1).strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def slug(device: str) -> str:
    """The name of a device's folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def environment(device: torch.device) -> dict[str, Any]:
    """What figures depend on besides the code."""
    found: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": peers.versions(),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        if smi := shutil.which("nvidia-smi"):
            query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,driver_version"
            found["nvidia_smi"] = output([smi, f"--query-gpu={query}", "--format=csv"])
    else:
        found["capability"] = torch.backends.cpu.get_cpu_capability()
        if hasattr(os, "getloadavg"):
            found["load"] = round(os.getloadavg()[0], 1)  # other load: a busy machine's figures say little
    return found


def _commit() -> str | None:
    """The commit of the measured tree, with "+" if it had uncommitted changes; None outside a repository."""
    commit = output(["git", "rev-parse", "--short", "HEAD"])
    if not re.fullmatch("[0-9a-f]+", commit):
        return None
    return commit + ("+" if output(["git", "status", "--porcelain", "--untracked-files=no"]) else "")


def output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as problem:
        return str(problem)
    return done.stdout.strip()


class Results:
    """The results file of one device and day; stages are added row by row."""

    def __init__(self, folder: Path, device: str, date: str | None = None):
        date = date or time.strftime("%Y-%m-%d")
        self.path = folder / slug(device) / f"{date}.json"
        self.content: dict[str, Any] = {"device": device, "date": date, "stages": {}}
        if self.path.exists():
            self.content = read(self.path)

    @property
    def stages(self) -> dict[str, Any]:
        return self.content["stages"]

    def begin(self, stage: str, sizes: str, environment: dict[str, Any], ceilings: dict[str, float]) -> None:
        self.stages[stage] = {
            "sizes": sizes, "environment": environment, "ceilings": ceilings, "seconds": 0.0, "note": "", "rows": []
        }  # fmt: skip
        self._started = time.perf_counter()
        self.save()

    def add(self, stage: str, row: Row) -> None:
        """Adds a row. If its case has one already, it adds rivals to that, each as fast as it was beside ours then."""
        rows = self.stages[stage]["rows"]
        known = next((r for r in rows if r["name"] == row["name"] and "rivals" in r), None)
        if known is None:
            rows.append(row)
        else:
            for key in ("rivals", "not_run", "wrong", "faster_than"):
                for name, value in row.get(key, {}).items():
                    known.setdefault(key, {}).setdefault(name, value)
        self.end(stage)

    def end(self, stage: str, note: str = "") -> None:
        entry = self.stages[stage]
        entry["seconds"] = round(time.perf_counter() - self._started, 1)
        entry["note"] = note or entry["note"]
        self.save()

    def save(self) -> None:
        text = json.dumps(self.content, indent=1)
        if len(text) > MOST_BYTES:  # only the output of failures can grow this long
            for stage in self.stages.values():
                for row in stage["rows"]:
                    row.pop("tail", None)
            text = json.dumps(self.content, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, self.path)  # a reader never sees half a file, and an interruption never leaves one


def read(path: Path) -> dict[str, Any]:
    """The content of a results file; ValueError if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if all({"rows", "sizes"} <= stage.keys() for stage in content["stages"].values()):
            return content
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"results: {path} must be a file that pytest benchmarks/ or benchmarks.gpu wrote")
