"""A training step (loss, gradients, clipping, AdamW): the trainer's, against GPT-2 in plain PyTorch and transformers.

Weights are float32; arithmetic on a GPU is bfloat16, by autocast in the rivals. All start from the same weights, see
the same tokens and use the same optimizer; loss and gradient norm of the first step are checked against float64.
FLOPs are those of `gpt2.training.flops_per_token`: 6 per weight and token, plus attention's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.bench_engine import TINY
from benchmarks.measure import Case, Inputs, Run, error
from benchmarks.timing import Call
from gpt2 import GPT2, PRESETS, GPT2Config, data, training
from gpt2.parallel import World
from gpt2.recipe import Recipe
from gpt2.trainer import Trainer, optimizers

Result = tuple[float, float]  # the loss, and its gradient norm
TWO_LAYERS = GPT2Config(vocab_size=8192, n_layer=2, n_head=12, n_embd=768, eos_token_id=8191)  # of the 124M model
CONFIGS = {**PRESETS, "tiny": TINY, "2 layers of 768": TWO_LAYERS}


def make(run: Run, name: str, B: int, T: int) -> Inputs:
    """(recipe, config, random tokens in windows, device)."""
    dtype = str(run.dtype).removeprefix("torch.")
    recipe = Recipe(data="", batch_size=B, micro_batch=B, context=T, steps=100_000, lr=1e-4, warmup=0, dtype=dtype)
    config = CONFIGS[name]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 16 * B * T + 1).astype(np.uint16)
    return recipe, config, data.Windows(tokens, T, "sequential", seed=1), run.device


def model_of(recipe: Recipe, config: GPT2Config, device: torch.device) -> GPT2:
    torch.manual_seed(recipe.seed)  # as the trainer does
    return GPT2(config).to(device)


def ours(recipe: Recipe, config: GPT2Config, windows: data.Windows, device: torch.device) -> Call:
    trainer = Trainer(recipe, config, windows, World(0, 1, device))

    def call() -> Result:
        with torch.enable_grad():
            return trainer.update()[:2]

    return call


def step(build: Callable[[GPT2], tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]]) -> Callable[..., Call]:
    """A rival's step; `build` makes its module and loss from a model with the initial weights."""

    def bind(recipe: Recipe, config: GPT2Config, windows: data.Windows, device: torch.device) -> Call:
        module, loss = build(model_of(recipe, config, device))
        parameters = dict(module.named_parameters())
        (optimizer,) = optimizers(parameters, recipe)
        batches = [windows.batch(i * recipe.batch_size, recipe.batch_size) for i in range(8)]
        done = 0

        def call() -> Result:
            nonlocal done
            x, y = (t.to(device) for t in batches[done % len(batches)])
            with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                value = loss(x, y)
                value.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
            return float(value.detach()), float(norm)  # waits for the device, as the trainer does

        return call

    return bind


def plain(model: GPT2) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    return model, lambda x, y: peers.plain_loss(model, x, y)


def compiled(model: GPT2) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    return model, torch.compile(lambda x, y: peers.plain_loss(model, x, y), dynamic=False)


def transformers(model: GPT2) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    other = peers.Transformers(model).model
    return other, lambda x, y: nn.functional.cross_entropy(other(x).logits.flatten(0, 1).float(), y.flatten())


def check(inputs: Inputs, result: Result) -> float:
    """One sequence at a time, so that float64 fits."""
    recipe, config, windows, device = inputs
    truth = copy.deepcopy(model_of(recipe, config, device)).double()
    x, y = (t.to(device) for t in windows.batch(0, recipe.batch_size))
    total = 0.0
    for row, target in zip(x, y):
        with torch.enable_grad():
            loss = peers.plain_loss(truth, row[None], target[None]) / len(x)
            loss.backward()
        total += loss.item()
    norm = nn.utils.get_total_norm([p.grad for p in truth.parameters() if p.grad is not None])
    return max(error([torch.tensor(a)], [torch.tensor(b)]) for a, b in zip(result, (total, norm.item())))


def cases(run: Run) -> Iterator[Case]:
    large = run.device.type == "cuda" and torch.cuda.get_device_properties(run.device).total_memory > 100 << 30
    gpu = [("gpt2", 64 if large else 32, 1024)]
    for name, B, T in run.pick(gpu, [("storybook", 2, 256), ("2 layers of 768", 1, 256)], [("tiny", 2, 16)]):
        rivals: dict[str, Any] = {"ours": ours, "torch": step(plain), "transformers": step(transformers)}
        if run.sizes != "tiny":
            rivals["compiled"] = step(compiled)
        yield Case(
            name=f"training step {name} {B}x{T}",
            make=lambda name=name, B=B, T=T: make(run, name, B, T),
            rivals=rivals,
            check=check,
            flops=B * T * training.flops_per_token(CONFIGS[name], T),
            units=B * T,
            clock="wall",
            whole=True,
        )


def test_speed(measured) -> None:
    assert measured.right, measured.why
