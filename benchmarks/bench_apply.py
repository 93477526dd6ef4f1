"""What `gpt2_kernels.apply` costs the host: modules before and after it, at a size where call overhead dominates.

Timed by the wall clock, so that a GPU's queue hides nothing: 8 tokens of width 768 keep no device busy.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import gpt2_kernels
from benchmarks.measure import Bind, Case, Run, against, forward
from benchmarks.timing import Call

WIDTH, HEADS = 768, 12


def _attend(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return module(x, x, x, need_weights=False, attn_mask=mask, is_causal=True)[0]

    return call


def modules(width: int, heads: int) -> dict[str, tuple[nn.Module, Callable[[nn.Module], Callable[[Tensor], Tensor]]]]:
    """Name -> a module, and how to call it on x (B, T, width)."""

    def direct(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return module

    found: dict[str, Any] = {
        "LayerNorm": (nn.LayerNorm(width), direct),
        "MultiheadAttention": (nn.MultiheadAttention(width, heads, batch_first=True), _attend),
        "TransformerEncoderLayer": (
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True),
            direct,
        ),
    }
    if importlib.util.find_spec("transformers") is not None:
        from transformers import GPT2Config, GPT2Model

        # The model around the layer makes the masks: without the model, apply leaves the attention alone.
        sizes: dict[str, Any] = dict(
            n_embd=width, n_head=heads, n_layer=1, vocab_size=1, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        config = GPT2Config(**sizes, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, attn_implementation="sdpa")
        found["transformers' GPT-2 of a layer"] = (GPT2Model(config), of_embeddings)
    return found


def of_embeddings(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(inputs_embeds=x, use_cache=False).last_hidden_state


def training(module: nn.Module, call: Callable[[Tensor], Tensor]) -> Bind:
    """Forward and backward as in a training step: gradients of the input and of every parameter, left in .grad."""
    parameters = list(module.parameters())

    def bind(x: Tensor, grad: Tensor) -> Call:
        leaves = [x.detach().requires_grad_(), *parameters]

        def step() -> list[Tensor | None]:
            for leaf in leaves:
                leaf.grad = None
            with torch.enable_grad():
                call(leaves[0]).backward(grad)
            return [leaf.grad for leaf in leaves]

        return step

    return bind


def cases(run: Run) -> Iterator[Case]:
    width, heads = run.pick((WIDTH, HEADS), (WIDTH, HEADS), (32, 2))
    B, T = 1, 8
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        built = modules(width, heads)
    for name, (module, call_of) in built.items():
        plain = module.to(run.device, run.dtype)
        exact = copy.deepcopy(module).double()
        fused = copy.deepcopy(plain)
        assert gpt2_kernels.apply(fused).report.replaced, name
        read = sum(p.numel() * p.element_size() for p in plain.parameters())
        for direction in ("forward", "forward and backward"):
            inputs = 1 if direction == "forward" else 2  # x, and the gradient of the result

            def bind(module: nn.Module, call_of: Any = call_of, alone: bool = inputs == 1) -> Bind:
                return forward(call_of(module)) if alone else training(module, call_of(module))

            yield Case(
                name=f"apply {name} {direction} {B}x{T}x{width}",
                make=lambda inputs=inputs: tuple(run.random(B, T, width) for _ in range(inputs)),  # type: ignore[misc]
                rivals={"ours": bind(fused), "torch": bind(plain)},
                check=against(bind(exact)),
                moved=float(read * (1 if inputs == 1 else 3)),  # parameters read twice, their gradients written
                clock="wall",
            )


def test_speed(measured) -> None:
    assert measured.right, measured.why
