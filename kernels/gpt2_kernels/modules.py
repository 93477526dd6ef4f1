"""The three modules of a GPT block on the operators: each loads the state_dict of the plain module that it replaces.

Like `sdpa`, a layer above the operator files. Weights keep torch.nn.Linear's layout (out, in), and the names are those
of GPT-2's published checkpoints: c_fc and c_proj for the MLP, c_attn and c_proj for attention, so that a block written
in plain PyTorch after nanoGPT, and `gpt2.GPT2` itself, load as they are. (transformers' GPT-2 keeps the same names but
the transposed layout: transpose its weights on the way in. For torch.nn.Sequential(Linear, GELU, Linear) rename "0."
and "2." to "c_fc." and "c_proj.".)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpt2_kernels import _check
from gpt2_kernels.fused_attention import attention, attention_qkvpacked
from gpt2_kernels.gemm import gelu_mlp, linear
from gpt2_kernels.layernorm import MAX_WIDTH, layer_norm

Device = torch.device | str | int | None


def _positive(module: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            _check.fail(module, f"{name} must be at least 1", size)


def _added_apart(x: Tensor, residual: Tensor) -> bool:
    """Whether to add the residual outside the product, where autocast would round a float32 one to its dtype."""
    device = x.device.type
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
        return False
    return residual.dtype != torch.get_autocast_dtype(device)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last axis, of at most 16384 elements: same constructor, state_dict and result.

    Raises ValueError where normalized_shape has more than one axis.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if len(shape) != 1 or not 1 <= shape[0] <= MAX_WIDTH:
            _check.fail("LayerNorm", f"normalized_shape must be one axis in 1..{MAX_WIDTH}", shape)
        if not eps >= 0.0:
            _check.fail("LayerNorm", "eps must be at least 0", eps)
        super().__init__(list(shape), eps, elementwise_affine, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight = x.new_ones(self.normalized_shape) if self.weight is None else self.weight  # elementwise_affine=False
        return layer_norm(x, weight, self.bias, self.eps)


class GeluMLP(nn.Module):
    """gelu(x c_fc) c_proj + residual: x and residual (..., width) -> (..., width), the GELU in the first epilogue.

    Parameters: c_fc.weight (hidden, width), c_fc.bias (hidden,), c_proj.weight (width, hidden), c_proj.bias (width,),
    initialised as torch.nn.Linear's. approximate is "tanh" (GPT-2's) or "none" (erf). The residual stream may be passed
    in, to be added in the epilogue of the second product: mlp(norm(x), x) is x + mlp(norm(x)). Under autocast a float32
    stream stays float32, and is added separately. batch_invariant=False, for training, uses the fastest products.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        approximate: str = "tanh",
        bias: bool = True,
        batch_invariant: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _positive("GeluMLP", width=width, hidden=hidden)
        if approximate not in ("tanh", "none"):
            _check.fail("GeluMLP", "approximate must be 'tanh' or 'none'", repr(approximate))
        super().__init__()
        self.approximate, self.batch_invariant = approximate, batch_invariant
        self.c_fc = nn.Linear(width, hidden, bias, device=device, dtype=dtype)
        self.c_proj = nn.Linear(hidden, width, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None and _added_apart(x, residual):
            return self.forward(x) + residual
        w1, w2, invariant = self.c_fc, self.c_proj, self.batch_invariant
        if w1.bias is None:
            activation = "gelu_tanh" if self.approximate == "tanh" else "gelu"
            hidden = linear(x, w1.weight, activation=activation, batch_invariant=invariant)
            return linear(hidden, w2.weight, residual=residual, batch_invariant=invariant)
        weights = w1.weight, w1.bias, w2.weight, w2.bias
        return gelu_mlp(x, *weights, approximate=self.approximate, residual=residual, batch_invariant=invariant)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}" + ("" if self.batch_invariant else ", batch_invariant=False")


class CausalSelfAttention(nn.Module):
    """attention over one fused projection, projected back, + residual: x and residual (B, T, width) -> (B, T, width).

    Parameters: c_attn.weight ((heads + 2 kv_heads) D, width) with the rows of all queries, then all keys, then all
    values, c_proj.weight (width, heads D), their biases; D = width / heads <= 256; initialised as torch.nn.Linear's.
    kv_heads below heads is grouped-query attention; window w keeps the nearest w keys, itself included; dropout in
    [0, 1) drops probabilities in training mode alone; scale is 1/sqrt(D) unless given; residual and batch_invariant are
    those of GeluMLP.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        window: int | None = None,
        scale: float | None = None,
        bias: bool = True,
        batch_invariant: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        op = "CausalSelfAttention"
        kv_heads = heads if kv_heads is None else kv_heads
        _positive(op, width=width, heads=heads, kv_heads=kv_heads)
        if width % heads:
            _check.fail(op, f"width must be a multiple of heads = {heads}", width)
        _check.heads(op, heads, kv_heads, width // heads)
        _check.attention_options(op, width // heads, scale, window)
        if not 0.0 <= dropout < 1.0:
            _check.fail(op, "dropout must lie in [0, 1)", dropout)
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.dropout, self.window, self.scale = dropout, window, scale
        self.batch_invariant = batch_invariant
        qkv = width // heads * (heads + 2 * kv_heads)
        self.c_attn = nn.Linear(width, qkv, bias, device=device, dtype=dtype)
        self.c_proj = nn.Linear(width, width, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        _check.rank("CausalSelfAttention", "x", x, "(B, T, width)")
        if residual is not None and _added_apart(x, residual):
            return self.forward(x) + residual
        H, Hkv = self.heads, self.kv_heads
        into, back, invariant = self.c_attn, self.c_proj, self.batch_invariant
        qkv = linear(x, into.weight, into.bias, batch_invariant=invariant)
        dropout = self.dropout if self.training else 0.0
        if H == Hkv:
            packed = qkv.unflatten(-1, (3, H, -1))
            out = attention_qkvpacked(packed, scale=self.scale, window=self.window, dropout_p=dropout)
        else:
            q, k, v = qkv.unflatten(-1, (H + 2 * Hkv, -1)).split((H, Hkv, Hkv), dim=2)  # three views, no copy
            out = attention(q, k, v, scale=self.scale, window=self.window, dropout_p=dropout)
        assert isinstance(out, Tensor)
        return linear(out.flatten(2), back.weight, back.bias, residual=residual, batch_invariant=invariant)

    def extra_repr(self) -> str:
        parts = [f"heads={self.heads}"]
        if self.kv_heads != self.heads:
            parts.append(f"kv_heads={self.kv_heads}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        parts += [f"{name}={value}" for name in ("window", "scale") if (value := getattr(self, name)) is not None]
        parts += [] if self.batch_invariant else ["batch_invariant=False"]
        return ", ".join(parts)
