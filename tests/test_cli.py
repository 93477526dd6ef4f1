"""The command `gpt2`, as a person runs it: text on stdout; for a mistake, one line on stderr and status 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import random_checkpoint, tiny_config
from conftest import ROOT

from gpt2 import GPT2, Engine, SamplingParams, cli, load_tokenizer
from gpt2.tokenizer import STORYBOOK
from gpt2_kernels import _runtime


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_checkpoint(tmp_path_factory.mktemp("model"), tiny_config(), tokenizer=True))


@pytest.fixture(autouse=True)
def _production(production: torch.device) -> Iterator[None]:
    yield


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a command, run in this process."""
    status = 0
    try:
        cli.main(arguments)
    except SystemExit as e:
        status = int(e.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def process(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "gpt2", *arguments],
        input=stdin,
        capture_output=True,
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
    )


def test_generate_writes_the_prompt_and_the_engine_text(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    """In the dtype asked for, or by default in this machine's faster one."""
    default = torch.bfloat16 if torch.cuda.is_available() else _runtime.cpu_dtype()
    for name, dtype in {None: default, "float32": torch.float32, "int8": torch.int8}.items():
        if dtype == torch.int8 and torch.cuda.is_available():
            continue
        chosen = ("--dtype", name) if name else ()
        words = ("--model", folder, "--seed", "3", "--max-tokens", "20", *chosen)
        status, out, err = run(capsys, "generate", "a story", *words)
        assert status == 0 and err == ""
        engine = Engine(GPT2.from_pretrained(folder, dtype=dtype), load_tokenizer(folder), num_blocks=8)
        (completion,) = engine.generate(["a story"], SamplingParams(max_tokens=20, seed=3))
        assert out == "a story" + completion.outputs[0].text + "\n", name


def test_samples_are_separated(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    status, out, _ = run(capsys, "generate", "ab", "--model", folder, "--seed", "3", "--max-tokens", "5", "-n", "3")
    parts = out.removesuffix("\n").split("\n<|endoftext|>\n")
    assert status == 0 and len(parts) == 3 and all(p.startswith("ab") for p in parts)


def test_without_a_prompt_and_without_max_tokens(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    """A fresh text, which stops at the end of the context."""
    status, out, err = run(capsys, "generate", "--model", folder, "--seed", "1", "--ignore-eos")
    assert status == 0 and err == "" and len(out) > 20


def test_every_option_reaches_the_engine(
    capsys: pytest.CaptureFixture[str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(Engine, "stream", lambda self, prompt, params: seen.append((prompt, params)) or iter(["!"]))
    options = "--temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --seed 8".split()
    more = ["--max-tokens", "9", "--stop", "x", "--stop", "y", "--ignore-eos"]
    assert run(capsys, "generate", "p", "--model", folder, *options, *more) == (0, "p!\n", "")
    expected = SamplingParams(
        max_tokens=9, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=8,
        stop=("x", "y"), ignore_eos=True,
    )  # fmt: skip
    assert seen == [("p", expected)]


def test_next_shows_ten_choices_and_appends_the_chosen_one(
    capsys: pytest.CaptureFixture[str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("2\nnonsense\n11\nu\nu\nq\n"))
    status, out, err = run(capsys, "next", "once", "--model", folder, "--dtype", "float32")
    assert status == 0
    model, tokenizer = GPT2.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)
    tokens = tokenizer.encode("once")
    with torch.no_grad():
        logits = model(torch.tensor([tokens], device=model.device))[0, -1]
        shares, ids = torch.softmax(logits.double(), -1).topk(10)
    lines = out.splitlines()
    rows = [i for i, line in enumerate(lines) if line.startswith("  1 ")]
    assert len(rows) == 3  # at the start, after the choice, after taking it back
    for rank in range(10):
        shown = re.match(r"\s*(\d+)\s+([\d.]+) %", lines[rows[0] + rank])
        assert shown and int(shown[1]) == rank + 1
        assert float(shown[2]) == pytest.approx(100 * shares[rank].item(), abs=0.06)
    second = tokenizer.decode_bytes([*tokens, int(ids[1])]).decode("utf-8", errors="replace")
    assert second.splitlines()[-1] in out
    assert lines[rows[2] : rows[2] + 10] == lines[rows[0] : rows[0] + 10]
    assert err.count("not a choice") == 3  # "nonsense", 11, and an undo with nothing to undo


def test_info_shows_the_path_of_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    import gpt2_kernels as ops

    status, out, _ = run(capsys, "info")
    assert status == 0
    for op in ops.OPS:
        line = next(line for line in out.splitlines() if line.startswith(f"  {op} "))
        assert ops.path_of(op, "cpu") in line
    assert torch.__version__ in out and "C++ operators" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--model", "nope"], "'nope' must be a preset"),
        (["generate", "x", "--model", "./nope"], "is not a folder"),
        (["generate", "x", "--temperature", "-1"], "temperature must be a number in 0..1e30, got -1.0"),
        (["generate", "x", "--top-p", "0"], "top_p must be a number in (0, 1], got 0.0"),
        (["generate", "x", "-n", "0"], "n must be an integer in 1..4096, got 0"),
        (["generate", "x", "-n", "4097"], "n must be an integer in 1..4096, got 4097"),
        (["generate", "x", "--max-tokens", "5000"], "prompt and max_tokens must fit in 64 positions"),
        (["generate", "word " * 100], "a prompt must be at most 64 tokens"),
        (["next", "word " * 100], "a prompt must be at most 64 tokens"),
        (["generate", "x", "--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["generate", "x", "--device", "cuda:"], "--device must be cpu, cuda or cuda:N, got 'cuda:'"),
        (["generate", "x", "--device", "cuda:99"], "--device must exist, got 'cuda:99'"),
        (["generate", "\udcff"], "the prompt is not valid UTF-8"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], folder: str, arguments: list[str], message: str
) -> None:
    if "--model" not in arguments:
        arguments = [*arguments, "--model", folder]
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    assert message in err and err.count("\n") == 1 and err.startswith(f"gpt2 {arguments[0]}: ")


@pytest.mark.parametrize("damage", ["truncated", "not a tensor file", "a tensor is missing", "no config"])
def test_broken_models_are_named(capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "not a tensor file":
        weights.write_bytes(b"hello")
    elif damage == "a tensor is missing":
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    else:
        (broken / "config.json").unlink()
    status, out, err = run(capsys, "generate", "x", "--model", str(broken))
    assert status == 2 and out == "" and err.count("\n") == 1 and str(broken) in err


def test_stdin_and_pipes() -> None:
    """In separate processes: bytes on stdin, a reader that leaves early, no options at all."""
    if not (STORYBOOK / "model.safetensors").exists():
        pytest.skip("the shipped model is not in this checkout")
    done = process("generate", "-", "--max-tokens", "5", "--seed", "1", stdin="Der Bär".encode())
    assert done.returncode == 0 and done.stdout.decode().startswith("Der Bär") and done.stderr == b""
    done = process("generate", "-", stdin=b"\xff\xfe")
    assert done.returncode == 2 and done.stderr == b"gpt2 generate: stdin is not valid UTF-8 (byte 0)\n"
    assert process().returncode == 2
    helped = process("generate", "--help")
    assert helped.returncode == 0 and b"--temperature" in helped.stdout


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    """They used to take 1.7 s, and now take 0.1 s."""
    code = """
import sys
sys.modules["torch"] = None  # any import of it fails
from gpt2 import cli
for arguments, expected in [
    (["--help"], 0), (["generate", "--help"], 0), ([], 2), (["generate", "x", "--bogus"], 2),
    (["generate", "-n", "0"], 2), (["generate", "--model", "nope"], 2), (["next", "--device", "tpu"], 2),
    (["train", "--help"], 0), (["train", "--out", "x"], 2), (["train", "--data", "absent", "--out", "x"], 2),
    (["train", "--data", ".", "--out", "x", "--steps", "0"], 2),
    (["generate", "\\udcff"], 2), (["batch"], 2), (["batch", "/nowhere/in.jsonl", "-o", "out.jsonl"], 2),
]:
    try:
        cli.main(arguments)
    except SystemExit as e:
        assert e.code == expected, (arguments, e.code)
"""
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("when", ["gpt2.sampling", "numpy", "torch", "gpt2.engine", "text"])
def test_ctrl_c_at_any_time(folder: str, when: str) -> None:
    """Once a module has been imported, or while text is written: status 130 and no output."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    options = ["--model", folder, "--ignore-eos", "-n", "4000", "--temperature", "0"]
    child = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "gpt2", "generate", "x", *options],
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    for line in child.stderr:  # "import time: 12 | 345 |   torch", as each import ends
        if line.split("|")[-1].strip() == (when if when != "text" else "gpt2.engine"):
            break
    if when == "text":
        time.sleep(1.0)  # in the middle of 4000 samples
    child.send_signal(signal.SIGINT)
    said = [line for line in child.stderr if not line.startswith("import time:")]
    assert (child.wait(60), said) == (130, [])


def test_a_terminal_that_knows_ascii_alone(folder: str) -> None:
    done = process(
        "generate", "Der B\u00e4r", "--model", folder, "--max-tokens", "3", "--seed", "1", PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 0 and done.stdout.startswith(b"Der B?r") and done.stderr == b""
    done = process("next", "Der B\u00e4r", "--model", folder, PYTHONIOENCODING="ascii", stdin=b"1\nq\n")
    assert done.returncode == 0 and done.stdout.startswith(b"Der B?r") and done.stderr == b""


def test_the_shipped_model_writes_a_story(capsys: pytest.CaptureFixture[str]) -> None:
    if not (STORYBOOK / "model.safetensors").exists():
        pytest.skip("the shipped model is not in this checkout")
    arguments = ["generate", "Once upon a time", "--seed", "1", "--max-tokens", "60"]
    status, out, err = run(capsys, *arguments)
    assert status == 0 and err == ""
    assert out.startswith("Once upon a time") and len(out) > 100
    assert run(capsys, *arguments)[1] == out  # the seed decides
    words = re.findall(r"[a-z]+", out.lower())
    assert (
        sum(w in ("the", "a", "and", "to", "of", "in", "was", "he", "she", "it", "that") for w in words)
        > len(words) / 8
    )
