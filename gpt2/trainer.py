"""What a training run updates: model, optimizer and data, one step at a time.

    weights (float32) -> rounded to the compute dtype -> loss and gradients -> float32 gradients -> optimizer

One update takes `batch_size` windows of the data, a few at a time and divided among the processes; their gradients add
up to that of the mean loss over all their tokens, however they were divided. What update n sees and does depends only
on the recipe, n, and the state after update n - 1.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint as recompute

from gpt2 import data, parallel
from gpt2.config import GPT2Config
from gpt2.model import GPT2
from gpt2.parallel import World, share, whole
from gpt2.recipe import Recipe

STOPS = (signal.SIGINT, signal.SIGTERM)  # the signals that end a run after the step, with a checkpoint


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
        if isinstance(self.objective, DistributedDataParallel):
            self._settle_buckets()

    def update(self, stop: int = 0) -> tuple[float, float, int]:
        """One step: its loss, the norm of its gradient, and the largest `stop` that any process was called with, a
        signal of STOPS or 0.

        Raises FloatingPointError, before the weights are touched, if the gradient is not finite.
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
            x, y = (self._on_device(t) for t in self.windows.batch(first + i, self.at_a_time))
            counted = self.windows.targets(first + i, self.at_a_time)
            last = i + self.at_a_time == share_of_batch
            wait = isinstance(self.objective, DistributedDataParallel) and not last
            with self.objective.no_sync() if wait else contextlib.nullcontext():
                loss = self.objective(x, y) * (counted / targets)
                (loss * world.size).backward()  # gradients are averaged over the processes, but should be summed
            total += loss.detach()
        norm = float(whole(nn.utils.clip_grad_norm_(self.parameters.values(), recipe.clip or math.inf)))
        loss_sum, *asked = world.sum(float(total), *(float(stop == number) for number in STOPS))
        if not math.isfinite(loss_sum) or not math.isfinite(norm):
            self._clear()
            got = f"loss {loss_sum} and a gradient of length {norm} at step {self.step + 1}"
            raise FloatingPointError(f"the loss must be finite, got {got}")
        for optimizer in self.optimizers:
            optimizer.step()
        self._clear()
        self.step += 1
        return loss_sum, norm, max((number for number, processes in zip(STOPS, asked) if processes), default=0)

    def _on_device(self, tokens: Tensor) -> Tensor:
        """The tokens on the device; to a GPU through pinned memory, so that the host does not wait."""
        if self.world.device.type == "cpu":
            return tokens
        return tokens.pin_memory().to(self.world.device, non_blocking=True)

    def _settle_buckets(self) -> None:
        """Run a backward pass and drop its gradients, so that DDP adds in one order from the first update on.

        DDP reduces gradients in buckets, and rebuilds the buckets after the first backward pass. A gradient's place in
        its bucket decides the order in which three or more processes add it: without this, the update after a --resume
        would differ from the same one in a run that was never interrupted.
        """
        tokens = torch.zeros((self.at_a_time, self.windows.context), dtype=torch.int64, device=self.world.device)
        self.objective(tokens, tokens).backward()
        self._clear()

    def _clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, tokens: np.ndarray) -> float:
        """Mean loss in nats over every token of a text but the first, in consecutive windows."""
        total, count = 0.0, 0
        for x, y in data.consecutive(tokens, self.windows.context, self.at_a_time * self.world.size):
            mine = slice(self.world.rank * self.at_a_time, (self.world.rank + 1) * self.at_a_time)
            loss = self.model.loss(self._on_device(x[mine]), self._on_device(y[mine]))
            counted = int((y[mine] != data.IGNORED).sum())
            total, count = total + (float(loss) * counted if counted else 0.0), count + counted
        total, tokens_seen = self.world.sum(total, float(count))
        return total / tokens_seen

    def snapshot(self) -> GPT2 | None:
        """The model in the compute dtype, in process 0; None in the others, which must call it too."""
        tensors = {name: _kept(p.detach(), self.world) for name, p in self.parameters.items()}
        if self.world.rank:
            return None
        return filled(self.config, tensors, self.dtype).to(self.world.device).eval()

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, gathered on the CPU in process 0. Every process must call it."""
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
        """Restore the state of the checkpoint in `folder`, made after `step` steps."""
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
    """A parameter in the compute dtype; its gradient comes back in the parameter's own dtype."""

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
    """A copy of the full tensor on the CPU, in process 0; the other processes get an empty one."""
    full = whole(tensor)
    return full.detach().to("cpu", copy=True) if world.rank == 0 else full.new_empty(0)


def filled(config: GPT2Config, tensors: dict[str, Tensor], dtype: torch.dtype) -> GPT2:
    """A model with these weights, converted to `dtype` and without gradients."""
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
