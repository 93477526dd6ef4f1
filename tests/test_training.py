"""The trainer against a plain PyTorch loop, against itself interrupted, and in everything that may go wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import random_checkpoint, tiny_config, transformers_model
from conftest import ROOT

from gpt2 import GPT2, ReferenceGPT2, checkpoint, cli, data, load_tokenizer, training
from gpt2.parallel import World
from gpt2.recipe import Recipe
from gpt2.trainer import Trainer

CPU = World(0, 1, torch.device("cpu"))
WORDS = "the cat and a dog sat on some mat while rain fell over every old town".split()


@pytest.fixture(autouse=True)
def _production(production: torch.device) -> Iterator[None]:
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of two layers with a tokenizer of 288 tokens; most tests train a model of this shape."""
    return str(random_checkpoint(tmp_path_factory.mktemp("model"), tiny_config(), tokenizer=True))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    random = np.random.default_rng(0)
    documents = [" ".join(random.choice(WORDS, 40)) for _ in range(20)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n<|endoftext|>\n".join(documents) + "\n")
    return str(path)


def arguments(text: str, folder: str, out: Path, **changes: Any) -> list[str]:
    values = dict(data=text, model=folder, out=out, steps=6, batch_size=4, context=16, lr=1e-2, device="cpu") | changes
    given = [("--" + name.replace("_", "-"), value) for name, value in values.items() if value is not False]
    return ["train", *(part for name, value in given for part in ([name] if value is True else [name, str(value)]))]


def run(capsys: pytest.CaptureFixture[str], *args: Any, **changes: Any) -> tuple[int, str]:
    """(status, stderr) of a training run in this process; nothing may be on stdout."""
    status = 0
    try:
        cli.main(arguments(*args, **changes))
    except SystemExit as e:
        status = int(e.code or 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    return status, captured.err


def process(args: list[str], **options: Any) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    environment = {**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpt2", *args]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def trainer(text: str, folder: str, **changes: Any) -> Trainer:
    recipe = Recipe(**{"data": text, "model": folder, "steps": 6, "batch_size": 4, "lr": 1e-2, **changes})
    config, tokenizer = training._model_of(recipe)
    tokens = np.array(tokenizer.encode_ordinary(Path(text).read_text())[:1000], dtype=np.uint16)
    windows = data.Windows(tokens, recipe.context or 16, recipe.order, recipe.seed)
    return Trainer(recipe, config, windows, CPU)


def assert_same_state(a: Path, b: Path) -> None:
    """Two checkpoints have equal weights, moments and random state, bit for bit."""
    first, second = (GPT2.from_pretrained(path, device="cpu").state_dict() for path in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = (torch.load(path / "optimizer.pt", weights_only=True) for path in (a, b))
    assert torch.equal(one["random"], two["random"])
    assert len(one["optimizers"]) == len(two["optimizers"])
    for x, y in zip(one["optimizers"], two["optimizers"]):
        assert x.keys() == y.keys() and len(x) > 0
        for index in x:
            assert all(torch.equal(x[index][key], y[index][key]) for key in x[index])


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_the_losses_are_those_of_a_plain_loop(text: str, folder: str) -> None:
    """ReferenceGPT2, torch's own loss, AdamW and schedule, one batch at a time; ours divides each batch in two.

    24 steps cross from one pass over the data to the next; 1e-4 is ten times the difference seen in float32.
    """
    ours = trainer(text, folder, steps=24, micro_batch=2, warmup=4, clip=0.5)
    theirs = ReferenceGPT2(ours.config)
    theirs.load_state_dict({name: p.detach().clone() for name, p in ours.parameters.items()})
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), foreach=False)
    assert ours.windows.count < 24 * 4
    for step in range(24):
        rate = 1e-2 * ((step + 1) / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / 20)))
        for group in adam.param_groups:
            group["lr"] = rate
        x, y = ours.windows.batch(4 * step, 4)
        loss = F.cross_entropy(theirs(x).flatten(0, 1), y.flatten(), ignore_index=-100)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adam.step()
        value, _, _ = ours.update()
        assert value == pytest.approx(float(loss.detach()), abs=1e-4), step
    assert value < 4.0 < math.log(288)  # and it learns


@pytest.mark.parametrize("micro", [1, 2])
def test_a_divided_batch_has_the_gradient_of_the_whole(text: str, folder: str, micro: int) -> None:
    """Even when windows have unequal numbers of targets: the last of a pass has fewer."""
    whole, parts = trainer(text, folder), trainer(text, folder, micro_batch=micro)
    count = whole.windows.count
    last = next(n for n in range(count) if whole.windows.targets(n, 1) < 16)
    whole.step = parts.step = last // 4
    (a, norm_a, _), (b, norm_b, _) = whole.update(), parts.update()
    assert a == pytest.approx(b, rel=1e-5) and norm_a == pytest.approx(norm_b, rel=1e-4)


def test_muon_takes_the_matrices_of_the_blocks(text: str, folder: str) -> None:
    ours = trainer(text, folder, optimizer="muon")
    adam, muon = ours.optimizers
    names = {id(p): name for name, p in ours.parameters.items()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken == {n for n in names.values() if n.startswith("h.") and n.endswith(".weight") and ".ln_" not in n}
    rest = {names[id(p)] for group in adam.param_groups for p in group["params"]}
    assert rest | taken == set(names.values()) and not rest & taken
    first = ours.update()[0]
    for _ in range(5):
        last = ours.update()[0]
    assert last < first


def test_bfloat16_computes_with_rounded_weights_and_updates_float32(text: str, folder: str) -> None:
    """The loss is the rounded model's; a hundred updates, each too small for bfloat16's precision, do not vanish."""
    ours = trainer(text, folder, dtype="bfloat16", lr=1e-5, steps=1000, warmup=0)
    assert all(p.dtype == torch.float32 for p in ours.parameters.values())
    rounded = ours.snapshot()
    assert rounded is not None and rounded.dtype == torch.bfloat16
    x, y = ours.windows.batch(0, 4)
    expected = rounded.loss(x, y)
    before = {name: p.detach().clone() for name, p in ours.parameters.items()}
    assert ours.update()[0] == pytest.approx(float(expected), rel=1e-5)
    moved = {name: (p - before[name]).abs().max().item() for name, p in ours.parameters.items()}
    assert all(0 < change < 3e-5 for name, change in moved.items() if name != "wpe.weight")
    assert next(iter(ours.parameters)) == "wte.weight"  # the names are those of the model


@pytest.mark.parametrize("changes", [{"checkpoint_activations": True, "dtype": "bfloat16"}, {"optimizer": "adamw"}])
def test_recomputed_activations_give_the_same_bits(text: str, folder: str, changes: dict[str, Any]) -> None:
    plain = trainer(text, folder, dtype=changes.get("dtype"))
    other = trainer(text, folder, **changes)
    for _ in range(2):
        assert plain.update() == other.update()


def test_activations_are_really_computed_again(text: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpt2_kernels as ops

    calls = []
    attention = ops.attention_qkvpacked
    monkeypatch.setattr(ops, "attention_qkvpacked", lambda *a, **k: calls.append(1) or attention(*a, **k))
    trainer(text, folder, checkpoint_activations=True).update()
    assert len(calls) == 2 * 2  # forward and again, in two layers


def test_evaluation_is_the_mean_over_all_tokens(text: str, folder: str) -> None:
    ours = trainer(text, folder, micro_batch=2)
    tokens = ours.windows.tokens[:75]  # four windows and 10 tokens
    model = ReferenceGPT2(ours.config)
    model.load_state_dict(ours.parameters)
    expected = 0.0
    model.requires_grad_(False)
    for start in (0, 16, 32, 48, 58):
        x = torch.from_numpy(tokens[start : start + 17].astype(np.int64))
        each = F.cross_entropy(model(x[None, :-1])[0], x[1:], reduction="none")
        expected += float(each[-10:].sum() if start == 58 else each.sum())
    assert ours.evaluate(tokens) == pytest.approx(expected / 74, rel=1e-5)


def test_a_run_makes_a_model_that_transformers_loads(
    capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path
) -> None:
    """Through the command: what it writes, what it prints, and a folder that the other commands take."""
    out = tmp_path / "run"
    status, err = run(capsys, text, folder, out, val_data=text, save_every=3, log_every=2, keep=1)
    assert status == 0, err
    assert re.search(r"step 2/6  loss [\d.]+  [\d,]+ tokens/s  MFU \d+ % of a matmul's  0:00:\d\d left", err)
    assert re.search(r"step 6  validation loss [\d.]+ nats a token, perplexity", err) and "step 6  sample: " in err
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [2, 4, 6]
    assert [m["step"] for m in metrics if "val_loss" in m] == [m["step"] for m in metrics if "sample" in m] == [3, 6]
    assert checkpoint.steps(out / "checkpoints") == ["step-00000006"]

    ours = GPT2.from_pretrained(out / "final", device="cpu")
    state = json.loads((out / "checkpoints" / "step-00000006" / "state.json").read_text())
    tokens = np.memmap(out / "data" / "val.tokens", dtype=np.uint16, mode="r").astype(np.int64)
    x = torch.from_numpy(tokens[:17])
    assert state["val_loss"] == pytest.approx([m["val_loss"] for m in metrics if "val_loss" in m][-1])
    assert load_tokenizer(out / "final").n_vocab == 288
    theirs = transformers_model(out / "final")
    with torch.no_grad():
        assert torch.allclose(ours(x[None]), theirs(x[None]).logits, atol=1e-4)
    capsys.readouterr()
    status = 0
    try:
        cli.main(
            ["generate", "the", "--model", str(out / "final"), "--max-tokens", "3", "--seed", "1", "--device", "cpu"]
        )
    except SystemExit as e:
        status = int(e.code or 0)
    assert status == 0 and capsys.readouterr().out.startswith("the")


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "dtype": "bfloat16"}], ids=["adamw", "muon bfloat16"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Interrupted by SIGTERM in the middle, after a step at which no checkpoint was due; across two passes."""
    options = dict(steps=20, save_every=8, log_every=1, keep=9, **changes)
    assert run(capsys, text, folder, tmp_path / "clean", **options)[0] == 0

    update = Trainer.update

    def interrupted(self: Trainer, stop: int = 0) -> Any:
        if self.step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
            stop = signal.SIGTERM  # as the loop will pass it from the next step on
        return update(self, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", interrupted)
        status, err = run(capsys, text, folder, tmp_path / "cut", **options)
    assert status == 128 + signal.SIGTERM and "stopped by signal 15 after step 13" in err
    assert not (tmp_path / "cut" / "final").exists()
    status, err = run(capsys, text, folder, tmp_path / "cut", resume=True, **options)
    assert status == 0 and "going on after step 13 of 20" in err
    for step in ("step-00000016", "step-00000020"):
        assert_same_state(tmp_path / "clean" / "checkpoints" / step, tmp_path / "cut" / "checkpoints" / step)
    assert losses(tmp_path / "clean") == losses(tmp_path / "cut")
    final = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("clean", "cut")]
    assert final[0] == final[1]


def test_sigterm_saves_and_ends(text: str, folder: str, tmp_path: Path) -> None:
    """A process that is told to end, as schedulers do."""
    child = process(arguments(text, folder, tmp_path, steps=100_000, save_every=99_999, log_every=5))
    assert child.stderr is not None
    for line in child.stderr:
        if "step 5/" in line:
            break
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 143, err
    (name,) = checkpoint.steps(tmp_path / "checkpoints")
    assert int(name.removeprefix("step-")) >= 5 and "--resume goes on from there" in err


def test_killed_again_and_again_it_ends_at_the_same_weights(
    capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 at arbitrary moments, ten times; each run resumes from what the last one left behind.

    A server that has imported the trainer forks the processes, since importing takes longer than they live.
    """
    options = dict(steps=60, save_every=2, log_every=1, eval_every=30)
    assert run(capsys, text, folder, tmp_path / "clean", **options)[0] == 0
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpt2.training", "gpt2.commands", "torch._dynamo", "torch.utils.tensorboard"])
    out = tmp_path / "killed"
    begun = 0
    for number in range(10):
        child = context.Process(target=cli.main, args=(arguments(text, folder, out, resume=True, **options),))
        child.start()
        resumed = time.monotonic()
        metrics = out / "metrics.jsonl"
        written = metrics.stat().st_mtime_ns if metrics.exists() else 0
        while child.is_alive() and time.monotonic() < resumed + 60:
            if metrics.exists() and metrics.stat().st_mtime_ns != written:
                break
            time.sleep(0.002)
        time.sleep(0.007 * number)
        child.kill()
        child.join()
        begun += child.exitcode == -signal.SIGKILL
    assert begun >= 5, "most of the processes ended before they were killed"
    status, err = run(capsys, text, folder, out, resume=True, **options)
    assert status == 0, err
    assert_same_state(*(tmp_path / name / "checkpoints" / "step-00000060" for name in ("clean", "killed")))
    assert losses(tmp_path / "clean") == losses(tmp_path / "killed")


def test_resume_starts_afresh_and_ends_at_once(
    capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path
) -> None:
    """Without a checkpoint, and when the run is finished; more steps continue a finished one."""
    out = tmp_path / "run"
    assert run(capsys, text, folder, out, resume=True)[0] == 0
    before = (out / "final" / "model.safetensors").stat().st_mtime_ns
    status, err = run(capsys, text, folder, out, resume=True)
    assert status == 0 and err == f"gpt2 train: {out} is finished: {out / 'final'}\n"
    assert (out / "final" / "model.safetensors").stat().st_mtime_ns == before
    status, err = run(capsys, text, folder, out)
    assert status == 2 and "--out must be empty or new" in err and err.count("\n") == 1
    status, err = run(capsys, text, folder, out, resume=True, steps=8)
    assert status == 0 and "going on after step 6 of 8" in err
    status, err = run(capsys, text, folder, out, resume=True, steps=7)
    assert status == 0 and "is finished" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 5e-3, "steps": 8}, "--resume must go on as the run began: lr was 0.01, got 0.005"),
        ({"context": 8, "steps": 8}, "context was 16, got 8"),
        ({"model": "storybook", "steps": 8}, "tokenizer must be what .* was made with|vocab_size was 288, got 4096"),
    ],
    ids=str,
)
def test_another_recipe_is_refused_on_resuming(
    capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert run(capsys, text, folder, tmp_path)[0] == 0
    status, err = run(capsys, text, folder, tmp_path, resume=True, **changes)
    assert status == 2 and re.search(message, err) and err.count("\n") == 1


def test_init_trains_a_model_on(capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path) -> None:
    """At learning rate 0 the result is the initial model; tokenizer and shape are the folder's."""
    status, err = run(capsys, text, "unused", tmp_path, init=folder, model=False, lr=0, steps=1)
    assert status == 0, err
    before, after = (GPT2.from_pretrained(f, device="cpu").state_dict() for f in (folder, tmp_path / "final"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(
    capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path
) -> None:
    assert run(capsys, text, folder, tmp_path / "clean")[0] == 0
    assert run(capsys, text, folder, tmp_path / "run", save_every=2)[0] == 0
    path = tmp_path / "run" / "checkpoints" / "step-00000006" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:1000])
    status, err = run(capsys, text, folder, tmp_path / "run", resume=True, save_every=2)
    assert status == 0
    assert "optimizer.pt is cut short or changed): the checkpoint before it is used" in err
    assert "going on after step 4 of 6" in err
    assert_same_state(*(tmp_path / name / "checkpoints" / "step-00000006" for name in ("clean", "run")))


def test_lines_of_the_metrics_that_are_damaged_are_left_out_and_said(
    capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path
) -> None:
    """Intact lines stay as they are, even with a line separator in a sample."""
    assert run(capsys, text, folder, tmp_path, log_every=1)[0] == 0
    metrics = tmp_path / "metrics.jsonl"
    before = metrics.read_bytes() + '{"step": 6, "sample": "a\u2028b"}\n'.encode()
    damage = b'\xff\xfe\n[]\n3\nnull\n{}\n{"step": "x"}\n' + b"[" * 100_000 + b'\n{"step": 6, "lo'
    metrics.write_bytes(before + damage)
    status, err = run(capsys, text, folder, tmp_path, log_every=1, resume=True, steps=7)
    assert status == 0 and f"gpt2 train: {metrics}: lines left out because they were cut off or damaged: 8\n" in err
    assert metrics.read_bytes().startswith(before) and losses(tmp_path)[-1][0] == 7


def test_another_number_of_processes_is_said(
    capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path
) -> None:
    assert run(capsys, text, folder, tmp_path, save_every=3)[0] == 0
    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000006")
    state = json.loads((checkpoints / "step-00000003" / "state.json").read_text())
    (checkpoints / "step-00000003" / "state.json").write_text(json.dumps({**state, "processes": 8}))
    status, err = run(capsys, text, folder, tmp_path, save_every=3, resume=True)
    assert status == 0 and "there were 8 processes and there are 1: the last bits will differ" in err


def test_the_first_step_is_in_no_rate(
    capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compiles, perhaps for minutes. Here it takes an hour, and each of the others a second."""
    clock = [0.0]
    update = Trainer.update

    def timed(self: Trainer, stop: int = 0) -> tuple[float, float, int]:
        clock[0] += 3600 if self.step == 0 else 1
        return update(self, stop)

    monkeypatch.setattr(Trainer, "update", timed)
    monkeypatch.setattr(training, "matmul_ceiling", lambda device, dtype: 1e9)
    monkeypatch.setattr(training, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    assert run(capsys, text, folder, tmp_path, log_every=3)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens_per_second"] for line in lines if "loss" in line] == [64.0, 64.0]


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(
    capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = GPT2.loss
    count = [0]

    def poisoned(self: GPT2, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        return loss(self, x, y) * (math.nan if count[0] == 5 else 1.0)

    monkeypatch.setattr(GPT2, "loss", poisoned)
    status, err = run(capsys, text, folder, tmp_path, save_every=2)
    last = tmp_path / "checkpoints" / "step-00000004"
    assert status == 2
    assert re.search(r"the loss must be finite, got loss nan .* at step 5; the last good checkpoint is", err)
    assert str(last) in err.splitlines()[-1]
    monkeypatch.undo()
    status, err = run(capsys, text, folder, tmp_path, save_every=2, resume=True)
    assert status == 0 and "going on after step 4" in err
    assert run(capsys, text, folder, tmp_path / "clean", save_every=2)[0] == 0
    assert_same_state(*(f / "checkpoints" / "step-00000006" for f in (tmp_path, tmp_path / "clean")))


def test_a_disk_that_fills_up_loses_nothing(text: str, folder: str, tmp_path: Path) -> None:
    """A process with a file size limit of 250 kB: the weights fit, the moments do not."""
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))

    child = process(arguments(text, folder, tmp_path, steps=4, save_every=2), preexec_fn=limit)
    _, err = child.communicate(timeout=60)
    last = err.splitlines()[-1]
    assert child.returncode == 2 and "the checkpoint of step 2 could not be written to" in last, err
    assert "there is no checkpoint yet" in last
    assert checkpoint.steps(tmp_path / "checkpoints") == [] and not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"context": 65}, "context must be at most the model's 64 positions, got 65"),
        ({"init": "storybook"}, "--init must have the shape of --model .*, got vocab_size 4096, not 288"),
        ({"data": "EMPTY"}, "the data must hold text, got nothing"),
        ({"data": "SHORT"}, r"the data must hold at least context \+ 1 = 17 tokens, got"),
        ({"data": "./absent.txt"}, "data must exist, got './absent.txt'"),
        ({"device": "tpu"}, "--device must be cpu, cuda or cuda:N"),
        ({"micro_batch": 3}, "micro_batch must divide the 4 sequences of each process, got 3"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "EMPTY").touch()
    (tmp_path / "SHORT").write_text("ab")
    if changes.get("data") in ("EMPTY", "SHORT"):
        changes = {"data": str(tmp_path / changes["data"])}
    status, err = run(capsys, text, folder, tmp_path / "run", **changes)
    assert status == 2 and err.count("\n") == 1 and re.match(f"gpt2 train: .*{message}", err), err


def test_a_tokenizer_of_another_vocabulary_is_refused(
    capsys: pytest.CaptureFixture[str], text: str, folder: str, tmp_path: Path
) -> None:
    model = random_checkpoint(tmp_path / "model", tiny_config(vocab_size=300))
    status, err = run(capsys, text, str(tmp_path), tmp_path / "run", model=False, init=model)
    assert status == 2 and "no tokenizer there" in err
    (model / "tokenizer.tiktoken").write_bytes((Path(folder) / "tokenizer.tiktoken").read_bytes())
    status, err = run(capsys, text, folder, tmp_path / "run", model=str(model))
    assert status == 2 and "<|endoftext|> is token 287, but config.json says 299" in err


def test_flops_are_those_of_the_products() -> None:
    """Counted matrix by matrix for the 124M shape: forward, and twice as much backward."""
    from gpt2.config import PRESETS

    c, layers, vocabulary, t = 768, 12, 50257, 1024
    products = layers * (3 * c * c + c * c + 8 * c * c) + vocabulary * c
    attention = layers * 2 * (t / 2) * c * 2  # q k and p v, half of them masked
    assert training.flops_per_token(PRESETS["gpt2"], t) == pytest.approx(3 * (2 * products + attention), rel=2e-3)


def test_compiled_training_has_the_same_losses(text: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph, traced with its gradients; inductor's part is PyTorch's business, and would take a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    plain, compiled = trainer(text, folder), trainer(text, folder, compile=True)
    for _ in range(2):
        assert compiled.update()[0] == pytest.approx(plain.update()[0], rel=1e-5)


def test_the_result_of_a_recipe_does_not_depend_on_how_it_is_watched() -> None:
    names = [field.name for field in dataclasses.fields(Recipe)]
    assert set(Recipe(data=".").decisive()) == {
        "batch_size", "context", "order", "optimizer", "lr", "schedule", "min_lr", "warmup", "weight_decay", "clip",
        "dtype", "seed",
    } <= set(names)  # fmt: skip


def test_the_losses_are_drawn_where_there_is_matplotlib(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "val_loss": 2.5}\n{"step": 3, "lo')
    training.plot(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
