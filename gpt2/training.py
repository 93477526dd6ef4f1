"""Training a GPT-2: the loop, what it updates, and what it keeps.

    weights (float32) -> rounded to the arithmetic's type -> loss and gradients -> float32 gradients -> optimizer

One update takes `batch_size` windows of the data, some at a time and shared among the processes; their gradients add up
to that of the mean over all their tokens, however they were divided. What update n sees and does depends on the recipe,
n, and the state after update n - 1 alone, all of which a checkpoint holds: an interrupted run goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint as recompute

from gpt2 import checkpoint, data, parallel, weights
from gpt2.config import PRESETS, GPT2Config, preset_or_folder
from gpt2.engine import Engine
from gpt2.model import GPT2
from gpt2.parallel import World, share, whole
from gpt2.recipe import Recipe
from gpt2.sampling import SamplingParams
from gpt2.tokenizer import load_tokenizer, save_tokenizer

SAMPLE_TOKENS = 48


def train(recipe: Recipe, out: Path, *, resume: bool = False, device: str | None = None) -> int:
    """Run `recipe` in the folder `out`; the result is `out`/final, a Hugging Face folder.

    With `resume` it goes on from the newest whole checkpoint there, or starts where there is none. SIGTERM and SIGINT
    save a checkpoint and end the run. Returns the exit status: 0, or 128 + the signal's number.
    Raises ValueError or OSError, having lost nothing but the steps since the last checkpoint.
    """
    recipe.sequences_at_a_time(parallel.processes())  # before the processes look for each other
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
        logged, since, last_step = trainer.step, time.perf_counter(), recipe.steps
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
        """The validation loss, where there is text for it, and a sample; both go to the metrics."""
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
            model = _filled(trainer.config, tensors["model"], torch.float32)
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
        """Leave out what was recorded after the checkpoint that the run goes on from: it is recorded again."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            draft = path.with_suffix(".tmp")
            kept = [json.dumps(m, ensure_ascii=False) + "\n" for m in _metrics(path) if m["step"] <= step]
            draft.write_text("".join(kept), encoding="utf-8")
            draft.replace(path)


class Trainer:
    """Model, optimizer and data of a run, `step` updates after its start."""

    def __init__(self, recipe: Recipe, config: GPT2Config, windows: data.Windows, world: World) -> None:
        self.recipe, self.config, self.windows, self.world = recipe, config, windows, world
        self.step = 0
        self.at_a_time = recipe.sequences_at_a_time(world.size)
        self.dtype = getattr(torch, recipe.dtype or "float32")
        torch.manual_seed(recipe.seed)
        if recipe.init is None:
            self.model = GPT2(config).to(world.device)
        else:
            self.model = GPT2.from_pretrained(recipe.init, device=world.device, dtype=torch.float32)
        self.model.train()
        sharded = world.size > 1 and recipe.parallel == "fsdp"
        if recipe.checkpoint_activations:
            for block in self.model.h:
                block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
        if sharded:
            parallel.shard(self.model, world, self.dtype)
        elif self.dtype != torch.float32:
            _compute_in(self.model, self.dtype)
        self.parameters = {_plain(name): p for name, p in self.model.named_parameters()}
        self.objective: Any = _Objective(self.model)
        if recipe.compile:
            self.objective = torch.compile(self.objective)
        if world.size > 1 and not sharded:
            self.objective = DistributedDataParallel(self.objective)
        self.optimizers = optimizers(self.parameters, recipe)

    def update(self, stop: int = 0) -> tuple[float, float, int]:
        """One step: its loss, the length of its gradient, and the largest `stop` that any process was called with.

        Raises FloatingPointError, before the weights are touched, where the gradient is not finite.
        """
        recipe, world = self.recipe, self.world
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = recipe.rate(self.step)
        start = self.step * recipe.batch_size
        targets = self.windows.targets(start, recipe.batch_size)
        share_of_batch = recipe.batch_size // world.size
        first = start + world.rank * share_of_batch
        total = torch.zeros((), device=world.device)
        for i in range(0, share_of_batch, self.at_a_time):
            x, y = (t.to(world.device) for t in self.windows.batch(first + i, self.at_a_time))
            counted = self.windows.targets(first + i, self.at_a_time)
            last = i + self.at_a_time == share_of_batch
            wait = isinstance(self.objective, DistributedDataParallel) and not last
            with self.objective.no_sync() if wait else contextlib.nullcontext():
                loss = self.objective(x, y) * (counted / targets)
                (loss * world.size).backward()  # gradients are averaged over the processes, and should be added
            total += loss.detach()
        norm = float(whole(nn.utils.clip_grad_norm_(self.parameters.values(), recipe.clip or math.inf)))
        loss_sum, stops, signals = world.sum(float(total), float(stop > 0), float(stop))
        if not math.isfinite(loss_sum) or not math.isfinite(norm):
            self._clear()
            got = f"loss {loss_sum} and a gradient of length {norm} at step {self.step + 1}"
            raise FloatingPointError(f"the loss must be finite, got {got}")
        for optimizer in self.optimizers:
            optimizer.step()
        self._clear()
        self.step += 1
        return loss_sum, norm, round(signals / stops) if stops else 0

    def _clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, tokens: np.ndarray) -> float:
        """Mean loss in nats of every token of a text but the first, in consecutive windows."""
        total, count = 0.0, 0
        for x, y in data.consecutive(tokens, self.windows.context, self.at_a_time * self.world.size):
            mine = slice(self.world.rank * self.at_a_time, (self.world.rank + 1) * self.at_a_time)
            loss = self.model.loss(x[mine].to(self.world.device), y[mine].to(self.world.device))
            counted = int((y[mine] != data.IGNORED).sum())
            total, count = total + (float(loss) * counted if counted else 0.0), count + counted
        total, tokens_seen = self.world.sum(total, float(count))
        return total / tokens_seen

    def snapshot(self) -> GPT2 | None:
        """The model in the arithmetic's type, in process 0; None in the others, which must call it too."""
        tensors = {name: _kept(p.detach(), self.world) for name, p in self.parameters.items()}
        if self.world.rank:
            return None
        return _filled(self.config, tensors, self.dtype).to(self.world.device).eval()

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, whole and on the CPU in process 0. Every process must call it."""
        return {
            "model": {name: _kept(p.detach(), self.world) for name, p in self.parameters.items()},
            "optimizers": [
                {
                    index: {k: _kept(v, self.world) if isinstance(v, Tensor) else v for k, v in values.items()}
                    for index, values in optimizer.state_dict()["state"].items()
                }
                for optimizer in self.optimizers
            ],
            "random": torch.get_rng_state(),
        }

    def restore(self, folder: Path, step: int) -> None:
        """Be where the checkpoint in `folder` was made, after `step` steps."""
        source = GPT2.from_pretrained(folder, device="cpu", dtype=torch.float32)
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, tensor in source.named_parameters():
                self.parameters[name].copy_(share(tensor, self.parameters[name]))
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            values = {
                index: {k: share(v, parameters[index]) if _is_moment(v) else v for k, v in entry.items()}
                for index, entry in saved.items()
            }
            optimizer.load_state_dict({**optimizer.state_dict(), "state": values})
        torch.set_rng_state(state["random"])
        self.step = step


class _Objective(nn.Module):
    """The loss as a module's forward, which DDP and torch.compile wrap."""

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(tokens, targets)


class _Rounded(nn.Module):
    """A parameter as the arithmetic sees it; its gradient comes back in the parameter's own type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    for module in list(model.modules()):
        for name, _ in list(module.named_parameters(recurse=False)):
            parametrize.register_parametrization(module, name, _Rounded(dtype), unsafe=True)


def _plain(name: str) -> str:
    """A parameter's name without what parametrization adds."""
    return name.replace("parametrizations.", "").removesuffix(".original")


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _kept(tensor: Tensor, world: World) -> Tensor:
    """The whole of a tensor, a copy on the CPU in process 0; the other processes let go of it."""
    full = whole(tensor)
    return full.detach().to("cpu", copy=True) if world.rank == 0 else full.new_empty(0)


def _filled(config: GPT2Config, tensors: dict[str, Tensor], dtype: torch.dtype) -> GPT2:
    with torch.device("meta"):
        model = GPT2(config)
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))
    return model


def optimizers(parameters: Mapping[str, Tensor], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW with weight decay for matrices alone; or Muon for the matrices of the blocks, and AdamW for the rest.

    Muon (Jordan et al., 2024) with steps of AdamW's size (Liu et al., 2025), so that one learning rate serves both.
    """
    hidden = [n for n, p in parameters.items() if p.dim() == 2 and n.startswith("h.") and recipe.optimizer == "muon"]
    rest = {n: p for n, p in parameters.items() if n not in set(hidden)}
    groups = [
        {"params": [p for p in rest.values() if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)]
    if hidden:
        matrices = [parameters[name] for name in hidden]
        decay, adjust = recipe.weight_decay, "match_rms_adamw"
        found.append(torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=decay, adjust_lr_fn=adjust))
    return found


def flops_per_token(config: GPT2Config, context: int) -> float:
    """Of forward and backward: 6 for each weight of a product, and causal attention's 12 L C T / 2."""
    weights = config.num_parameters - config.n_positions * config.n_embd  # the embedding is the output's matrix too
    return 6 * weights + 6 * config.n_layer * config.n_embd * context


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few square products of random numbers: what a step is measured against."""
    size = 8192 if device.type == "cuda" else 1024
    random = torch.Generator(device).manual_seed(0)  # the run's own numbers are left as they are
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
    """Draw the losses, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("val_loss", "validation")):
        points = [(m["step"], m[key]) for m in _metrics(metrics) if key in m]
        if points:
            axes.plot(*zip(*points), label=label)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    figure.savefig(image, dpi=150)


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file that are whole: the last may have been cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that asked to end the run; a second SIGINT ends it at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
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
    """The shape and the tokenizer of a run. Raises ValueError where `model`, `init` and tokenizer do not fit."""

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
    """A run goes on as it began. Raises ValueError naming what differs."""
    now = {**recipe.decisive(), **dataclasses.asdict(config)}
    then = {**state["recipe"], **state["config"]}
    if wrong := [f"{key} was {then.get(key)!r}, got {value!r}" for key, value in now.items() if then.get(key) != value]:
        raise ValueError(f"--resume must go on as the run began: {'; '.join(wrong)}")
    if state["step"] > recipe.steps:
        raise ValueError(f"steps must be at least the {state['step']} that are done, got {recipe.steps}")
