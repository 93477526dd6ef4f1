"""A training run: its loop, what it keeps in its folder, and what it reports.

A checkpoint holds all that the next update depends on (gpt2/trainer.py): an interrupted run resumes bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch

from gpt2 import checkpoint, data, parallel, weights
from gpt2.config import PRESETS, GPT2Config, preset_or_folder
from gpt2.engine import Engine
from gpt2.model import GPT2
from gpt2.parallel import World
from gpt2.recipe import Recipe
from gpt2.sampling import SamplingParams
from gpt2.tokenizer import load_tokenizer, save_tokenizer
from gpt2.trainer import STOPS, Trainer, filled

SAMPLE_TOKENS = 48


def train(recipe: Recipe, out: Path, *, resume: bool = False, device: str | None = None) -> int:
    """Run `recipe` in the folder `out`; the result is `out`/final, a Hugging Face folder.

    With `resume` it continues from the newest intact checkpoint there, or starts if there is none. SIGTERM and SIGINT
    save a checkpoint and end the run. Returns the exit status: 0, or 128 + the signal's number.
    Raises ValueError or OSError, having lost nothing but the steps since the last checkpoint.
    """
    recipe.sequences_at_a_time(parallel.processes())  # before the processes connect
    with parallel.world(device) as world:
        return _Run(recipe, out, resume, world).go()


class _Run:
    """The folder of a run, and what is written there and on stderr. Only process 0 writes."""

    def __init__(self, recipe: Recipe, out: Path, resume: bool, world: World) -> None:
        if recipe.dtype is None:
            recipe = dataclasses.replace(recipe, dtype="bfloat16" if world.device.type == "cuda" else "float32")
        self.recipe, self.out, self.world = recipe, out, world
        self.checkpoints, self.final = out / "checkpoints", out / "final"
        self.every = recipe.eval_every or recipe.save_every
        config, self.tokenizer = _model_of(recipe)
        context = config.n_positions if recipe.context is None else recipe.context
        if context > config.n_positions:
            raise ValueError(f"context must be at most the model's {config.n_positions} positions, got {context}")

        world.first(lambda: out.mkdir(parents=True, exist_ok=True))
        self.found = world.first(lambda: checkpoint.newest(self.checkpoints, self.say)) if resume else None
        ended = resume and (self.found is None or self.found[1]["step"] >= recipe.steps)
        self.finished = ended and world.first(self.final.is_dir)  # a folder that is renamed into place when it is whole
        if self.finished:
            return
        tokens = self._tokens(recipe.data, "train")
        self.validation = None if recipe.val_data is None else self._tokens(recipe.val_data, "val")
        windows = data.Windows(tokens, context, recipe.order, recipe.seed)
        self.trainer = Trainer(recipe, config, windows, world)

    def _tokens(self, text: str, name: str) -> np.ndarray:
        folder, fixed = self.out / "data", self.found is not None
        self.world.first(lambda: len(data.tokenise(text, self.tokenizer, folder, name, fixed)))
        return data.tokenise(text, self.tokenizer, folder, name, True)  # which is there now

    def say(self, message: str) -> None:
        if self.world.rank == 0:
            print(f"gpt2 train: {message}", file=sys.stderr, flush=True)

    def go(self) -> int:
        if self.finished:
            self.say(f"{self.out} is finished: {self.final}")
            return 0
        trainer, recipe, world = self.trainer, self.recipe, self.world
        if self.found is not None:
            path, state = self.found
            _check_same(recipe, trainer.config, state)
            trainer.restore(path, state["step"])
            self.say(f"going on after step {state['step']} of {recipe.steps} ({path})")
            if (before := state["processes"]) != world.size:
                self.say(f"there were {before} processes and there are {world.size}: the last bits will differ")
        else:
            self.say(
                f"{trainer.config.num_parameters:,} parameters, {len(trainer.windows.tokens):,} tokens, {recipe.steps} "
                f"steps of {recipe.batch_size} x {trainer.windows.context}, {world.size} x {world.device}"
            )
        world.first(lambda: self._cut_metrics(trainer.step))
        self.ceiling = matmul_ceiling(world.device, trainer.dtype)
        self.writer = _tensorboard(self.out) if world.rank == 0 else None
        with _signals() as received:
            status = self._loop(received)
        if status == 0:
            self._finish()
        return status

    def _loop(self, received: list[int]) -> int:
        trainer, recipe = self.trainer, self.recipe
        first, last_step = trainer.step + 1, recipe.steps
        logged, since = trainer.step, time.perf_counter()
        while trainer.step < last_step:
            try:
                loss, norm, stop = trainer.update(received[0] if received else 0)
            except FloatingPointError as e:
                raise ValueError(f"{e}; {checkpoint.last_good(self.checkpoints)}") from None
            step, value = trainer.step, None
            if step % recipe.log_every == 0 or step == last_step:
                speed = (step - logged) / (time.perf_counter() - since)
                self._progress(step, loss, norm, speed)
                logged, since = step, time.perf_counter()
            elif step == first:  # it compiled kernels: no speed includes it, unless a line covers it alone
                logged, since = step, time.perf_counter()
            paused = time.perf_counter()
            if step % self.every == 0 or step == last_step:
                value = self._watch()
            if step % recipe.save_every == 0 or step == last_step or stop or self._is_best(value):
                self._save(value)
            since += time.perf_counter() - paused  # speed is that of the steps alone
            if stop:
                self.say(f"stopped by signal {stop} after step {step}; --resume goes on from there")
                return 128 + stop
        return 0

    def _progress(self, step: int, loss: float, norm: float, steps_per_second: float) -> None:
        recipe, trainer = self.recipe, self.trainer
        speed = steps_per_second * recipe.batch_size * trainer.windows.context
        mfu = speed * flops_per_token(trainer.config, trainer.windows.context) / (self.ceiling * self.world.size)
        rate = recipe.rate(step - 1)
        self._record(step, loss=loss, grad_norm=norm, lr=rate, tokens_per_second=round(speed, 1), mfu=round(mfu, 4))
        left = datetime.timedelta(seconds=round((recipe.steps - step) / steps_per_second))
        self.say(
            f"step {step}/{recipe.steps}  loss {loss:.4f}  {speed:,.0f} tokens/s  MFU {100 * mfu:.0f} % of a matmul's  "
            f"{left} left"
        )

    def _watch(self) -> float | None:
        """The validation loss, if there is text for it, and a sample; both go to the metrics."""
        trainer, step = self.trainer, self.trainer.step
        value = None if self.validation is None else trainer.evaluate(self.validation)
        if value is not None:
            self._record(step, val_loss=value)
            self.say(
                f"step {step}  validation loss {value:.4f} nats a token, perplexity {math.exp(min(value, 700)):.2f}"
            )
        model = trainer.snapshot()
        if model is not None:
            text = sample(model, self.tokenizer, self.recipe.seed)
            self._record(step, sample=text)
            self.say(f"step {step}  sample: {' '.join(text.split())}")
        return value

    def _is_best(self, value: float | None) -> bool:
        if value is None:
            return False
        best = self.world.first(lambda: checkpoint.best_step(self.checkpoints))
        return best is None or value < best[1]

    def _save(self, value: float | None) -> None:
        trainer = self.trainer
        state = {
            "val_loss": value,
            "recipe": self.recipe.decisive(),
            "config": dataclasses.asdict(trainer.config),
            "processes": self.world.size,
        }
        tensors = trainer.state()

        def write(folder: Path) -> None:
            model = filled(trainer.config, tensors["model"], torch.float32)
            model.save_pretrained(folder)
            save_tokenizer(_tokenizer_source(self.recipe), folder)
            torch.save({key: tensors[key] for key in tensors if key != "model"}, folder / "optimizer.pt")

        def work() -> None:
            checkpoint.save(self.checkpoints, trainer.step, write, state)
            checkpoint.prune(self.checkpoints, self.recipe.keep)

        self.world.first(work)

    def _finish(self) -> None:
        model = self.trainer.snapshot()

        def work() -> None:
            assert model is not None
            draft = self.out / ".final"
            shutil.rmtree(draft, ignore_errors=True)
            model.save_pretrained(draft)
            save_tokenizer(_tokenizer_source(self.recipe), draft)
            shutil.rmtree(self.final, ignore_errors=True)
            draft.rename(self.final)
            plot(self.out / "metrics.jsonl", self.out / "loss.png")
            best = checkpoint.best_step(self.checkpoints)
            if best is not None and best[0] != checkpoint.steps(self.checkpoints)[-1]:
                self.say(f"the lowest validation loss, {best[1]:.4f}, was that of {self.checkpoints / best[0]}")
            self.say(f"wrote {self.final}")

        self.world.first(work)

    def _record(self, step: int, **values: Any) -> None:
        if self.world.rank != 0:
            return
        path = self.out / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        except OSError as e:
            raise OSError(f"{path} could not be written ({e}); {checkpoint.last_good(self.checkpoints)}") from e
        for name, value in values.items():
            if self.writer is not None and isinstance(value, float):
                self.writer.add_scalar(name, value, step)

    def _cut_metrics(self, step: int) -> None:
        """Drop what was recorded after the checkpoint that the run resumes from: it will be recorded again."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            draft = path.with_suffix(".tmp")
            records = _metrics(path)
            draft.write_bytes(b"".join(line + b"\n" for line, record in records if record["step"] <= step))
            if damaged := len(path.read_bytes().splitlines()) - len(records):
                self.say(f"{path}: lines left out because they were cut off or damaged: {damaged}")
            draft.replace(path)


def flops_per_token(config: GPT2Config, context: int) -> float:
    """For forward and backward: 6 for each weight in a product, plus causal attention's 12 L C T / 2."""
    weights = config.num_parameters - config.n_positions * config.n_embd  # the embedding is the output's matrix too
    return 6 * weights + 6 * config.n_layer * config.n_embd * context


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square products of random matrices: what a step is measured against."""
    size = 8192 if device.type == "cuda" else 1024
    random = torch.Generator(device).manual_seed(0)  # the run's own random state is left alone
    a, b = (torch.randn(size, size, device=device, generator=random).to(dtype) for _ in range(2))
    times = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def sample(model: GPT2, tokenizer: tiktoken.Encoding, seed: int) -> str:
    """The beginning of a text, as the model writes it now."""
    engine = Engine(model, tokenizer, max_batch=1, num_blocks=8, cuda_graphs=False)
    count = min(SAMPLE_TOKENS, model.config.n_positions - 1)
    (completion,) = engine.generate([""], SamplingParams(max_tokens=count, temperature=0.8, seed=seed))
    return completion.outputs[0].text


def plot(metrics: Path, image: Path) -> None:
    """Plot the losses, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("val_loss", "validation")):
        points = [(record["step"], record[key]) for _, record in _metrics(metrics) if key in record]
        if points:
            axes.plot(*zip(*points), label=label)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    figure.savefig(image, dpi=150)


def _metrics(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of a metrics file that are records, with their contents; the last may have been cut off."""
    found = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line.decode("utf-8"))
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                found.append((line, record))
    return found


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals received that ask the run to end; a second SIGINT ends it at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in STOPS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tokenizer_source(recipe: Recipe) -> str:
    """The preset or folder whose tokenizer a run uses: that of `init` where it has one, else that of `model`."""
    if recipe.init is not None:
        found = preset_or_folder(recipe.init, "--init")
        names = ("tokenizer.tiktoken", "vocab.json", "tokenizer.json")
        if recipe.model is None or isinstance(found, str) or any((found / name).is_file() for name in names):
            return recipe.init
    return recipe.model or "storybook"


def _model_of(recipe: Recipe) -> tuple[GPT2Config, tiktoken.Encoding]:
    """The shape and the tokenizer of a run. Raises ValueError if `model`, `init` and tokenizer do not match."""

    def config_of(name: str) -> GPT2Config:
        return PRESETS[name] if name in PRESETS else weights.config_of(name)

    config = config_of(recipe.init or recipe.model or "storybook")
    if recipe.init is not None and recipe.model is not None and config_of(recipe.model) != config:
        other = dataclasses.asdict(config_of(recipe.model))
        wrong = [f"{k} {v}, not {other[k]}" for k, v in dataclasses.asdict(config).items() if other[k] != v]
        raise ValueError(f"--init must have the shape of --model {recipe.model}, got {', '.join(wrong)}")
    tokenizer = load_tokenizer(_tokenizer_source(recipe))
    if tokenizer.n_vocab > config.vocab_size or tokenizer.eot_token != config.eos_token_id:
        raise ValueError(
            f"the tokenizer's {tokenizer.n_vocab} tokens must exist in the model, whose vocab_size is "
            f"{config.vocab_size} and eos_token_id {config.eos_token_id}, got {tokenizer.eot_token} as <|endoftext|>"
        )
    return config, tokenizer


def _check_same(recipe: Recipe, config: GPT2Config, state: dict[str, Any]) -> None:
    """A run must continue as it began. Raises ValueError naming what differs."""
    now = {**recipe.decisive(), **dataclasses.asdict(config)}
    then = {**state["recipe"], **state["config"]}
    if wrong := [f"{key} was {then.get(key)!r}, got {value!r}" for key, value in now.items() if then.get(key) != value]:
        raise ValueError(f"--resume must go on as the run began: {'; '.join(wrong)}")
    if state["step"] > recipe.steps:
        raise ValueError(f"steps must be at least the {state['step']} that are done, got {recipe.steps}")
