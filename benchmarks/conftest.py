"""`pytest benchmarks/`: every case of every `bench_*.py`, with one test per implementation and one group per case.

The implementations of a case are measured together, in turns, when its first test runs (benchmarks.measure). Each test
then hands its samples to pytest-benchmark, so that its tables, files and comparisons show device time where there is a
GPU. All other figures are in `extra_info`.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, results
from gpt2_kernels import _runtime

_RUN = pytest.StashKey[measure.Run]()
_ROWS = pytest.StashKey[dict[str, measure.Row]]()
_RESULTS = pytest.StashKey[results.Results]()
_STAGES = pytest.StashKey[set[str]]()  # those already begun in the results file


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpt2-kernels")
    group.addoption(
        "--sizes", choices=("auto", "gpu", "cpu", "tiny"), default="auto", help="auto: what the machine has"
    )
    group.addoption("--out", type=Path, metavar="DIR", help="keep the rows in DIR/<device>/<date>.json as well")


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise pytest.UsageError("benchmarks need pytest-benchmark: pip install '.[bench]' (benchmarks.gpu does not)")
    if _runtime.interpreting():
        raise pytest.UsageError("benchmarks: Triton runs in interpreter mode here; use a process of their own")
    run = measure.default_run(config.getoption("--sizes"))
    config.stash[_RUN] = run
    config.stash[_ROWS] = {}
    if out := config.getoption("--out"):
        config.stash[_RESULTS] = results.Results(out, results.device_name(run.device))


_samples: collections.deque[float] = collections.deque()


def recorded() -> float:
    """A clock for pytest-benchmark, which reads it twice per round: the difference is one of our samples."""
    return _samples.popleft() if _samples else 0.0


@dataclasses.dataclass(frozen=True)
class Measured:
    """The outcome for one implementation of a case."""

    right: bool
    why: str


def pytest_report_header(config: pytest.Config) -> list[str]:
    run = config.stash[_RUN]
    missing = [name for name, version in results.environment(run.device)["packages"].items() if version is None]
    return [
        f"measured on {results.device_name(run.device)}, sizes: {run.sizes}, torch {torch.__version__}",
        f"not installed, so not compared: {', '.join(missing) or 'nothing'}",
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measured" not in metafunc.fixturenames or not hasattr(metafunc.module, "cases"):
        return
    stage = metafunc.module.__name__.rpartition("bench_")[2]
    wanted = []
    for case in metafunc.module.cases(metafunc.config.stash[_RUN]):
        for name in case.rivals:
            mark = pytest.mark.benchmark(group=case.name, timer=recorded)
            wanted.append(pytest.param((stage, case, name), id=f"{case.name}-{name}", marks=mark))
    metafunc.parametrize("measured", wanted, indirect=True)


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config) -> dict[str, float]:
    return measure.ceilings(pytestconfig.stash[_RUN])


@pytest.fixture
def measured(request: pytest.FixtureRequest, benchmark: Any, ceilings: dict[str, float]) -> Measured:
    """Measures the case, unless another implementation's test already has; skips where this one could not run."""
    stage, case, name = request.param
    config = request.config
    rows = config.stash[_ROWS]
    if case.name not in rows:
        params = [getattr(item, "callspec", None) for item in request.session.items]
        chosen = [p.params["measured"] for p in params if p is not None and "measured" in p.params]
        selected = [other for _, its_case, other in chosen if its_case.name == case.name]
        rows[case.name] = measure.compare(config.stash[_RUN], case, only=selected, timed=not benchmark.disabled)
        _keep(config, stage, rows[case.name])
    row = rows[case.name]
    if name in row["not_run"]:
        if name == "ours":
            pytest.fail(row["not_run"][name])
        pytest.skip(row["not_run"][name])
    figures = dict(row["rivals"].get(name, {}))
    taken = figures.pop("samples", [])
    _samples.extend(reading for seconds in taken for reading in (0.0, seconds))
    benchmark.extra_info.update(figures, ceilings=ceilings)
    if taken or benchmark.disabled:
        benchmark.pedantic(lambda: None, rounds=max(len(taken), 1))
    return Measured(name not in row["wrong"], row["wrong"].get(name, ""))


def _keep(config: pytest.Config, stage: str, row: measure.Row) -> None:
    kept = config.stash.get(_RESULTS, None)
    if kept is None:
        return
    run = config.stash[_RUN]
    started = config.stash.setdefault(_STAGES, set())
    if stage not in started:
        started.add(stage)
        kept.begin(stage, run.sizes, results.environment(run.device), run.ceilings)
    kept.add(stage, measure.without_samples(row))
