"""`gpt2 batch`: nothing is lost and nothing is done twice, whatever stops it and whatever is in the input."""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_checkpoint, tiny_config
from conftest import ROOT

from gpt2 import GPT2, Engine, SamplingParams, batch, cli, commands, load_tokenizer
from gpt2.batch_files import CHUNK, MAX_LINE, Journal, read_lines

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, locks and limits of POSIX")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_checkpoint(tmp_path_factory.mktemp("model"), tiny_config(), tokenizer=True))


@pytest.fixture(autouse=True)
def _production(production: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine's production path; each model is loaded once for all runs of a test."""
    loaded: dict[tuple, Any] = {}

    def load(options: Any) -> Any:
        key = (options.model, options.device, options.dtype)
        if key not in loaded:
            loaded[key] = commands.load(options)
        return loaded[key]

    monkeypatch.setattr(batch, "load", load)
    yield


class Runner:
    """Runs the command in this process, always with the same model."""

    def __init__(self, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.tmp_path, self.capsys = folder, tmp_path, capsys
        self.source, self.out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        self.errors, self.manifest = tmp_path / "out.errors.jsonl", tmp_path / "out.manifest.json"

    def write(self, *lines: Any) -> None:
        """Writes the input file; what is not a string is written as JSON."""
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        self.source.write_text(text, encoding="utf-8")

    def __call__(self, *options: str, status: int = 0) -> str:
        """The command's stderr; its status must be `status`, and its stdout empty."""
        arguments = ["batch", str(self.source), "-o", str(self.out), "--model", self.folder, *options]
        if "--seed" not in options:
            arguments += ["--seed", "5"]
        if "--dtype" not in options:
            arguments += ["--dtype", "float32"]  # the default depends on the CPU
        return self.plain(*arguments, status=status)

    def plain(self, *arguments: str, status: int = 0) -> str:
        code = 0
        try:
            cli.main(arguments)
        except SystemExit as e:
            code = int(e.code or 0)
        captured = self.capsys.readouterr()
        assert (code, captured.out) == (status, ""), captured.err
        return captured.err

    def results(self) -> dict[Any, list[dict[str, Any]]]:
        records = [json.loads(line) for line in self.out.read_bytes().split(b"\n")[:-1]]
        assert all(set(record) == {"id", "prompt_tokens", "outputs"} for record in records)
        found = {record["id"]: record["outputs"] for record in records}
        assert len(found) == len(records)
        return found

    def failures(self) -> dict[int, str]:
        if not self.errors.exists():
            return {}
        records = [json.loads(line) for line in self.errors.read_bytes().split(b"\n")[:-1]]
        found = {record["line"]: record["error"] for record in records}
        assert len(found) == len(records)
        return found

    def content(self) -> tuple[list[bytes], list[bytes]]:
        """All that a job writes, sorted: equal for equal jobs, however often they were stopped."""
        files = [self.out, self.errors]
        return tuple(sorted(f.read_bytes().splitlines(True)) if f.exists() else [] for f in files)  # type: ignore

    def forget(self) -> None:
        for path in (self.out, self.errors, self.manifest):
            path.unlink(missing_ok=True)

    def engine(self) -> Engine:
        return Engine(GPT2.from_pretrained(self.folder, dtype=torch.float32), load_tokenizer(self.folder), num_blocks=8)


@pytest.fixture
def run(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(folder, tmp_path, capsys)


def plain_lines(count: int, **values: Any) -> list[dict[str, Any]]:
    return [{"id": f"line {i}", "prompt": f"story {i}", "max_tokens": 1 + i % 7, **values} for i in range(count)]


# -- what it writes


def test_results_are_the_engine_s(run: Runner) -> None:
    """Texts and token ids as prompts, an empty one, and parameters of lines that override options."""
    run.write(
        {"id": "text", "prompt": "a story", "seed": 7, "max_tokens": 9, "n": 2, "logprobs": 2},
        {"id": 12, "prompt": [5, 6, 7], "seed": 8, "temperature": 0.5, "top_k": 7, "stop": "zz", "ignore_eos": False},
        {"prompt": "", "seed": 9, "top_p": 1, "stop": [], "stop_token_ids": [3, 4]},
    )
    options = "--max-tokens 5 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.2 --ignore-eos --stop q --stop x".split()
    said = run(*options, "--max-batch", "2")
    assert "100%" in said and "tokens/s" in said and "3/3" in said
    given = {"min_p": 0.01, "repetition_penalty": 1.2}
    expected = run.engine().generate(
        ["a story", [5, 6, 7], ""],
        [
            SamplingParams(max_tokens=9, n=2, logprobs=2, seed=7, top_p=0.9, stop=("q", "x"), ignore_eos=True, **given),
            SamplingParams(max_tokens=5, temperature=0.5, top_k=7, seed=8, top_p=0.9, stop="zz", **given),
            SamplingParams(max_tokens=5, seed=9, stop_token_ids=[3, 4], ignore_eos=True, **given),
        ],
    )
    records = {record["id"]: record for record in map(json.loads, run.out.read_text().splitlines())}
    assert set(records) == {"text", 12, 3}
    for name, completion in zip(("text", 12, 3), expected):
        assert records[name]["prompt_tokens"] == completion.prompt_tokens
        for found, output in zip(records[name]["outputs"], completion.outputs, strict=True):
            assert (found["text"], found["tokens"]) == (output.text, output.tokens)
            assert found["finish_reason"] == output.finish_reason
            assert ("logprobs" in found) == (name == "text") == (output.logprobs is not None)
            for place, truth in zip(found.get("logprobs", ()), output.logprobs or (), strict=True):
                assert place == {"token": truth.token, "logprob": truth.logprob, "top": [list(t) for t in truth.top]}
    assert not run.errors.exists()


def test_a_line_without_a_seed_has_one_of_its_own(run: Runner) -> None:
    """It depends on the manifest's seed and the line's number, not on ids or the rest of the file."""
    same = {"prompt": "a", "max_tokens": 12, "ignore_eos": True}
    run.write(same, {**same, "seed": None}, {**same, "id": "x"})
    run()
    first = run.results()
    assert len({json.dumps(outputs) for outputs in first.values()}) == 3
    run.forget()
    run.write({**same, "max_tokens": 3}, "", {**same, "id": "y"})
    run("--max-batch", "1")
    assert run.results()["y"] == first["x"]
    run.forget()
    run("--seed", "6")
    assert run.results()["y"] != first["x"]


def test_a_seed_that_was_drawn_is_kept(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write(*plain_lines(2))
    arguments = ["batch", str(run.source), "-o", str(run.out), "--model", run.folder]
    run.plain(*arguments)
    first, seed = run.content(), json.loads(run.manifest.read_text())["seed"]
    run.out.write_bytes(run.out.read_bytes().splitlines(True)[0])
    run.plain(*arguments)
    assert run.content() == first and json.loads(run.manifest.read_text())["seed"] == seed
    run.forget()
    run.plain(*arguments)
    assert json.loads(run.manifest.read_text())["seed"] != seed


def test_the_manifest(run: Runner) -> None:
    import hashlib

    run.write(*plain_lines(3))
    run("--max-tokens", "6", "--stop", "x")
    manifest = json.loads(run.manifest.read_text())
    assert manifest["input_sha256"] == hashlib.sha256(run.source.read_bytes()).hexdigest()
    assert manifest["parameters"]["max_tokens"] == 6 and manifest["parameters"]["stop"] == ["x"]
    assert manifest["seed"] == 5 and manifest["versions"]["torch"] == torch.__version__
    assert manifest["model"] == run.folder and len(manifest["model_sha256"]) == 64 and manifest["dtype"] == "float32"


def test_a_profile_of_a_job(run: Runner) -> None:
    run.write(*plain_lines(2))
    run("--profile", str(run.tmp_path / "trace.json"))
    assert "gpt2_kernels::sample" in (run.tmp_path / "trace.json").read_text() and len(run.results()) == 2


def test_nothing_to_do(run: Runner) -> None:
    run.write()
    run()
    assert run.out.read_bytes() == b"" and not run.errors.exists()
    run()


# -- what can be wrong with the input

BAD = [
    ("nonsense", "not valid JSON"),
    ('{"prompt": "x"', "not valid JSON"),
    ('"x"', "a line must be a JSON object, got str"),
    ("[" * 100_000, "not valid JSON (nested too deeply)"),
    ({}, "prompt is missing"),
    ({"prompt": None}, "prompt must be text or a list of token ids, got NoneType"),
    ({"prompt": {}}, "prompt must be text or a list of token ids, got dict"),
    ({"prompt": ["x"]}, "token ids must be integers in 0..287, got 'x'"),
    ({"prompt": [1, 288]}, "token ids must be integers in 0..287, got 288"),
    ({"prompt": [-1]}, "token ids must be integers in 0..287, got -1"),
    ({"prompt": [10**30]}, "token ids must be integers"),
    ({"prompt": [1.0]}, "token ids must be integers"),
    ({"prompt": [True]}, "token ids must be integers"),
    ({"prompt": "\udcff"}, "lone surrogate"),
    ({"prompt": [1] * 65}, "a prompt must be at most 64 tokens, got 65"),
    ({"prompt": [1] * 60}, "prompt and max_tokens must fit in 64 positions, got 60 + 5"),
    ({"prompt": "x", "topp": 1}, "unknown parameter 'topp'"),
    ({"prompt": "x", "top_p": 0}, "top_p must be a number in (0, 1], got 0"),
    ({"prompt": "x", "top_p": "1"}, "top_p must be a number in (0, 1], got '1'"),
    ('{"prompt": "x", "temperature": NaN}', "temperature must be a number in 0..1e30, got nan"),
    ({"prompt": "x", "temperature": 10**400}, "temperature must be a number in 0..1e30, got 10000"),
    ({"prompt": "x", "top_p": -(10**400)}, "top_p must be a number in (0, 1], got -10000"),
    ({"prompt": "x", "stop": [str(i) for i in range(17)]}, "stop must be at most 16 strings"),
    ({"prompt": "x", "stop": None}, "stop must be a list or tuple, got None"),
    ({"prompt": "x", "stop_token_ids": [288]}, "stop_token_ids must be below 288, got 288"),
    ({"prompt": "x", "n": 0}, "n must be an integer in 1..4096, got 0"),
    ({"prompt": "x", "max_tokens": 2.0}, "max_tokens must be an integer of at least 1, got 2.0"),
    ({"prompt": "x", "seed": -1}, "seed must be None or an integer"),
    ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", "integer string conversion"),
    ({"prompt": "x", "logprobs": 289}, "logprobs must be at most 288"),
    ({"id": 1.5, "prompt": "x"}, "id must be a string or an integer, got float"),
    ({"id": True, "prompt": "x"}, "id must be a string or an integer, got bool"),
    ({"id": "first", "prompt": "x"}, "id 'first' is that of an earlier line"),
    ({"id": "x" * MAX_LINE, "prompt": "x"}, f"a line must be at most {MAX_LINE} bytes"),
]


def test_bad_lines_are_reported_and_the_rest_goes_on(run: Runner) -> None:
    """Each once, with its line number, among lines that are answered; a second run adds nothing."""
    lines: list[Any] = [{"id": "first", "prompt": "x"}]
    for bad, _ in BAD:
        lines += [bad, {"prompt": "x"}]
    run.write(*lines)
    said = run("--max-tokens", "5", "--max-batch", "3")
    assert f"{len(BAD)} bad lines, listed in {run.errors}" in said
    failures = run.failures()
    assert list(failures) == list(range(2, 2 * len(BAD) + 1, 2))
    for (_, message), found in zip(BAD, failures.values()):
        assert message in found and "\n" not in found and len(found) < 400
    assert set(run.results()) == {"first", *range(3, 2 * len(BAD) + 2, 2)}
    before = run.content()
    run("--max-tokens", "5")
    assert run.content() == before


def test_an_id_belongs_to_the_first_line_that_has_it(run: Runner) -> None:
    run.write(
        {"id": "1", "prompt": "a", "max_tokens": 1},
        {"id": 4, "prompt": "b", "max_tokens": 2, "top_p": 0},  # bad, and yet the id is taken
        {"id": 1, "prompt": "c", "max_tokens": 3},  # not "1"
        {"prompt": "d", "max_tokens": 4},  # its number is line 2's id
        {"id": "1", "prompt": "e", "max_tokens": 5},
        {"id": "\ud800", "prompt": "f", "max_tokens": 6},  # not a character, yet a valid JSON string
    )
    run("--ignore-eos")
    assert {name: len(outputs[0]["tokens"]) for name, outputs in run.results().items()} == {"1": 1, 1: 3, "\ud800": 6}
    failures = run.failures()
    assert "top_p" in failures[2] and failures[4] == "id 4 is that of an earlier line" and len(failures) == 3
    assert failures[5] == "id '1' is that of an earlier line"
    first = run.content()
    run.errors.unlink()  # found again, though lines with the same ids now have results
    run("--ignore-eos")
    assert run.content() == first


def test_the_form_of_the_input(run: Runner) -> None:
    """A byte-order mark, CRLF, blank lines, invalid UTF-8, characters that Python's splitlines splits at, no newline at
    the end."""
    odd = "a\u2028b\x85c\x0bd"
    line = json.dumps({"id": odd, "prompt": odd, "max_tokens": 1}, ensure_ascii=False).replace("\x0b", "\\u000b")
    run.source.write_bytes(
        b'\xef\xbb\xbf{"prompt": "x", "max_tokens": 1}\r\n\r\n  \n{"prompt": "\xff"}\n'
        + line.encode()
        + b'\n{"prompt": "B\xc3\xa4r", "max_tokens": 1}'
    )
    run()
    assert set(run.results()) == {1, odd, 6}
    assert run.failures() == {4: "not valid UTF-8 (byte 13 of the line)"}
    assert len(run.out.read_text(encoding="utf-8").splitlines()) == 3
    records = [json.loads(text) for text in run.out.read_text().splitlines()]
    assert bytes(next(r["prompt_tokens"] for r in records if r["id"] == 6)) == "Bär".encode()  # a token is a byte here


def test_a_line_of_any_length_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "long"
    exact = b"x" * MAX_LINE
    with open(path, "wb") as file:
        for _ in range(64):
            file.write(exact)
        file.write(b"\nshort\n" + exact + b"\r\n" + exact + b"y\n" + exact)
    tracemalloc.start()
    try:
        with open(path, "rb") as file:
            lengths = [len(line) for line in read_lines(file)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lengths == [MAX_LINE + 1, 5, MAX_LINE, MAX_LINE + 1, MAX_LINE]
    assert peak < 8 * MAX_LINE  # of 68 in the file


@pytest.mark.parametrize(("samples", "most"), [(1, 8), (6, 2)])
def test_reading_runs_ahead_by_a_bounded_queue(
    run: Runner, monkeypatch: pytest.MonkeyPatch, samples: int, most: int
) -> None:
    """Lines are read as results are written: never more than twice --max-batch samples ahead (plus the one request that
    crosses the bound), and never so few that the engine has free slots."""
    read = 0

    def counted(file: Any) -> Iterator[bytes]:
        nonlocal read
        for line in read_lines(file):
            read += 1
            yield line

    ahead: list[int] = []
    step = Engine.step

    def watched(engine: Engine) -> Any:
        ahead.append(read - run.out.read_bytes().count(b"\n"))
        assert engine.unfinished == ahead[-1]
        return step(engine)

    monkeypatch.setattr(batch, "read_lines", counted)
    monkeypatch.setattr(Engine, "step", watched)
    run.write(*plain_lines(40, n=samples))
    run("--max-batch", "4")
    assert len(run.results()) == 40 and max(ahead) == most
    full = [a for a in ahead if a == most]
    assert len(full) > len(ahead) // 2


def test_what_is_remembered_of_a_line_is_small(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """About a hundred bytes, however long its id; here for lines that a first run has answered."""
    count = 20_000
    run.write(*({"id": f"{i:0100d}", "prompt": "x"} for i in range(count)))
    with Journal(run.out) as journal, Journal(run.errors) as errors:
        for i in range(count):
            journal._file.write(json.dumps({"id": f"{i:0100d}"}).encode() + b"\n")  # type: ignore[union-attr]
        tracemalloc.start()
        try:
            job = batch.Job(run.source, journal, errors, 5)
            assert next(job._items(SamplingParams(), batch._progress(count)), None) is None
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 300 * count


# -- stopped and started again


def test_a_torn_last_line_at_every_byte(run: Runner) -> None:
    """In the results and in the errors: the next run repairs it and ends as if nothing had happened."""
    run.write(*plain_lines(3), "nonsense", {"id": "bad", "prompt": "x", "n": 0})
    run()
    whole = run.content()
    for path in (run.out, run.errors):
        complete = path.read_bytes()
        last = len(complete) - len(complete.splitlines(True)[-1])
        for size in range(last, len(complete)):
            os.truncate(path, size)
            run()
            assert run.content() == whole, (path, size)


def test_a_torn_line_that_is_long(tmp_path: Path) -> None:
    """Longer than the pieces in which its start is searched for, whose boundaries fall anywhere around the newline."""
    for torn in (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK):
        for whole in (b"", b'{"id": 1}\n'):
            path = tmp_path / f"{torn} {len(whole)}"
            path.write_bytes(whole + b"x" * torn)
            with Journal(path) as journal:
                assert path.stat().st_size == len(whole) + torn  # nothing is changed unless asked
                journal.repair()
                assert path.read_bytes() == whole
                journal.append({"id": 2})
                assert list(journal.values("id")) == ([1, 2] if whole else [2])


@functools.cache
def _environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**clean, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


STOPPED = """
import os, signal, sys, threading, time
path, size, delay, number = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
def stop():  # from within, so that the moment does not depend on how busy the machine is
    while not os.path.exists(path) or os.path.getsize(path) <= size:
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(os.getpid(), number)
threading.Thread(target=stop, daemon=True).start()
from gpt2.cli import main
main(sys.argv[5:])
"""


def process(run: Runner, *options: str, stopped: tuple[Any, ...] = (), **streams: Any) -> subprocess.Popen[bytes]:
    """The command in its own process; stopped: (output size to exceed, then seconds to wait, then the signal)."""
    arguments = ["batch", str(run.source), "-o", str(run.out), "--model", run.folder, "--seed", "5"]
    arguments += ["--dtype", "float32", *options]
    start = ["-c", STOPPED, str(run.out), *map(str, stopped)] if stopped else ["-m", "gpt2"]
    return subprocess.Popen(
        [sys.executable, *start, *arguments], env=_environment(), stdout=subprocess.DEVNULL, **streams
    )


def test_killed_at_random_moments(run: Runner) -> None:
    """SIGKILL twice and Ctrl-C once, each while another part is being written; then one run to the end."""
    lines: list[Any] = plain_lines(400, n=2)
    lines[10::20] = ["nonsense"] * len(lines[10::20])
    run.write(*lines)
    run("--max-batch", "8")
    whole, size = run.content(), run.out.stat().st_size
    run.forget()
    seed = random.SystemRandom().getrandbits(32)
    generator = random.Random(seed)
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT):
        begun = run.out.stat().st_size if run.out.exists() else 0
        share = generator.uniform(0, 0.4)  # of what is left, so that each run writes something before it is stopped
        moment = (begun + share * (size - begun), generator.uniform(0, 0.005), int(number))
        child = process(run, "--max-batch", "8", stopped=moment, stderr=subprocess.PIPE)
        said = child.communicate()[1].decode()
        assert child.returncode == (130 if number == signal.SIGINT else -number), (seed, share, said)
        if number == signal.SIGINT:
            assert "Traceback" not in said and said.endswith("the same command goes on from there\n"), (seed, said)
            assert run.out.read_bytes().endswith(b"\n")
    done = run.out.read_bytes().count(b"\n")
    assert done < len(lines) - 20, f"seed {seed}: nothing was left to do"
    run("--max-batch", "5")
    assert run.content() == whole, f"seed {seed}"


def test_killed_before_anything_is_written(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the creation of the output and of the manifest: an empty output, and perhaps half a draft."""
    run.write(*plain_lines(2))
    run()
    whole = run.content()
    run.forget()
    run.out.touch()
    Path(f"{run.manifest}.tmp").write_text('{"input"')
    run()
    assert run.content() == whole and not Path(f"{run.manifest}.tmp").exists()


def test_the_output_without_the_rest(run: Runner) -> None:
    """If the output was removed but the manifest kept, everything is done again, with the same seed."""
    run.write(*plain_lines(3), "nonsense")
    run("--seed", "77")
    whole = run.content()
    run.out.unlink()
    run("--seed", "77")
    assert run.content() == whole


def test_another_job_does_not_go_on(run: Runner, tmp_path: Path) -> None:
    """The difference is named, and nothing on disk is touched, not even torn lines."""
    run.write(*plain_lines(3), "nonsense")
    run()
    os.truncate(run.out, run.out.stat().st_size - 3)
    files = (run.out, run.errors, run.manifest)
    before = [path.read_bytes() for path in files]
    other = random_checkpoint(tmp_path / "other", tiny_config(), seed=1, tokenizer=True)
    for options, named in [
        (["--seed", "6"], "seed was 5 and is 6"),
        (["--temperature", "0.5"], "parameters.temperature was 1.0 and is 0.5"),
        (["--stop", "x"], "parameters.stop was [] and is ['x']"),
        (["--model", str(other)], "model_sha256 was"),
        (["--dtype", "bfloat16"], "dtype was 'float32' and is 'bfloat16'"),
    ]:
        said = run(*options, status=2)
        assert named in said and said.count("\n") == 1 and str(run.manifest) in said
        assert [path.read_bytes() for path in files] == before
    source = run.source.read_bytes()
    run.source.write_bytes(source.replace(b"story 1", b"story 9"))
    assert "input_sha256 was" in run(status=2)
    assert [path.read_bytes() for path in files] == before
    manifest = json.loads(before[2])
    run.source.write_bytes(source)
    run.manifest.write_text(json.dumps({**manifest, "versions": {**manifest["versions"], "torch": "1.0"}}))
    assert f"versions.torch was '1.0' and is '{torch.__version__}'" in run(status=2)
    run.manifest.write_text(json.dumps({**manifest, "input": "elsewhere", "model": "renamed"}))
    run()  # file names alone do not matter
    assert len(run.results()) == 3


def test_a_changed_tokenizer_is_another_model(run: Runner, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    run.write(*plain_lines(1))
    run("--model", str(copy))
    ranks = (copy / "tokenizer.tiktoken").read_text().splitlines(True)
    a, b = (line.split() for line in ranks[260:262])
    ranks[260:262] = [f"{b[0]} {a[1]}\n", f"{a[0]} {b[1]}\n"]
    (copy / "tokenizer.tiktoken").write_text("".join(ranks))
    assert "model_sha256 was" in run("--model", str(copy), status=2)


@pytest.mark.parametrize("name", ["out.jsonl", "out.errors.jsonl"])
def test_files_of_others_are_left_alone(run: Runner, name: str) -> None:
    """Without a manifest nothing shows that we wrote them, with or without a newline at the end."""
    run.write(*plain_lines(1))
    stranger = run.tmp_path / name
    for content in (b"precious", b'{"id": 1}\n'):
        stranger.write_bytes(content)
        said = run(status=2)
        assert said.startswith(f"gpt2 batch: {stranger} is there, and no out.manifest.json") and said.count("\n") == 1
        assert stranger.read_bytes() == content and not run.manifest.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"seed": "x"}', "\x00", "[" * 100_000], ids=lambda c: c[:15])
def test_a_manifest_that_is_none(run: Runner, content: str) -> None:
    run.write(*plain_lines(1))
    run.manifest.write_text(content)
    assert "is not a manifest that this command wrote" in run(status=2)


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"no": 1}', "", "[" * 100_000], ids=lambda line: line[:15])
def test_an_edited_output_is_named(run: Runner, line: str) -> None:
    run.write(*plain_lines(2))
    run()
    run.out.write_text(line + "\n" + run.out.read_text())
    before = run.out.read_bytes()
    said = run(status=2)
    assert f"{run.out}: line 1 is not a record that this command wrote" in said and run.out.read_bytes() == before


def test_two_runs_at_a_time(run: Runner) -> None:
    run.write(*plain_lines(2))
    with Journal(run.out):
        assert f"{run.out}: another run is writing to it" in run(status=2)
        assert run.out.read_bytes() == b"" and not run.manifest.exists()
    run()
    assert len(run.results()) == 2


# -- what can fail


def test_an_error_inside_a_step(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write(*plain_lines(20))
    run()
    whole = run.content()
    run.forget()
    step, calls = Engine.step, 0

    def failing(engine: Engine) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise RuntimeError("out of\nmemory")
        return step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", failing)
        said = run("--max-batch", "4", status=2)
    assert said.endswith(
        f"gpt2 batch: the engine failed (RuntimeError: out of memory); {run.out} holds what was finished\n"
    )
    assert 0 < len(run.results()) < 20 and run.out.read_bytes().endswith(b"\n")
    run()
    assert run.content() == whole


@pytest.mark.parametrize("which", ["results", "errors", "manifest"])
def test_a_full_disk(run: Runner, which: str) -> None:
    """Simulated by a file size limit, which a write crosses in the middle of a record."""
    bad = [{"id": i, "prompt": "x", "n": 0} for i in range(10)]
    run.write(*(plain_lines(20) + bad if which != "errors" else bad))
    run()
    whole = run.content()
    manifest = run.manifest.stat().st_size
    limit = {"results": manifest + 50, "errors": 333, "manifest": manifest - 10}[which]
    if which == "errors":
        run.out.unlink(), run.errors.unlink()
    else:
        run.forget()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        said = run(status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "File too large" in said and "Traceback" not in said
    for path in (run.out, run.errors):
        if path.exists():
            assert path.stat().st_size <= limit and path.read_bytes()[-1:] in (b"", b"\n")
    assert which != "results" or run.results()
    assert which != "errors" or (str(run.errors) in said and run.failures())
    run()
    assert run.content() == whole


def test_a_device_that_is_full() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    journal = Journal(Path("/dev/full"))
    with pytest.raises(OSError, match=r"^/dev/full: No space left on device; what was written before is whole$"):
        journal.append({"id": 1})


def test_a_listener_that_leaves(run: Runner) -> None:
    """`gpt2 batch .. 2>&1 | head`, and stderr closed from the start: the job is done all the same."""
    run.write(*plain_lines(30), "nonsense")
    run()
    whole = run.content()
    run.forget()
    read, write = os.pipe()
    os.close(read)
    child = process(run, stderr=write)
    os.close(write)
    assert child.wait() == 0 and run.content() == whole
    run.forget()
    child = process(run, preexec_fn=lambda: os.close(2))
    assert child.wait() == 0 and run.content() == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.jsonl", "-o", "-"], "--output must be a file, which a run that was stopped can go on with, got '-'"),
        (["in.jsonl", "-o", ""], "--output must be a file"),
        (["in.jsonl", "-o", "."], "--output must be a file"),
        (["in.jsonl", "-o", "/dev/full"], "--output must be a file"),
        (["in.jsonl", "-o", "fifo"], "--output must be a file"),
        (["in.jsonl", "-o", "nowhere/out.jsonl"], "--output must lie in a folder that exists"),
        (["in.jsonl", "-o", "in.jsonl"], "--output 'in.jsonl' would write to the input, 'in.jsonl'"),
        (["link.jsonl", "-o", "in.jsonl"], "would write to the input"),
        (["x.errors.jsonl", "-o", "x.jsonl"], "would write to the input"),
        (["x.errors.jsonl", "-o", "x"], "would write to the input"),
        (["-", "-o", "out.jsonl"], "the input must be a file, since it is read twice, got '-'"),
        (["fifo", "-o", "out.jsonl"], "the input must be a file"),
        ([".", "-o", "out.jsonl"], "the input must be a file"),
        (["nothing.jsonl", "-o", "out.jsonl"], "No such file or directory: 'nothing.jsonl'"),
        (["in.jsonl", "-o", "out.jsonl", "--max-batch", "0"], "--max-batch must be at least 1, got 0"),
        (["in.jsonl", "-o", "out.jsonl", "--top-p", "0"], "top_p must be a number in (0, 1], got 0.0"),
        (["in.jsonl", "-o", "out.jsonl", *["--stop", "x"] * 17], "stop must be at most 16 strings"),
        (["in.jsonl", "-o", "out.jsonl", "--seed", "-1"], "seed must be None or an integer in 0..2^63 - 1, got -1"),
        (["in.jsonl", "-o", "out.jsonl", "--model", "nope"], "'nope' must be a preset"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes_are_found_before_any_work(
    run: Runner, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(run.tmp_path)
    run.write(*plain_lines(1))
    Path("x.errors.jsonl").write_bytes(run.source.read_bytes())
    os.symlink("in.jsonl", "link.jsonl")
    os.mkfifo("fifo")
    before = sorted(os.listdir())
    said = run.plain("batch", *arguments, status=2)
    assert message in said and said.count("\n") == 1 and said.startswith("gpt2 batch: ")
    assert sorted(os.listdir()) == before
