"""What a training run is: every choice that determines its result, checked before any work. No tensors here."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from gpt2.config import preset_or_folder


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training run. The first group determines the result; the second only how it is computed and monitored.

    A checkpoint keeps the first group, and a run continues with the same values, except for `steps`.
    """

    data: str  # a text file, or a folder of *.txt; documents are separated by lines of <|endoftext|>
    model: str | None = None  # preset or folder: shape and tokenizer of a fresh start; None is init's, or storybook's
    init: str | None = None  # preset or folder with the initial weights
    val_data: str | None = None  # text for the validation loss
    steps: int = 1000  # updates of the weights
    batch_size: int = 8  # sequences per update, over all processes
    context: int | None = None  # tokens per sequence; None is all the model's positions
    order: str = "random"  # or "sequential": order of the windows in each pass over the data
    optimizer: str = "adamw"  # or "muon": orthogonalised momentum for the blocks' matrices, AdamW for the rest
    lr: float = 6e-4  # the peak learning rate
    schedule: str = "cosine"  # or "trapezoid": constant, then a line to min_lr over the last 35 % of the steps
    min_lr: float = 0.0  # the final learning rate
    warmup: int | None = None  # steps over which the rate rises; None is a twentieth of all, at most 100
    weight_decay: float = 0.1  # of matrices; biases and layer norms have none
    clip: float = 1.0  # largest gradient norm; 0 is off
    dtype: str | None = None  # arithmetic: "float32" (None: on a CPU), "bfloat16" (None: on a GPU); weights are float32
    seed: int = 1  # of the initial weights and of the order

    micro_batch: int | None = None  # sequences a process computes at a time; None is the largest divisor up to 8
    parallel: str = "ddp"  # with several processes: weights replicated, or "fsdp": sharded
    save_every: int = 100  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept, besides the best
    eval_every: int | None = None  # steps between validations and samples; None is as often as checkpoints
    log_every: int = 10  # steps between progress lines
    checkpoint_activations: bool = False  # recompute a block's activations for its gradient instead of keeping them
    compile: bool = False  # torch.compile

    def __post_init__(self) -> None:
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and _FIELDS[name].default is None:
                continue
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2^63, got {self.seed}")
        for name in ("lr", "min_lr", "weight_decay", "clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must be at most lr ({self.lr}), got {self.min_lr}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices and not (name == "dtype" and self.dtype is None):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise ValueError("optimizer must be adamw with parallel fsdp: muon needs whole matrices, got 'muon'")
        for name in ("model", "init"):
            if getattr(self, name) is not None:
                preset_or_folder(getattr(self, name), f"--{name}")
        for name in ("data", "val_data"):
            text = getattr(self, name)
            if text is not None and not Path(text).exists():
                raise ValueError(f"{name} must exist, got {text!r}")

    def rate(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        warmup = min(100, self.steps // 20) if self.warmup is None else self.warmup
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "cosine":
            share = (step - warmup) / max(1, self.steps - warmup)
            return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        left = min(1.0, (self.steps - step) / (COOLING * self.steps))
        return self.min_lr + (self.lr - self.min_lr) * left

    def sequences_at_a_time(self, processes: int) -> int:
        """How many sequences each of `processes` computes at a time. Raises ValueError if the batch does not divide."""
        if self.batch_size % processes:
            raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {self.batch_size}")
        share = self.batch_size // processes
        if self.micro_batch is None:
            return max(n for n in range(1, min(share, 8) + 1) if share % n == 0)
        if share % self.micro_batch:
            raise ValueError(f"micro_batch must divide the {share} sequences of each process, got {self.micro_batch}")
        return self.micro_batch

    def decisive(self) -> dict[str, Any]:
        """The values that a run and its continuation share. Paths are left out: their contents are compared instead."""
        left_out = ("data", "val_data", "model", "init", "steps")
        return {f: getattr(self, f) for f in list(_FIELDS)[: list(_FIELDS).index("micro_batch")] if f not in left_out}


COOLING = 0.35  # share of a trapezoid's steps over which the rate falls
CHOICES = {
    "order": ("random", "sequential"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "trapezoid"),
    "dtype": ("float32", "bfloat16"),
    "parallel": ("ddp", "fsdp"),
}
_INTEGERS = {
    "steps": 1, "batch_size": 1, "context": 1, "warmup": 0, "seed": 0, "micro_batch": 1, "save_every": 1, "keep": 1,
    "eval_every": 1, "log_every": 1,
}  # fmt: skip
_TOKENS = {"data", *(f"data/{name}.{end}" for name in ("train", "val") for end in ("tokens", "json", "tmp"))}
_FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}


def check_out(out: str | os.PathLike[str], resume: bool) -> Path:
    """The run's folder, which must be new or empty unless the run is to be resumed.

    The tokens of a run that never began (its data was too short, say) are no obstacle.
    """
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out must be a folder, got the file {path}")
    if not resume and path.is_dir() and any(str(p.relative_to(path)) not in _TOKENS for p in path.rglob("*")):
        raise ValueError(f"--out must be empty or new ({path} holds something; --resume continues a run)")
    return path
