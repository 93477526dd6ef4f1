"""The benchmarks run, at tiny sizes, and detect wrong results; the times measured here mean nothing."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import stat
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from benchmarks import bench_sampling, gates, gpu, measure, peers, report, results, stages, timing, tune
from benchmarks.measure import Case, Run, against, backward, both, forward
from benchmarks.timing import Time
from gpt2_kernels import _check, fused_attention

pytestmark = pytest.mark.usefixtures("production")
# A module without cases measures in its own way.
MODULES = sorted(p.stem for p in (ROOT / "benchmarks").glob("bench_*.py") if "\ndef cases(" in p.read_text())


@pytest.fixture
def run() -> Run:
    return Run(torch.device("cpu"), "tiny", {"copy": 1e9, "matmul": 1e9}, seconds=0.01, turns=3)


def cases_of(module: str, run: Run) -> list[Case]:
    return list(importlib.import_module(f"benchmarks.{module}").cases(run))


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a separate process: there CPU tensors take the production path, not the interpreter."""
    mine = ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    clean = {k: v for k, v in os.environ.items() if k not in mine}
    environment = {**clean, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


# --- the cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [*MODULES, "tune"])
def test_all_results_are_right(module: str, run: Run) -> None:
    found = cases_of(module, run)
    assert len({case.name for case in found}) == len(found)
    for case in found:
        row = measure.compare(run, case, timed=False)
        assert not measure.failed(row), row
        assert case.flops or case.moved, f"{case.name}: a figure has to be a share of some ceiling"
        if module == "bench_gemm" and case.name.startswith("linear"):
            assert row["same_bits"] is True


@pytest.mark.parametrize("sizes", ["gpu", "cpu"])
def test_cases_of_every_size_can_be_listed(sizes: str) -> None:
    """Without making inputs: those are made when a case is measured."""
    run = Run(torch.device("cpu"), sizes, {})
    for module in MODULES:
        names = [case.name for case in cases_of(module, run)]
        assert names and len(set(names)) == len(names)


@pytest.mark.parametrize("sizes", ["gpu", "cpu"])
def test_a_case_stays_what_it_was_while_others_are_listed(sizes: str) -> None:
    """pytest lists all cases before it makes any inputs: by then a size in a closure must not be another case's."""
    run = Run(torch.device("cpu"), sizes, {})
    for module in MODULES:
        then = []
        for case in importlib.import_module(f"benchmarks.{module}").cases(run):
            then.append((case, [cell.cell_contents for cell in case.make.__closure__ or ()]))
        for case, contents in then:
            now = [cell.cell_contents for cell in case.make.__closure__ or ()]
            assert all(a is b for a, b in zip(contents, now, strict=True)), f"{module}: {case.name}"


def test_every_gate_finds_its_rows() -> None:
    """A goal whose row was renamed would be missing forever. The cases of gate 16 (fp8) exist on a GPU only."""
    run = Run(torch.device("cpu"), "gpu", {})
    names = [case.name for module in MODULES for case in cases_of(module, run)]
    for gate in gates.GATES:
        if gate.number != 16:
            assert any(gates.re.match(gate.pattern, name) for name in names), gate


# --- comparing ------------------------------------------------------------------------------------------------------


def case(rivals: dict, make=lambda: (torch.rand(16),), **options) -> Case:
    check = options.pop("check", against(forward(torch.sin)))
    return Case("a case", make, {name: forward(f) for name, f in rivals.items()}, check, **options)


def test_a_wrong_result_is_found_and_not_timed(run: Run) -> None:
    rivals = {"ours": lambda x: x.sin() + 0.01, "nan": lambda x: x * math.nan, "torch": torch.sin}
    row = measure.compare(run, case(rivals, moved=128.0))
    assert set(row["wrong"]) == {"ours", "nan"} and set(row["rivals"]) == {"torch"} and "us" in row["rivals"]["torch"]
    assert measure.failed(row) and "0.01" in row["wrong"]["ours"]


def test_a_check_that_comes_to_no_number_is_no_pass(run: Run) -> None:
    row = measure.compare(run, case({"ours": torch.sin}, check=lambda inputs, result: math.nan), timed=False)
    assert "ours" in row["wrong"]


def test_what_is_not_written_is_found(run: Run) -> None:
    """Even if the result's memory already held the right values."""
    kept: list[torch.Tensor] = []

    def forgets(x: torch.Tensor) -> torch.Tensor:
        if not kept:
            kept.append(x.sin())
        return kept[0]

    assert "ours" in measure.compare(run, case({"ours": forgets}), timed=False)["wrong"]


def test_a_rival_that_is_missing_or_breaks_ends_nothing(run: Run) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of luck\nand more")

    rivals = {"ours": torch.sin, "broken": broken, "absent": lambda x: peers.package("no_such_package").sin(x)}
    row = measure.compare(run, case(rivals))
    assert row["not_run"]["broken"] == "RuntimeError: out of luck"
    assert row["not_run"]["absent"].startswith("no_such_package is not installed")
    assert row["rivals"]["ours"]["us"] > 0 and not measure.failed(row)
    assert measure.failed(measure.compare(run, case({"ours": broken})))


def test_gradients_are_checked(run: Run) -> None:
    """backward and both return all gradients, and a wrong one for the last input is found."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx, grad):
            x, y = ctx.saved_tensors
            return grad * y, grad * x * 1.1

    def make() -> tuple[torch.Tensor, ...]:
        return torch.rand(8), torch.rand(8), torch.rand(8)

    for kind in (backward, both):
        rivals = {"ours": kind(torch.mul), "wrong": kind(Wrong.apply)}
        row = measure.compare(run, Case("product", make, rivals, against(kind(torch.mul))), timed=False)
        assert set(row["rivals"]) == {"ours"} and set(row["wrong"]) == {"wrong"}, row


def test_figures_follow_from_the_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two calls, the second's time is subtracted; shares are of the ceilings, rates count the units."""
    seconds = {"ours": 3e-3, "ours - ": 1e-3, "torch": 4e-3}
    monkeypatch.setattr(
        timing, "measure", lambda calls, *_: {name: Time((seconds[name],) * 3, "wall") for name in calls}
    )
    rivals = {"ours": lambda x: (lambda: x.sin(), lambda: None), "torch": forward(torch.sin)}
    both = Case("a case", lambda: (torch.rand(4),), rivals, against(forward(torch.sin)), 1e6, 4e6, units=8.0)
    row = measure.compare(run, both)
    ours = row["rivals"]["ours"]
    assert ours["us"] == pytest.approx(2000) and ours["samples"] == pytest.approx([2e-3] * 3)
    assert ours["of_matmul"] == pytest.approx(0.5) and ours["of_copy"] == pytest.approx(2.0)
    assert ours["per_second"] == pytest.approx(4000) and row["faster_than"]["torch"] == pytest.approx(2.0)
    assert "samples" not in json.dumps(measure.without_samples(row))


def test_without_ceilings_there_are_figures_all_the_same(run: Run) -> None:
    run.ceilings = {}
    ours = measure.compare(run, case({"ours": torch.sin}, flops=16.0, moved=128.0))["rivals"]["ours"]
    assert ours["gb_s"] > 0 and ours["tflops"] > 0 and not {"of_copy", "of_matmul"} & ours.keys()


def test_once_the_time_is_up_what_is_ready_is_timed(run: Run) -> None:
    """A rival that used up all the time costs the others' figures nothing."""
    end = time.monotonic() + 0.2
    rivals = {"ours": lambda x: (time.sleep(0.15), x.sin())[1], "late": torch.sin}
    row = measure.compare(run, case(rivals), end=end)
    assert row["rivals"]["ours"]["us"] > 0 and row["not_run"] == {"late": measure.LATE} and not measure.failed(row)
    row = measure.compare(run, case(rivals), end=0.0)
    assert set(row["rivals"]) == {"ours"}, "a row that has been begun with has ours"


def test_a_time_too_short_for_the_clock_ends_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of an empty replay is subtracted, which may leave nothing."""
    monkeypatch.setattr(timing, "measure", lambda calls, *_: {name: Time((0.0,) * 3, "device") for name in calls})
    row = measure.compare(run, case({"ours": torch.sin, "torch": torch.sin}, moved=128.0))
    assert row["rivals"]["ours"]["us"] == 0 and "of_copy" not in row["rivals"]["ours"] and "faster_than" not in row
    assert gpu.line(row)


def test_inputs_are_rotated_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.ROTATED_BYTES, "cpu", 1000)
    run = Run(torch.device("cpu"), "cpu", {})
    sets = measure._input_sets(run, case({}, make=lambda: (torch.rand(32), torch.zeros(4, dtype=torch.int64))))
    assert len(sets) == 7  # of 160 bytes
    assert len(measure._input_sets(run, case({}, make=lambda: (torch.rand(32),), whole=True))) == 1
    assert len(measure._input_sets(run, case({}, make=lambda: (torch.rand(1000),)))) == 1


def test_calls_go_on_through_the_sets() -> None:
    seen: list[int] = []
    runner = timing._Called([lambda i=i: seen.append(i) for i in range(3)], torch.device("cpu"))
    runner.repeat = 4
    seen.clear()
    runner.at = 1
    runner.sample()
    runner.sample()
    assert seen == [1, 2, 0, 1, 2, 0, 1, 2]


def test_rivals_take_turns() -> None:
    seen: list[str] = []
    rivals = {name: [lambda name=name: (seen.append(name), time.sleep(2e-3))] for name in "ab"}
    timing.measure(rivals, torch.device("cpu"), "wall", seconds=9.0, turns=3)
    assert "".join(seen[-6:]) == "ababab"


def test_peak_memory_of_a_cpu_call() -> None:
    x = torch.rand(1000)
    assert timing.peak_bytes(lambda: (x + 1) * 2, torch.device("cpu")) == pytest.approx(8000, abs=200)


def test_compiled_rivals_are_static_at_every_shape(run: Run) -> None:
    """From a second shape on, torch.compile would make shapes symbolic and reuse another case's code."""
    shapes: list[object] = []

    def backend(graph, inputs):
        shapes.append([i if isinstance(i, torch.SymInt) else tuple(i.shape) for i in inputs])
        return graph.forward

    def compiled(n: int) -> Case:
        rival = peers.compiled(torch.sin, backend=backend)
        return Case(f"{n}", lambda: (torch.rand(n),), {"ours": rival}, against(forward(torch.sin)))

    for n in (8, 9, 10):
        assert not measure.failed(measure.compare(run, compiled(n), timed=False))
    assert shapes == [[(8,)], [(9,)], [(10,)]]


def test_a_token_that_is_not_allowed_is_found() -> None:
    logits = torch.arange(100.0)[None]
    token = torch.tensor([3])
    with pytest.raises(ValueError, match="among the 40 likeliest"):
        bench_sampling.check((logits, None), (token, torch.log_softmax(logits, -1)[:, 3]))


# --- the command for a GPU machine ----------------------------------------------------------------------------------


def test_dry_run(tmp_path: Path) -> None:
    done = child("benchmarks.gpu", "--sizes", "tiny", "--minutes", "4", "--out", str(tmp_path), "--only", "sampl")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = tmp_path.glob("*/*.json")
    stages = results.read(path)["stages"]
    assert list(stages) == ["environment", "ceilings", "sampling"]
    assert stages["sampling"]["ceilings"]["copy"] > 0 and not stages["sampling"]["note"]
    for row in stages["sampling"]["rows"]:
        assert row["rivals"]["ours"]["us"] > 0 and row["rivals"]["ours"]["of_copy"] > 0, row
    assert "missing" in stages["environment"]["rows"][0]
    assert done.stdout.rstrip().endswith("kB)") and " 18 training step" in done.stdout


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_stage_that_hangs_is_ended_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together with the processes it has started."""
    marker = tmp_path / "late"
    hanging = f"""echo 'ROW {{"name": "first"}}'; (sleep 2; touch {marker}) & sleep 30"""
    monkeypatch.setattr(gpu.sys, "executable", script(tmp_path / "python", hanging))
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    rows: list[dict] = []
    note = gpu.run_stage("gemm", gpu.parse([]), 0.8, {}, rows.append)
    assert rows == [{"name": "first"}] and "at its limit" in note
    time.sleep(1.5)
    assert not marker.exists()


def test_slow_rivals_come_once_all_else_is_measured(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its own row, so that one that hangs costs nothing; in the file a case has one row."""
    names = {"a": ["ours", "compiled", "torch", "flex"], "b": ["ours", "flex"], "c": ["ours"]}
    cases = [dataclasses.replace(case(dict.fromkeys(own, torch.sin)), name=name) for name, own in names.items()]
    monkeypatch.setattr(stages.importlib, "import_module", lambda _: types.SimpleNamespace(cases=lambda run: cases))
    found = list(stages.benchmark("any")(run, math.inf))
    seen = [(row["name"], list(row["rivals"])) for row in found]
    assert seen == [
        ("a", ["ours", "torch"]), ("b", ["ours"]), ("c", ["ours"]),
        ("a", ["ours", "compiled"]), ("a", ["ours", "flex"]), ("b", ["ours", "flex"]),
    ]  # fmt: skip
    kept = results.Results(tmp_path, "a device")
    kept.begin("any", "tiny", {}, {})
    first = found[0]["rivals"]["ours"]["us"]
    for row in found:
        kept.add("any", row)
    rows = results.read(kept.path)["stages"]["any"]["rows"]
    assert {row["name"]: set(row["rivals"]) for row in rows} == {name: set(own) for name, own in names.items()}
    assert rows[0]["rivals"]["ours"]["us"] == first and set(rows[0]["faster_than"]) == {"torch", "compiled", "flex"}

    late = list(stages.benchmark("any")(run, 0.0))
    assert [row["not_run"] for row in late] == [
        {name: measure.LATE} for name in ("all", "all", "all", "compiled", "flex", "flex")
    ]
    assert not any(measure.failed(row) for row in late)


def test_a_case_that_breaks_while_it_is_timed_ends_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(calls: dict, *_: object) -> dict:
        if "bad" in calls:
            raise RuntimeError("out of memory")
        return {name: Time((1.0,) * 3, "device") for name in calls}

    names = ("bad", "flex", "good")
    cases = [dataclasses.replace(case({"ours": torch.sin, own: torch.sin}), name=own) for own in names]
    monkeypatch.setattr(stages.importlib, "import_module", lambda _: types.SimpleNamespace(cases=lambda run: cases))
    monkeypatch.setattr(timing, "measure", broken)
    first, *others = stages.benchmark("any")(run, math.inf)
    assert first["not_run"] == {"ours": "RuntimeError: out of memory"} and measure.failed(first)
    assert [(row["name"], list(row["rivals"])) for row in others] == [
        ("flex", ["ours"]), ("good", ["ours", "good"]), ("flex", ["ours", "flex"]),
    ]  # fmt: skip


def test_a_stage_that_dies_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.sys, "executable", script(tmp_path / "python", "echo illegal memory access; exit 3"))
    assert gpu.run_stage("gemm", gpu.parse([]), 5, {}, print) == "exit status 3: illegal memory access"


def test_time_is_shared_out() -> None:
    """What a stage leaves over goes to the next; a limit set by hand takes only that much from the others."""
    everything = list(stages.STAGES)
    shares = sum(share for _, share in stages.STAGES.values())
    assert gpu.limits(everything, 500.0, {}) == pytest.approx(500 * stages.STAGES["environment"][1] / shares)
    assert gpu.limits(["sanitizer"], 77.0, {}) == 77.0
    assert gpu.limits(["tests", "sanitizer"], 100.0, {"tests": 300.0}) == 100.0
    first = gpu.limits(everything, 500.0, {"tests": 200.0})
    assert first == pytest.approx(300 * stages.STAGES["environment"][1] / (shares - stages.STAGES["tests"][1]))
    assert gpu.limits(everything, 100.0, {"tests": 200.0}) == 0.0


def test_what_needs_a_gpu_fails_nothing_without_one(run: Run) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for stage in (stages.host, stages.sanitizer):
        (found,) = stage(run, math.inf)
        assert "GPU" in found["not_run"]["all"] and not measure.failed(found)


def test_stages_are_chosen_by_a_part_of_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.chosen("attention, tests") == [
        "environment",
        "ceilings",
        "fused_attention",
        "attention_backward",
        "tests",
    ]
    for bad in (["--only", "nothing"], ["--limit", "tests"], ["--limit", "nothing=3"], ["--minutes", "0"]):
        with pytest.raises(SystemExit) as caught:
            gpu.parse(bad)
        assert caught.value.code == 2
    assert "--only must name stages" in capsys.readouterr().err


def test_a_failing_test_file_is_a_failing_row(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n")
    end = time.monotonic() + 60
    row = stages._pytest("it", [sys.executable], [str(file), "-c", os.devnull], {}, end)
    assert (row["passed"], row["failed"]) == (1, 1) and "test_wrong" in row["failures"][0] and measure.failed(row)
    assert stages._pytest("it", [sys.executable], [str(file)], {}, 0.0)["not_run"]


def test_a_test_file_that_is_ended_says_how_far_it_came(tmp_path: Path) -> None:
    said = """tests/test_it.py::test_right[a b] PASSED [ 25%]
tests/test_it.py::test_wrong FAILED [ 50%]
tests/test_it.py::test_elsewhere SKIPPED (no GPU) [ 75%]
tests/test_it.py::test_endless """
    slow = script(tmp_path / "python", f"cat <<'END'\n{said}\nEND\nexec sleep 30")
    row = stages._pytest("it", [slow], [], {}, time.monotonic() + 0.5)
    assert (row["passed"], row["failed"], row["skipped"]) == (1, 1, 1) and measure.failed(row)
    assert row["failures"] == ["FAILED tests/test_it.py::test_wrong"]


def test_generation_on_another_machine_is_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file's versions and CPU are those of all its batches."""
    from benchmarks import bench_cpu_generation

    path = tmp_path / "there.json"
    path.write_text('{"cpu": "another", "tokens_per_second": {"1": {}}}')
    monkeypatch.setattr(bench_cpu_generation, "measure", lambda *_: pytest.fail("it must refuse before it measures"))
    monkeypatch.setattr(sys, "argv", ["bench_cpu_generation", "--batch", "16", "--out", str(path)])
    with pytest.raises(SystemExit):
        bench_cpu_generation.main()
    assert "--out must be a file measured alike, got another cpu" in capsys.readouterr().err
    assert '"another"' in path.read_text()


def test_every_module_has_a_stage() -> None:
    assert {module.removeprefix("bench_") for module in MODULES} <= set(stages.STAGES)


def test_the_sanitizer_meets_every_kernel() -> None:
    """Each test that it names exists, and each file with a kernel has one; a private file, that of its operator."""
    operator = {"_paged_decode.py": "paged.py", "_linear_decode.py": "gemm.py"}
    files = {test.partition("::")[0] for test in stages.SANITIZED}
    for test in stages.SANITIZED:
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), test
    for path in (ROOT / "kernels" / "gpt2_kernels").glob("*.py"):
        if "_kernel(" in path.read_text():
            assert f"test_{operator.get(path.name, path.name)}" in files, path.name


def test_a_candidate_takes_the_place_of_the_row_that_would_serve() -> None:
    before = dict(fused_attention.TILES)
    with tune.row_instead(fused_attention.TILES, (16, 16, 4, 1)):
        q = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
        assert _check.tile_for(fused_attention.TILES, q) == (16, 16, 4, 1)
        assert _check.tile_for(fused_attention.TILES, q.float()) == before[0, 4, 64]
    assert fused_attention.TILES == before


# --- pytest benchmarks/ ---------------------------------------------------------------------------------------------

MODULE = """
import torch
from benchmarks.measure import Absent, Case, against, forward

def absent(x):
    raise Absent("its package is not installed")

def cases(run):
    rivals = {"ours": torch.sin, "wrong": torch.cos, "absent": absent}
    yield Case("sine", lambda: (torch.rand(1 << 16, device=run.device),), {n: forward(f) for n, f in rivals.items()},
               against(forward(torch.sin)), moved=float(1 << 19))

def test_speed(measured):
    assert measured.right, measured.why
"""


def test_pytest_measures_fails_and_skips(tmp_path: Path) -> None:
    """pytest-benchmark reports what was measured, not what its own rounds took."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "bench_sine.py").write_text(MODULE)
    saved = tmp_path / "saved.json"
    done = child(
        "pytest", "-p", "benchmarks.conftest", "-c", str(ROOT / "pyproject.toml"), str(tmp_path / "bench_sine.py"),
        "--sizes", "tiny", "--benchmark-json", str(saved), "--out", str(tmp_path / "out"), "-p", "no:cacheprovider",
    )  # fmt: skip
    assert "1 failed, 1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "its package is not installed" in done.stdout and "of the largest value" in done.stdout
    (kept,) = (tmp_path / "out").glob("*/*.json")
    (row,) = results.read(kept)["stages"]["sine"]["rows"]
    (entry,) = json.loads(saved.read_text())["benchmarks"]
    assert entry["group"] == "sine" and entry["name"] == "test_speed[sine-ours]"
    assert entry["stats"]["median"] * 1e6 == pytest.approx(row["rivals"]["ours"]["us"])
    assert entry["extra_info"]["of_copy"] == row["rivals"]["ours"]["of_copy"]


# --- goals ----------------------------------------------------------------------------------------------------------


def row(name: str, **figures: float) -> measure.Row:
    return {"name": name, "rivals": {"ours": figures}}


@pytest.mark.parametrize(
    "values, at_most, expected",
    [
        ([], False, "missing"), ([0.99], False, "goal"), ([0.85], False, "gate"), ([0.7], False, "missed"),
        ([0.99, 0.85], False, "gate"), ([0.99, None], False, "missing"), ([0.99], True, "missed"),
        ([0.5], True, "goal"),
    ],
)  # fmt: skip
def test_the_worst_row_decides(values: list, at_most: bool, expected: str) -> None:
    levels = (0.9, 0.6) if at_most else (0.8, 0.95)
    gate = gates.Gate(1, "x", "paged ", gates.ours("of_copy"), "of copy", *levels, at_most=at_most)
    rows = [row(f"paged {i}", **({} if v is None else {"of_copy": v})) for i, v in enumerate(values)]
    assert gate.judge([*rows, row("other", of_copy=0.1)])[1] == expected


# --- the page -------------------------------------------------------------------------------------------------------


def saved(folder: Path, device: str, date: str, stages: dict[str, list], sizes: str = "gpu") -> None:
    kept = results.Results(folder, device, date)
    for stage, rows in stages.items():
        environment = results.environment(torch.device("cpu")) | {
            "time": f"{date} 10:00",
            "commit": "abc1234",
            "load": 7.5,
        }
        kept.begin(stage, sizes, environment, {"copy": 4e12, "matmul": 8e14})
        for each in rows:
            kept.add(stage, each)


def attention(T: int, us: float) -> measure.Row:
    ours = {"us": us, "us_low": us, "us_high": us, "tflops": 400.0, "of_matmul": 0.5, "gb_s": 1.0, "of_copy": 0.1}
    return {
        "name": f"attention forward B=16 T={T} H=12 D=64 bfloat16", "flops": 4e9, "moved": 1e7,
        "rivals": {"ours": ours, "cudnn": {**ours, "us": 1.3 * us}}, "not_run": {"flex": "no luck"},
        "wrong": {"flash": "error 3"}, "faster_than": {"cudnn": 1.3},
    }  # fmt: skip


def test_the_report_shows_what_there_is_and_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = {"us": 5.0, "us_low": 5.0, "us_high": 5.0, "per_second": 1234.0, "of_copy": 0.7}
    decode = {"name": "decode gpt2 batch=8 context=5..9", "unit": "tokens", "rivals": {"ours": figures}}
    files = [{"name": "test_x.py", "passed": 3, "failed": 1, "failures": ["FAILED tests/test_x.py::test_y"]}]
    folder = tmp_path / "results"
    saved(folder, "NVIDIA H200", "2026-01-01", {"fused_attention": [attention(1024, 111.0)], "engine": [decode]})
    saved(folder, "NVIDIA H200", "2026-01-02", {"fused_attention": [attention(1024, 222.0)], "tests": files})
    saved(folder, "a laptop", "2026-01-02", {"engine": [decode]}, sizes="cpu")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- made by python -m benchmarks.report -->\nold\n<!-- end -->\nafter\n")
    out = tmp_path / "RESULTS.md"
    report.write(folder, out, readme)
    text = out.read_text()
    assert "222 (222-222)" in text and "111" not in text, "the newest measurement of a stage counts"
    assert "1,234 tokens/s" in text, "an older day's stage is still shown"
    assert "| 1 | attention forward, T=1024 | 1.3 x SDPA cuDNN | >= 1 | >= 1.25 | goal |" in text
    assert "| 14 | decode, batch 8..64, 124M | 0.7 of copy | >= 0.6 | >= 0.8 | gate |" in text
    assert "| 18 | training step, 124M (x compiled) | missing | >= 1 | >= 1.3 | missing |" in text
    assert "commit abc1234" in text and "7.5 processes were waiting" in text
    assert "flex: not run (no luck)" in text and "flash: WRONG" in text and "test_x.py::test_y" in text
    assert text.index("## NVIDIA H200") < text.index("## a laptop")
    for plot in ("roofline", "attention", "tokens"):
        assert (folder / "nvidia-h200" / f"{plot}.svg").stat().st_size > 1000 and f"nvidia-h200/{plot}.svg" in text
    assert not (folder / "a-laptop" / "attention.svg").exists()
    page = readme.read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "NVIDIA H200" in page and "222" in page
    again = out.read_text(), (folder / "nvidia-h200" / "tokens.svg").read_bytes()
    report.write(folder, out, readme)
    assert (
        again == (out.read_text(), (folder / "nvidia-h200" / "tokens.svg").read_bytes()) and page == readme.read_text()
    )


def test_the_report_without_a_gpu_says_so(tmp_path: Path) -> None:
    text = report.page({}, {})
    assert "No GPU has been measured" in text and text.count("| missing |") == 2 * len(gates.GATES)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "2026-01-01.json").write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match="must be a file that pytest benchmarks/ or benchmarks.gpu wrote"):
        results.read(tmp_path / "device" / "2026-01-01.json")
