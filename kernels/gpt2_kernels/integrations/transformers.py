"""transformers: `attn_implementation="gpt2_kernels"` for any model, and GPT-2's modules for `apply`.

transformers builds one mask a forward pass, by a function that an attention implementation registers, and hands it to
every layer. Ours is a number for each key, (B, 1, 1, Tk), instead of a bit for each pair:

     n >= 1   a token of sequence n; a query sees keys of its own sequence alone
     0        padding: seen by no query, and as a query gives 0
    -1        not there yet: a static cache is longer than what has been written

and None where all keys are tokens of one sequence each. The layers pack the tokens by it and call `attention_varlen`,
so that padding costs memory traffic and no arithmetic. int8 numbers are 0 and 1; int16 ones number the sequences that
share a row (position_ids that start anew), and hold no padding. Masks of four dimensions are handed on as they are, so
generation may give one to the model again, as it does with a static cache; nobody else's have these types.
"""

from __future__ import annotations

# ruff: noqa: E402 (the version is looked at before what older ones do not have is imported)
import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

# Before it GPT-2 hands its attention function no scale, which would be lost in silence, and masks have other functions.
OLDEST = (5, 4)
if tuple(int(number) for number in re.findall(r"\d+", transformers.__version__)[:2]) < OLDEST:
    raise ImportError(f"gpt2_kernels: transformers must be 5.4 or later, got {transformers.__version__}")

from transformers import masking_utils
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Model
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import _active_collector  # which outputs the caller asked for

from gpt2_kernels import _check
from gpt2_kernels._fused import Fused, gelu_product, plain
from gpt2_kernels.fused_attention import attention, attention_varlen

NAME = "gpt2_kernels"
OP = 'attn_implementation="gpt2_kernels"'
INSTEAD = 'attn_implementation="sdpa" or "eager"'

# What models pass to their attention function beside the mask, and what it would change in the scores.
_CHANGES_SCORES = ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "cache")


def register() -> None:
    """Make `attn_implementation="gpt2_kernels"` known to transformers, for every model that lets it be chosen.

    With it comes its mask function; without that, transformers would leave padding out in silence. Batches padded on
    either side, grouped-query attention, sliding windows, caches and packed sequences are computed; attention weights,
    score caps, sinks, position biases and masks of any other form raise ValueError naming the alternative. As a query,
    padding gives 0. Calling it twice does no more than once.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, key_numbers)


# --- the mask -------------------------------------------------------------------------------------------------------

_AND = masking_utils.and_masks().__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_ONE_SEQUENCE = masking_utils.packed_sequence_mask_function(torch.empty(0)).__code__
_REMAPPED: Any = None
if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # older versions leave distances as in the row
    _REMAPPED = masking_utils.remap_positions_for_packed_sequence(
        masking_utils.causal_mask_function, torch.empty(0)
    ).__code__


class _Pattern(NamedTuple):
    causal: bool = False
    window: int | None = None
    sequences: Tensor | None = None  # (B, T), numbers that rise along a row


def _closed_over(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _pattern(function: Callable[..., Any]) -> _Pattern:
    """Which pattern a mask function of transformers stands for: known by its parts, never guessed from its values."""
    if function is masking_utils.causal_mask_function:
        return _Pattern(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return _Pattern()
    code = getattr(function, "__code__", None)
    if code is _WINDOW:
        return _Pattern(window=_closed_over(function, "sliding_window"))
    if code is _ONE_SEQUENCE:
        return _Pattern(sequences=_closed_over(function, "packed_sequence_mask"))
    if _REMAPPED and code is _REMAPPED:  # positions rise by one in each sequence: distances are those in the row
        return _pattern(_closed_over(function, "mask_function"))
    if code is _AND:
        parts = [_pattern(part) for part in _closed_over(function, "mask_functions")]
        sequences = [part.sequences for part in parts if part.sequences is not None]
        windows = [part.window for part in parts if part.window is not None]
        if len(sequences) <= 1:
            return _Pattern(
                any(part.causal for part in parts), min(windows, default=None), sequences[0] if sequences else None
            )
    _check.fail(
        OP,
        f"masks must be causal, sliding-window or full ones with padding or packed sequences ({INSTEAD} take any)",
        getattr(function, "__qualname__", repr(function)),
    )


def key_numbers(
    batch_size: int,
    q_length: int | Tensor | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = True,
    device: torch.device | str | None = None,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass, in the arguments of transformers' mask functions: see above for its form."""
    if cache_position is None and isinstance(q_length, Tensor):
        cache_position, q_length = q_length, None
    if cache_position is not None and q_length is None:  # transformers before 5 says where the queries are by this
        q_length, q_offset = len(cache_position), cache_position[0]
    compiling = torch.compiler.is_compiling()
    if compiling:
        whole_rows = attention_mask is None and isinstance(q_offset, int) and q_offset == 0 and kv_length == q_length
        pattern = _traced_pattern(mask_function, whole_rows, batch_size, kv_length, device, **kwargs)
    else:
        pattern = _pattern(mask_function)
    causal, window, sequences = pattern
    if window is not None and not causal:
        _check.fail(OP, f"a sliding window must be causal ({INSTEAD} take any)", f"window {window} without")
    if sequences is not None:
        if attention_mask is not None:
            _check.fail(OP, "packed sequences must come without attention_mask", tuple(attention_mask.shape))
        return (sequences + 1).to(torch.int16)[:, None, None]  # only neighbours are compared: 2^16 may wrap

    kept = None
    if attention_mask is not None:  # (B, tokens seen or more) bool
        missing = kv_offset + kv_length - attention_mask.shape[1]
        if missing > 0:
            attention_mask = F.pad(attention_mask, (0, missing))
        kept = attention_mask[:, kv_offset : kv_offset + kv_length]
    may_skip = allow_is_causal_skip if causal else allow_is_bidirectional_skip
    if not causal:
        if kept is None or (may_skip and not compiling and bool(kept.all())):
            return None
        return kept.to(torch.int8)[:, None, None]

    if not compiling:
        q_offset = int(q_offset)  # a static cache keeps it on the device
    seen = q_offset + q_length - kv_offset  # type: ignore[operator]
    all_there = isinstance(seen, int) and seen >= kv_length
    if kept is None or (not compiling and bool(kept[:, : int(seen)].all())):
        if all_there and may_skip:
            return None
        kept = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device if kept is None else kept.device)
    elif window is not None and (compiling or window < kv_length):
        _refuse_gaps(kept)
    numbers = kept.to(torch.int8)
    if not all_there:
        numbers = torch.where(torch.arange(kv_length, device=numbers.device) < seen, numbers, -1)
    return numbers[:, None, None]


def _refuse_gaps(kept: Tensor) -> None:
    """A window counts positions, those of padding too; packed tokens keep their distances where none lies between."""
    begins = kept & ~F.pad(kept[:, :-1], (1, 0))
    whole = begins.sum(1).amax() <= 1
    rule = "with a sliding window padding must be at the ends of a row"
    if torch.compiler.is_compiling():
        torch._assert_async(whole, f"{OP}: {rule}")
    elif not whole:
        _check.fail(OP, f"{rule} ({INSTEAD} take any)", "padding between tokens")


class _Packing(NamedTuple):
    """How the rows of a batch are packed, tokens first and padding behind; None where they lie so already."""

    queries: Tensor | None  # (B Tq,) which row comes where
    back: Tensor | None  # (B Tq,) its inverse
    keys: Tensor | None  # (B Tk,)
    cu_q: Tensor  # (S + 1,) int32
    cu_k: Tensor


def _packing(numbers: Tensor, Tq: int, causal: bool) -> _Packing:
    numbers, device = numbers[:, 0, 0], numbers.device
    B, Tk = numbers.shape
    if numbers.dtype == torch.int16:
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        if torch.compiler.is_compiling():  # as many sequences as there are tokens, those that are not there empty
            rows = torch.arange(B * Tk, device=device)
            starts = torch.where(begins.flatten(), rows, B * Tk).sort().values
        else:
            starts = begins.flatten().nonzero().squeeze(1)
        cu = F.pad(starts, (0, 1), value=B * Tk).to(torch.int32)
        return _Packing(None, None, None, cu, cu)

    kept_k = numbers > 0
    if causal:  # queries are the last of the keys that are there
        positions = (numbers >= 0).sum(1, keepdim=True) - Tq + torch.arange(Tq, device=device)
        kept_q = (positions >= 0) & kept_k.gather(1, positions.clamp(min=0))
        queries = _tokens_first(kept_q)
        back = torch.empty_like(queries).scatter_(0, queries, torch.arange(B * Tq, device=device))
        return _Packing(queries, back, _tokens_first(kept_k), _offsets(kept_q), _offsets(kept_k))
    every = torch.arange(0, B * Tq + 1, Tq, dtype=torch.int32, device=device)
    return _Packing(None, None, _tokens_first(kept_k), every, _offsets(kept_k))


def _tokens_first(kept: Tensor) -> Tensor:
    return kept.flatten().to(torch.int8).argsort(descending=True, stable=True)


def _offsets(kept: Tensor) -> Tensor:
    return F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def _packing_of(numbers: Tensor, Tq: int, causal: bool) -> _Packing:
    """Made once for all layers: they are handed the same tensor. A compiler sees by itself that it is the same."""
    if torch.compiler.is_compiling():
        return _packing(numbers, Tq, causal)
    found = getattr(numbers, "_gpt2_kernels", None)
    if found is None or found[:2] != (Tq, causal):
        numbers._gpt2_kernels = found = Tq, causal, _packing(numbers, Tq, causal)  # type: ignore[attr-defined]
    return found[2]


def _traced_pattern(
    function: Callable[..., Any], whole_rows: bool, batch_size: int, length: int, device: Any, **options: Any
) -> _Pattern:
    """`_pattern` under torch.compile, which does not show what a function was closed over.

    The intersections that transformers builds itself, for windows and packed sequences, do not need `use_vmap`; where
    rows may be packed (no padding, no cache), a token begins a sequence where it does not see the one before it.
    """
    code = getattr(function, "__code__", None)
    if code is not _AND:
        return _pattern(function)
    if options.get("use_vmap") or getattr(options.get("config"), "attention_chunk_size", None):
        _check.fail(OP, f"a compiled model's masks must be causal or sliding-window ones ({INSTEAD} take any)", code)
    if not whole_rows:
        return _Pattern(causal=True, window=1)  # which window does not matter here
    rows, later = torch.arange(batch_size, device=device)[:, None], torch.arange(1, length, device=device)[None]
    begins = ~function(rows, 0, later, later - 1).expand(batch_size, -1)
    return _Pattern(True, None, F.pad(begins.cumsum(1), (1, 0)))


# --- attention ------------------------------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, Tq, D), key (B, Hkv, Tk, D), value (B, Hkv, Tk, E) ->
    (B, Tq, H, E), None."""
    _refuse(kwargs)
    config = getattr(module, "config", None)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and getattr(config, "is_causal", True) is not False  # a decoder that is told to look both ways
    if sliding_window is None and _window_is_missing(module, config):
        _check.fail(OP, f"a model with a sliding window must hand it on ({INSTEAD} need not)", type(module).__name__)
    if sliding_window is not None and not causal:
        _check.fail(OP, f"a sliding window must be causal ({INSTEAD} take any)", f"window {sliding_window} without")
    D, E = key.shape[-1], value.shape[-1]
    if D != E:  # latent attention: zeros behind the narrower change no score, and of the result they are cut off
        scaling = D**-0.5 if scaling is None else scaling
        query, key, value = (F.pad(t, (0, max(D, E) - t.shape[-1])) for t in (query, key, value))
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if attention_mask is None or _is_no_mask(attention_mask):
        out = attention(q, k, v, causal=causal, scale=scaling, window=sliding_window, dropout_p=dropout)
        assert isinstance(out, Tensor)
        return out if D == E else out[..., :E], None

    B, Tq = q.shape[:2]
    Tk = k.shape[1]
    integer = isinstance(attention_mask, Tensor) and attention_mask.dtype in (torch.int8, torch.int16)
    if not integer or tuple(attention_mask.shape) != (B, 1, 1, Tk):
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        _check.fail(OP, f"a mask must be made by transformers from attention_mask (B, T) ({INSTEAD} take any)", got)
    order, back, keys, cu_q, cu_k = _packing_of(attention_mask, Tq, causal)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    q = q if order is None else q.index_select(0, order)
    k, v = (t if keys is None else t.index_select(0, keys) for t in (k, v))
    out = attention_varlen(
        q, k, v, cu_q, cu_k, Tq, Tk, causal=causal, scale=scaling, window=sliding_window, dropout_p=dropout
    )
    assert isinstance(out, Tensor)
    out = out if D == E else out[:, :, :E]
    return (out if back is None else out.index_select(0, back)).unflatten(0, (B, Tq)), None


def _is_no_mask(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.numel() == 0


def no_mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A hook before GPT2Model: where neither padding, positions nor a cache are given, it needs no mask.

    transformers looks for packed sequences in the positions all the same, which costs a synchronisation, and under
    torch.compile, where nothing can be looked at, has to assume them. A mask of four dimensions is handed on as it is.
    """
    config: Any = model.config
    caching = config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    given = ("attention_mask", "past_key_values", "position_ids")
    if caching or len(args) > 1 or config._attn_implementation != NAME or any(kwargs.get(k) is not None for k in given):
        return None
    tokens = args[0] if args else kwargs.get("input_ids")
    device = None if tokens is None else tokens.device
    return args, {**kwargs, "attention_mask": torch.empty(0, 0, 0, 0, dtype=torch.bool, device=device)}


def _refuse(kwargs: dict[str, Any]) -> None:
    for name in _CHANGES_SCORES:
        if kwargs.get(name) is not None:
            _check.fail(OP, f"{name} must be None ({INSTEAD} take it)", type(kwargs[name]).__name__)
    wanted = kwargs.get("output_attentions")
    if not wanted and not torch.compiler.is_compiling():
        wanted = "attentions" in (_active_collector.get() or ())
    if wanted:
        _check.fail(
            OP,
            'output_attentions must be False (attn_implementation="eager" returns them; gpt2_kernels.attention_map '
            "gives those of chosen heads and rows)",
            True,
        )


def _window_is_missing(module: nn.Module, config: Any) -> bool:
    """Whether the config gives this layer a sliding window; the attention function was called without one."""
    if not getattr(config, "sliding_window", None) or not getattr(config, "use_sliding_window", True):
        return False
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is None or layer is None:
        return True
    return kinds[layer] == "sliding_attention"


# --- GPT-2's modules, for apply -------------------------------------------------------------------------------------

_GELUS = {NewGELUActivation: "tanh", GELUTanh: "tanh", GELUActivation: "none"}


class FusedGPT2MLP(Fused):
    by = "gelu_mlp"
    c_fc: Conv1D
    c_proj: Conv1D
    act: nn.Module
    dropout: nn.Dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        first, second, approximate = self.c_fc, self.c_proj, _GELUS.get(type(self.act))
        plainly = plain(first, Conv1D) and plain(second, Conv1D) and plain(self.act, type(self.act))
        if approximate is None or not plainly:
            return super().forward(hidden_states)
        weights = first.weight.T, first.bias, second.weight.T, second.bias  # Conv1D keeps (in, out)
        return self.dropout(gelu_product(hidden_states, *weights, approximate))


class FusedGPT2Attention(Fused):
    """Its own forward, with `attention_forward` for the part between the projections: by the model's config, of which
    the model gets a copy, since transformers lets models share one."""

    by = f"attention, through {OP}"
    config: Any

    @classmethod
    def install(cls, module: nn.Module, model: nn.Module) -> None:
        register()
        config: Any = module.config
        if "_implementation_before" not in vars(module):
            before, ours = config._attn_implementation, copy.deepcopy(config)
            ours._attn_implementation = NAME
            for holder in model.modules():
                if vars(holder).get("config") is config:
                    holder.config = ours
                    if type(holder) is GPT2Attention:
                        vars(holder)["_implementation_before"] = before
                    elif type(holder) is GPT2Model:
                        holder.register_forward_pre_hook(no_mask, with_kwargs=True)
        super().install(module, model)

    def uninstall(self, model: nn.Module) -> None:
        self.config._attn_implementation = vars(self).pop("_implementation_before")
        for holder in model.modules():
            for key, hook in list(holder._forward_pre_hooks.items()):
                if hook is no_mask:
                    del holder._forward_pre_hooks[key]
                    holder._forward_pre_hooks_with_kwargs.pop(key, None)
        super().uninstall(model)


def recognise(module: Any, model: nn.Module) -> type[Fused] | str | None:
    """As in `dropin`: the class to put before that of a module of transformers', or why it is left, or None."""
    if type(module) is GPT2MLP:
        for name in ("c_fc", "c_proj"):
            if type(getattr(module, name)) is not Conv1D:
                return f"its {name} is a {type(getattr(module, name)).__name__}"
        if type(module.act) not in _GELUS:
            return f"its activation must be GELU, got {type(module.act).__name__}"
        return FusedGPT2MLP
    if type(module) is GPT2Attention:
        if module.head_dim > _check.MAX_HEAD_DIM:
            return f"head dimension must lie in 1..{_check.MAX_HEAD_DIM}, got {module.head_dim}"
        if module.config.output_attentions:
            return "config.output_attentions asks for attention weights"
        makers = (part for part in model.modules() if isinstance(part, GPT2Model) and part.config is module.config)
        if not any(part is module for maker in makers for part in maker.modules()):
            return "its masks are made by a GPT2Model that is not in what apply was given: apply the whole model"
        return FusedGPT2Attention
    return None
