"""`apply`: installs the operators in an existing model, module by module, and can remove them again.

A module is recognised by its exact type, or by its structure if modelled on nanoGPT; its *class* is then replaced by
one that combines a forward from here with the class it had. Parameters, buffers, hooks, attribute names and
`isinstance` stay as they were, so state_dict, copy.deepcopy, pickle, DDP, optimizers, autocast, checkpointing and
torch.compile see the same model; no existing class is modified. What cannot be computed exactly is left alone, and the
report says why. Where a single call needs what the operators do not do (attention weights, a custom mask, a hook or an
adapter put on an inner layer afterwards), the module's own forward handles that call.

Built on top of the operator files, like `modules`; transformers' modules are in `integrations.transformers`.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_kernels import _check, _trial
from gpt2_kernels._fused import Fused, gelu_product, plain
from gpt2_kernels.fused_attention import attention_qkvpacked
from gpt2_kernels.layernorm import MAX_WIDTH, layer_norm
from gpt2_kernels.sdpa import scaled_dot_product_attention


def _beyond_ours(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's layer norm accepts what ours does not: float64, or float32 weights on bfloat16 activations."""
    mixed = weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)
    return mixed or x.dtype not in _check.DTYPES


class FusedLayerNorm(Fused):
    by = "layer_norm"
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        weight = input.new_ones(self.normalized_shape) if self.weight is None else self.weight
        if _beyond_ours(input, weight):
            return super().forward(input)
        return layer_norm(input, weight, self.bias, self.eps)


class FusedMultiheadAttention(Fused):
    """For calls without weights, and with no mask or one declared causal; all other calls go to torch's own."""

    by = "attention (torch's own for calls with need_weights, padding, or a mask that is not causal)"
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    out_proj: nn.Linear
    num_heads: int
    dropout: float
    batch_first: bool

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        batched = query.dim() == 3 and not query.is_nested
        if need_weights or key_padding_mask is not None or is_causal != (attn_mask is not None) or not batched:
            options = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            return super().forward(query, key, value, *options)
        dropout = self.dropout if self.training else 0.0
        if query is key is value and self.in_proj_weight is not None:
            qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
            qkv = qkv if self.batch_first else qkv.transpose(0, 1)  # (B, T, 3, H, D)
            out = attention_qkvpacked(qkv, causal=is_causal, dropout_p=dropout)
            assert isinstance(out, Tensor)
            out = out if self.batch_first else out.transpose(0, 1)
            return F.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias), None
        apart, together = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight), self.in_proj_weight
        weights = apart if together is None else together.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(*each) for each in zip((query, key, value), weights, biases))
        into, back = ((0, 2, 1, 3), (0, 2, 1, 3)) if self.batch_first else ((1, 2, 0, 3), (2, 0, 1, 3))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).permute(into) for t in (q, k, v))  # (B, H, T, D) views
        out = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)
        return F.linear(out.permute(back).flatten(2), self.out_proj.weight, self.out_proj.bias), None


class FusedTransformerEncoderLayer(Fused):
    """Calls the layer's own modules one by one: torch's inference path would bypass the replaced ones."""

    by = "its replaced parts, and gelu_mlp where the activation is GELU"
    self_attn: nn.MultiheadAttention
    linear1: nn.Linear
    linear2: nn.Linear
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    dropout: nn.Dropout
    dropout1: nn.Dropout
    dropout2: nn.Dropout
    norm_first: bool
    activation: Any

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:  # torch.nn.TransformerEncoder packs padded batches this way for its own inference path
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        def attend(x: Tensor) -> Tensor:
            out, _ = self.self_attn(
                x,
                x,
                x,
                attn_mask=src_mask,
                key_padding_mask=src_key_padding_mask,
                need_weights=False,
                is_causal=is_causal,
            )
            return self.dropout1(out)

        if self.norm_first:
            x = src + attend(self.norm1(src))
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(src + attend(src))
        return self.norm2(x + self._feed_forward(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        first, second = self.linear1, self.linear2
        approximate = _gelu_form(self.activation)
        dropping = self.training and self.dropout.p > 0
        if approximate and not dropping and plain(first, nn.Linear) and plain(second, nn.Linear):
            out = gelu_product(x, first.weight, first.bias, second.weight, second.bias, approximate)
        else:
            out = second(self.dropout(self.activation(first(x))))
        return self.dropout2(out)


def _gelu_form(activation: Any) -> str | None:
    """ "none" (erf) or "tanh" if an activation is GELU, else None."""
    if activation is F.gelu:
        return "none"
    return activation.approximate if type(activation) is nn.GELU else None


# --- modules written after nanoGPT ----------------------------------------------------------------------------------


class FusedNanoNorm(Fused):
    """nanoGPT's LayerNorm, whose bias may be None."""

    by = "layer_norm"
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        if _beyond_ours(input, self.weight):
            return super().forward(input)
        return layer_norm(input, self.weight, self.bias, getattr(self, "eps", 1e-5))


class FusedNanoMLP(Fused):
    approximate: str
    c_fc: nn.Linear
    c_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.c_fc, self.c_proj
        if not (plain(first, nn.Linear) and plain(second, nn.Linear)):
            return super().forward(x)
        out = gelu_product(x, first.weight, first.bias, second.weight, second.bias, self.approximate)
        dropout = self._modules.get("dropout")
        return out if dropout is None else dropout(out)


class FusedNanoMLPErf(FusedNanoMLP):
    by, approximate = "gelu_mlp(approximate='none')", "none"


class FusedNanoMLPTanh(FusedNanoMLP):
    by, approximate = "gelu_mlp(approximate='tanh')", "tanh"


class FusedNanoAttention(Fused):
    by = "attention"
    c_attn: nn.Linear
    c_proj: nn.Linear
    n_head: int

    def forward(self, x: Tensor) -> Tensor:
        dropouts = self._modules.get("attn_dropout"), vars(self).get("dropout")
        rates: set[Any] = {d.p if isinstance(d, nn.Dropout) else d for d in dropouts if d is not None}
        into, back = self.c_attn, self.c_proj
        if len(rates) > 1 or not (plain(into, nn.Linear) and plain(back, nn.Linear)):
            return super().forward(x)
        rate = rates.pop() if rates and self.training else 0.0
        out = attention_qkvpacked(into(x).unflatten(-1, (3, self.n_head, -1)), dropout_p=rate)
        assert isinstance(out, Tensor)
        out = back(out.flatten(2))
        dropout = self._modules.get("resid_dropout")
        return out if dropout is None else dropout(out)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NOT_NANO = ("torch.", "transformers.", "gpt2_kernels", "gpt2.")  # packages whose modules are recognised by type


# PyTorch functions that their forwards call, besides pure shape changes: all that `_trial` permits.
_NORM_CALLS = ("layer_norm", "mean", "var", "add", "sub", "mul", "div", "pow", "__pow__", "sqrt", "rsqrt")
_MLP_CALLS = ("linear", "gelu", "dropout", "add", "mul", "div", "pow", "__pow__", "tanh", "erf")
_ATTENTION_CALLS = (
    "linear", "scaled_dot_product_attention", "matmul", "mul", "div", "masked_fill", "softmax", "dropout",
)  # fmt: skip


def _of_class(kind: type) -> set[str]:
    """The class attributes that a module gets from its own (non-torch) classes, apart from methods and Python's own."""
    own = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    found = {name: value for base in own for name, value in vars(base).items() if not name.startswith("__")}
    return {name for name, value in found.items() if not callable(value) and not hasattr(value, "__get__")}


def _nano(module: Any, proofs: dict[Any, type[Fused] | str]) -> type[Fused] | str | None:
    """Modules named and structured like nanoGPT's; `_trial` tests that they also compute the same."""
    name, children = type(module).__name__.lower(), dict(module._modules)
    attributes = set(vars(module)) - _OF_EVERY_MODULE
    known: set[str]
    candidates: tuple[type[Fused], ...]
    calls: tuple[str, ...]
    parameters = {key for key, value in module._parameters.items() if value is not None}
    if "norm" in name and not children and parameters in ({"weight"}, {"weight", "bias"}):
        known, candidates, calls = {"bias", "eps"}, (FusedNanoNorm,), _NORM_CALLS
        if module.weight.dim() != 1 or not 1 <= len(module.weight) <= MAX_WIDTH:
            return f"its weight must be one axis in 1..{MAX_WIDTH}, got {tuple(module.weight.shape)}"
    elif {"c_fc", "c_proj"} <= set(children):
        known, candidates, calls = set(), (FusedNanoMLPErf, FusedNanoMLPTanh), _MLP_CALLS
        if extra := set(children) - {"c_fc", "c_proj", "gelu", "act", "dropout"}:
            return f"it has {_listed(extra)}, which nanoGPT's MLP has not"
    elif {"c_attn", "c_proj"} <= set(children):
        known, candidates = {"n_head", "n_embd", "dropout", "flash"}, (FusedNanoAttention,)
        calls = _ATTENTION_CALLS
        if extra := set(children) - {"c_attn", "c_proj", "attn_dropout", "resid_dropout"}:
            return f"it has {_listed(extra)}, which nanoGPT's attention has not"
        if not isinstance(getattr(module, "n_head", None), int) or module.n_head < 1:
            return "it has no n_head"
    else:
        return None
    if extra := (attributes | _of_class(type(module))) - known:
        return f"it has {_listed(extra)}, which nanoGPT's module of this shape has not"
    if extra := set(module._buffers) - {"bias"}:
        return f"it has a buffer {_listed(extra)}, which nanoGPT's module of this shape has not"
    for child_name, child in children.items():
        if type(child) not in (nn.Linear, nn.GELU, nn.Dropout):
            return f"its {child_name} is a {type(child).__name__}"
        if any(isinstance(value, Tensor) for value in vars(child).values()):  # which pruning and weight norm put there
            return f"its {child_name} has a weight that is no parameter"
    mask = module._buffers.get("bias")
    if mask is not None and not torch.equal(mask != 0, torch.ones_like(mask, dtype=torch.bool).tril()):
        return "its buffer bias is not nanoGPT's causal mask"
    if any(tensor.is_meta for tensor in module.parameters()):
        return "its parameters are on the meta device: apply it once they are there"
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return "its forward takes more than one tensor"
    kept = tuple((key, str(vars(module)[key])) for key in sorted(attributes))
    shapes = tuple((key, value.shape) for key, value in module.named_parameters())
    key = type(module), kept, shapes, tuple(map(repr, children.values())), None if mask is None else mask.shape
    if key not in proofs:
        proofs[key] = _tried(module, candidates, calls)
    return proofs[key]


def _tried(module: Any, candidates: tuple[type[Fused], ...], calls: tuple[str, ...]) -> type[Fused] | str:
    """The candidate that computes the same as the module, or what the module does instead."""
    heads = module.n_head if FusedNanoAttention in candidates else None
    # Small inputs expose an epsilon; a softmax of large scores shows only rounding.
    scales = (1.0, 3e-3) if heads else (1.0, 3e-3, 30.0, 1e4)
    other = "it is shaped like nanoGPT's module, but computes something else"
    if found := _trial.strange(module, calls, heads):
        return f"{other}: {found}"
    return next((each for each in candidates if _trial.agrees(module, each, scales)), other)


# --- recognition ----------------------------------------------------------------------------------------------------


def _torch_module(module: Any) -> type[Fused] | str | None:
    kind = type(module)
    if kind is nn.LayerNorm:
        if len(module.normalized_shape) != 1 or not 1 <= module.normalized_shape[0] <= MAX_WIDTH:
            return f"normalized_shape must be one axis in 1..{MAX_WIDTH}, got {tuple(module.normalized_shape)}"
        return FusedLayerNorm
    if kind is nn.MultiheadAttention:
        if module.bias_k is not None or module.add_zero_attn:
            return "add_bias_kv and add_zero_attn have no counterpart"
        if not 1 <= module.head_dim <= _check.MAX_HEAD_DIM:
            return f"head dimension must lie in 1..{_check.MAX_HEAD_DIM}, got {module.head_dim}"
        return FusedMultiheadAttention
    if kind is nn.TransformerEncoderLayer:
        parts = {name: _torch_module(getattr(module, name)) for name in ("self_attn", "norm1", "norm2")}
        for name, part in parts.items():
            if not isinstance(getattr(module, name), Fused) and not isinstance(part, type):
                return f"its {name} is left: {part or type(getattr(module, name)).__name__}"
        return FusedTransformerEncoderLayer
    return None


def recognise(module: nn.Module, model: nn.Module, proofs: dict[Any, type[Fused] | str]) -> type[Fused] | str | None:
    """The class to put before the module's own, or why the module is left, or None if `apply` does not handle its
    kind."""
    kind = type(module)
    found: type[Fused] | str | None = _torch_module(module)
    if found is None and kind.__module__.startswith("transformers."):
        try:
            from gpt2_kernels.integrations import transformers  # already imported: this module is from it
        except ImportError as problem:  # a version that is too old
            return str(problem) if _sounds_like_ours(module) else None
        found = transformers.recognise(module, model)
    if found is None and not f"{kind.__module__}.".startswith(_NOT_NANO):
        found = _nano(module, proofs)
    if found is None and _sounds_like_ours(module):
        return f"{kind.__name__} is not a kind that apply knows"
    if isinstance(found, type):
        if "forward" in vars(module):
            return "its forward was replaced on this instance"
        for name, tensor in module.named_parameters():
            if tensor.dtype not in _check.DTYPES:
                return f"dtype must be float32, float16 or bfloat16, got {tensor.dtype} of {name}"
    return found


def _sounds_like_ours(module: nn.Module) -> bool:
    kind = type(module)
    if kind.__module__.startswith(("gpt2_kernels", "gpt2.")):
        return False
    leaf = kind.__name__.lower()
    return leaf.endswith(("attention", "mlp", "norm")) or isinstance(module, (nn.LayerNorm, nn.MultiheadAttention))


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


# --- the public function --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What `apply` did. Keys are the names of `model.named_modules()`, '' for the model itself."""

    replaced: dict[str, str]  # name -> the operator that computes the module now
    kept: dict[str, str]  # name -> why the module was left as it is

    def __str__(self) -> str:
        rows = [(name or "(the model)", "replaced", by) for name, by in self.replaced.items()]
        rows += [(name or "(the model)", "kept", why) for name, why in self.kept.items()]
        if not rows:
            return "no module that apply knows"
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:{width}}  {what:8}  {text}" for name, what, text in rows)


@dataclasses.dataclass(frozen=True)
class Handle:
    """What `apply` returns: `print(handle.report)` says what was replaced, `handle.revert()` undoes all of it."""

    model: nn.Module
    report: Report

    def revert(self) -> None:
        """Restore the class of every module of the model that `apply` has ever replaced."""
        for module in list(self.model.modules()):
            if isinstance(module, Fused):
                module.uninstall(self.model)


def apply(model: nn.Module) -> Handle:
    """Install the operators in `model`, in place, and report what was replaced and what was left, and why.

    Handles torch.nn.LayerNorm, MultiheadAttention and TransformerEncoderLayer, transformers' GPT-2 MLP and attention,
    and modules modelled on nanoGPT's LayerNorm, MLP and CausalSelfAttention. Only this instance is modified: classes,
    parameters, buffers, hooks and state_dict keys stay as they are, so it may be called before or after an optimizer,
    DDP or torch.compile sees the model, and is idempotent. A deep copy of the model keeps the replacements. Results are
    those of the modules replaced, up to rounding; dropout drops at the same rate, not the same elements.
    Raises ValueError if `model` is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        _check.fail("apply", "model must be a torch.nn.Module", type(model).__name__)
    replaced: dict[str, str] = {}
    kept: dict[str, str] = {}
    proofs: dict[Any, type[Fused] | str] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, Fused):
            found = recognise(module, model, proofs)
            if isinstance(found, str):
                kept[name] = found
            if not isinstance(found, type):
                continue
            found.install(module, model)
        assert isinstance(module, Fused)
        replaced[name] = module.by
    return Handle(model, Report(replaced, kept))
