"""A training step (loss, gradients, AdamW) against a compiled model in nanoGPT's form and against transformers.

    pytest benchmarks/bench_training.py

A step of B x T tokens costs about (6 weights + 6 L C T) B T floating-point operations, which
`gpt2.training.flops_per_token` counts; each result says how many it reached and what share that is of a square
product's, measured in the same process. On a GPU the 124M shape in bfloat16 with float32 weights; on a CPU two small
ones in float32. All three start from the same weights, see the same random tokens, and must agree on the loss before
they are timed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2 import GPT2Config, data, training
from gpt2.parallel import World
from gpt2.recipe import Recipe

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
LR = 1e-4


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    config: GPT2Config
    batch: int
    context: int


SHAPES = (
    [Shape("124M B=64 T=1024", GPT2Config(), 64, 1024)]
    if GPU
    else [
        Shape("storybook B=2 T=256", GPT2Config(4096, 1024, 256, 5, 4, eos_token_id=4095), 2, 256),
        Shape("2 layers of 768 B=1 T=256", GPT2Config(8192, 1024, 768, 2, 12, eos_token_id=8191), 1, 256),
    ]
)


class Plain(nn.Module):
    """GPT-2 as nanoGPT writes it: PyTorch's layers and fused attention, the logits whole, for torch.compile to fuse."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        c = config.n_embd
        self.heads = config.n_head
        self.wte, self.wpe = nn.Embedding(config.vocab_size, c), nn.Embedding(config.n_positions, c)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(c),
                    "attn": nn.ModuleDict({"c_attn": nn.Linear(c, 3 * c), "c_proj": nn.Linear(c, c)}),
                    "ln_2": nn.LayerNorm(c),
                    "mlp": nn.ModuleDict({"c_fc": nn.Linear(c, 4 * c), "c_proj": nn.Linear(4 * c, c)}),
                }
            )
            for _ in range(config.n_layer)
        )
        self.ln_f = nn.LayerNorm(c)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            heads = block["attn"]["c_attn"](block["ln_1"](x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
            q, k, v = (t.transpose(1, 2) for t in heads)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + block["attn"]["c_proj"](y)
            hidden = F.gelu(block["mlp"]["c_fc"](block["ln_2"](x)), approximate="tanh")
            x = x + block["mlp"]["c_proj"](hidden)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def steps_of(loss: Callable[[Tensor, Tensor], Tensor], parameters: dict[str, Tensor], recipe: Recipe) -> Any:
    """What rivals do in a step: autocast to the arithmetic's type, and the same optimizer and clipping."""
    (optimizer,) = training.optimizers(parameters, recipe)

    def step(x: Tensor, y: Tensor) -> float:
        with torch.autocast(DEVICE.type, DTYPE, enabled=DTYPE != torch.float32):
            value = loss(x, y)
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(float(norm))  # waits for the device, as the trainer does
        return float(value.detach())

    return step


def compiled_plain(ours: training.Trainer, recipe: Recipe) -> Any:
    model = Plain(ours.config).to(DEVICE)
    model.load_state_dict({name: p.detach().clone() for name, p in ours.parameters.items()})
    return steps_of(torch.compile(model), dict(model.named_parameters()), recipe)


def transformers(ours: training.Trainer, recipe: Recipe) -> Any:
    library = pytest.importorskip("transformers")
    options = ours.config.to_json() | {"use_cache": False}
    model = library.GPT2LMHeadModel(library.GPT2Config(**options)).to(DEVICE).train()
    state = {}
    for name, parameter in ours.parameters.items():
        turned = parameter.dim() == 2 and name.startswith("h.")  # its matrices are (in, out)
        state[f"transformer.{name}"] = (parameter.T if turned else parameter).detach().clone()
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = model(x).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    return steps_of(loss, dict(model.named_parameters()), recipe)


@functools.cache
def ceiling() -> float:
    return training.matmul_ceiling(DEVICE, DTYPE)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("implementation", ["gpt2_kernels", "compiled plain", "transformers"])
def test_training_step(benchmark: Any, tmp_path: Path, implementation: str, shape: Shape) -> None:
    dtype = str(DTYPE).removeprefix("torch.")
    recipe = Recipe(
        data=str(tmp_path), batch_size=shape.batch, micro_batch=shape.batch, context=shape.context, steps=10_000, lr=LR,
        warmup=0, dtype=dtype,
    )  # fmt: skip
    random = np.random.default_rng(0)
    tokens = random.integers(0, shape.config.vocab_size, 64 * shape.batch * shape.context + 1)
    windows = data.Windows(tokens.astype(np.uint16), shape.context, "sequential", seed=1)
    ours = training.Trainer(recipe, shape.config, windows, World(0, 1, DEVICE))
    batches = [tuple(t.to(DEVICE) for t in windows.batch(i * shape.batch, shape.batch)) for i in range(63)]
    with torch.no_grad():
        expected = float(ours.model.loss(*batches[0]))

    if implementation == "gpt2_kernels":

        def step(x: Tensor, y: Tensor) -> float:
            return ours.update()[0]  # takes the same batches by itself

    else:
        build = {"compiled plain": compiled_plain, "transformers": transformers}[implementation]
        step = build(ours, recipe)
    assert step(*batches[0]) == pytest.approx(expected, rel=1e-4 if DTYPE == torch.float32 else 2e-2)
    following = iter(batches[1:])
    for _ in range(2):
        step(*next(following))

    benchmark.group = f"training step, {shape.name}"
    benchmark.pedantic(lambda: step(*next(following)), rounds=20 if GPU else 12)

    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    tokens_a_second = shape.batch * shape.context / seconds
    flops = tokens_a_second * training.flops_per_token(shape.config, shape.context)
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if GPU else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": dtype,
        "tokens_per_second": round(tokens_a_second),
        "gflops": round(flops / 1e9, 1),
        "of_matmul": round(flops / ceiling(), 3),
    }
