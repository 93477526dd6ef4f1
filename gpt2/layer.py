"""One layer of GPT-2 on the operators of `gpt2_kernels`: its modules, and how it runs over a paged cache.

`Block` leaves attention to its caller: for generation that is `attend_paged`. On a CPU the whole layer may be one call,
`in_one_call`, if `plain_block` finds that nothing has changed what the block computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gpt2_kernels as ops
from gpt2.config import GPT2Config

Attend = Callable[[Tensor], Tensor]  # qkv (..., 3, H, D) -> (..., H, D)

# How `gpt2_kernels.linear` multiplies. Prompt tokens and generated tokens each have a fixed order of additions,
# whatever else is in the batch; training needs none.
Products = Mapping[str, Any]
PROMPT: Products = {}
DECODE: Products = {"decode": True}
TRAINING: Products = {"batch_invariant": False}


@dataclasses.dataclass(frozen=True)
class PagedBatch:
    """Packed tokens of S sequences, and where their keys and values lie. All tensors on the model's device."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, of each token in its own sequence
    slots: Tensor  # (N,) int64, where each token's key and value go
    block_table: Tensor  # (S, max_blocks) int32
    context_lens: Tensor  # (S,) int32, tokens in the cache once these are written
    cu_seqlens: Tensor  # (S + 1,) int32, first row of each sequence
    max_seqlen: int  # most rows of one sequence; 1 means decode


class LayerCache(NamedTuple):
    """The paged cache of one layer; scales (H,) float32 where it is float8_e4m3fn."""

    keys: Tensor  # (num_blocks, block_size, H, D)
    values: Tensor  # (num_blocks, block_size, H, D)
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


class SelfAttention(nn.Module):
    """The two projections around attention."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads = (3, config.n_head, config.head_dim)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, residual: Tensor, attend: Attend, products: Products = PROMPT) -> Tensor:
        qkv = linear(self.c_attn, x, products).unflatten(-1, self.heads)  # (..., 3, H, D)
        return linear(self.c_proj, attend(qkv).flatten(-2), products, residual=residual)


class MLP(nn.Module):
    """The weights of the GELU MLP."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd)

    def forward(self, x: Tensor, residual: Tensor, products: Products = PROMPT) -> Tensor:
        w1, w2 = self.c_fc, self.c_proj
        if "weight_scale" in w1._buffers:  # int8
            hidden = linear(w1, x, activation="gelu_tanh" if self.approximate == "tanh" else "gelu")
            return linear(w2, hidden, residual=residual)
        return ops.gelu_mlp(
            x,
            w1.weight,
            w1.bias,
            w2.weight,
            w2.bias,
            approximate=self.approximate,
            residual=residual,
            **products,
        )


class Block(nn.Module):
    """One layer: attention, then MLP, each applied to a normalised copy of the residual stream and added to it."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Attend, products: Products = PROMPT) -> Tensor:
        normed, x = normalize(self.ln_1, x, prenorm=True)
        x = self.attn(normed, x, attend, products)
        normed, x = normalize(self.ln_2, x, prenorm=True)
        return self.mlp(normed, x, products)


def linear(layer: nn.Module, x: Tensor, products: Products = PROMPT, **epilogue: Any) -> Tensor:
    """The product with a layer's weight, plus its bias if it has one; in int8 if `GPT2.quantize_` made it so."""
    weight: Any = layer.weight
    bias = getattr(layer, "bias", None)
    if weight.dtype == torch.int8:
        return ops.linear_int8(x, weight, layer.get_buffer("weight_scale"), bias, **epilogue)
    return ops.linear(x, weight, bias, **products, **epilogue)


def normalize(norm: nn.LayerNorm, x: Tensor, **options: Any) -> Any:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, **options)


def attend_paged(qkv: Tensor, *, batch: PagedBatch, cache: LayerCache, scale: float) -> Tensor:
    """Attention (N, H, D) over what the cache holds and the new tokens, whose keys and values are written to it."""
    q, k, v = qkv.unbind(-3)  # three views, no copy
    scales: dict[str, Any] = {}
    if cache.key_scale is not None:
        scales = {"k_scale": cache.key_scale, "v_scale": cache.value_scale}
    if batch.max_seqlen == 1:
        where = batch.slots, batch.block_table, batch.context_lens
        return ops.paged_decode_(q, k, v, cache.keys, cache.values, *where, scale=scale, **scales)
    ops.append_kv_(k, v, cache.keys, cache.values, batch.slots, **scales)
    return ops.paged_attention(
        q,
        cache.keys,
        cache.values,
        batch.block_table,
        batch.context_lens,
        batch.cu_seqlens,
        batch.max_seqlen,
        scale=scale,
        **scales,
    )


class PlainBlock(NamedTuple):
    """What `ops.paged_layer_` needs of a block."""

    weights: list[Tensor]
    scales: list[Tensor]  # of int8 weights
    activation: str


_FORWARDS = {kind: kind.forward for kind in (Block, SelfAttention, MLP, nn.Linear, nn.LayerNorm)}


def _untouched(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling a module still means its class's own `forward` and nothing else."""
    return (
        type(module) is kind
        and kind.forward is _FORWARDS[kind]
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def plain_block(block: Any, heads: tuple[int, ...], eps: float) -> PlainBlock | None:
    """The tensors of a block; None if it has been made to compute anything other than `Block` does.

    Called at every token, so it reads modules' dictionaries: attribute access is ten times slower.
    """
    if not _untouched(block, Block):
        return None
    attn, mlp = block._modules.get("attn"), block._modules.get("mlp")
    if not _untouched(attn, SelfAttention) or not _untouched(mlp, MLP) or attn.heads != heads:
        return None
    norms = [block._modules.get(name) for name in ("ln_1", "ln_2")]
    places = ((attn, "c_attn"), (attn, "c_proj"), (mlp, "c_fc"), (mlp, "c_proj"))
    linears = [part._modules.get(name) for part, name in places]
    if not all(_untouched(m, nn.LayerNorm) and m.eps == eps for m in norms):
        return None
    if not all(_untouched(m, nn.Linear) for m in linears):
        return None
    layers = (norms[0], *linears[:2], norms[1], *linears[2:])
    weights = [m._parameters.get(name) for m in layers for name in ("weight", "bias")]
    if any(w is None or w.stride(-1) != 1 for w in weights):
        return None
    scales = [m._buffers.get("weight_scale") for m in linears if m._parameters["weight"].dtype == torch.int8]
    if scales and (len(scales) < len(linears) or any(s is None for s in scales)):
        return None
    return PlainBlock(weights, scales, "gelu_tanh" if mlp.approximate == "tanh" else "gelu")


def in_one_call(
    x: Tensor, block: PlainBlock, batch: PagedBatch, cache: LayerCache, *, scale: float, eps: float
) -> Tensor:
    """What `block(x, attend_paged)` computes, bit for bit, if `ops.has_paged_layer`."""
    return ops.paged_layer_(
        x,
        block.weights,
        cache.keys,
        cache.values,
        batch.slots,
        batch.block_table,
        batch.context_lens,
        batch.cu_seqlens,
        scale=scale,
        eps=eps,
        activation=block.activation,
        weight_scales=block.scales,
    )
