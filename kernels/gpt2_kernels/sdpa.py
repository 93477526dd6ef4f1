"""`attention` under the name, layout and conventions of torch.nn.functional.scaled_dot_product_attention.

No kernel lives here: this is a wrapper above the operator files, as `modules` is, and imports what it wraps. Inputs
(..., H, T, D) become (B, T, H, D) views, so that nothing is copied on the way in or out where the batch is one axis.
Specification: torch.nn.functional.scaled_dot_product_attention, with torch's top-left causal mask.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_kernels import _check
from gpt2_kernels._operator import autocast
from gpt2_kernels.fused_attention import attention

OP = "scaled_dot_product_attention"


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    if all(shape == shapes[0] for shape in shapes):  # where PyTorch's function takes the host 25 us
        return shapes[0]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        _check.fail(OP, "axes before the last two must broadcast", ", ".join(str(tuple(s)) for s in shapes))


def _match_heads(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(..., H, T, D) views whose numbers of heads `attention` takes: one number for k and v, a divisor of that of q."""
    H, Hk, Hv = (t.shape[-3] for t in (q, k, v))
    if enable_gqa:
        if not (Hk and Hv) or H % Hk or H % Hv:
            _check.fail(OP, "heads of query must be a multiple of those of key and of value", (H, Hk, Hv))
        Hkv = Hk if Hk % Hv == 0 else Hv if Hv % Hk == 0 else H  # math.lcm knows no symbolic sizes
        k, v = (t if t.shape[-3] == Hkv else t.repeat_interleave(Hkv // t.shape[-3], -3) for t in (k, v))
        return q, k, v
    if H == Hk == Hv:
        return q, k, v
    (H,) = _broadcast((H,), (Hk,), (Hv,))
    q = q.expand(*q.shape[:-3], H, -1, -1)
    if not Hk == Hv == 1:  # a single head for all is grouped-query attention, with smaller gradients than a broadcast's
        k, v = (t.expand(*t.shape[:-3], H, -1, -1) for t in (k, v))
    return q, k, v


def _heads_inside(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """(..., H, T, D) -> (B, T, H, D), the leading axes broadcast to `batch` and merged; a view where they are one."""
    if len(batch) == 1 and x.shape[:-3] == batch:
        return x.transpose(1, 2)
    return x.expand(*batch, *x.shape[-3:]).reshape(math.prod(batch), *x.shape[-3:]).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float) -> Tensor:
    out = attention(q, k, v, causal=causal, scale=scale, dropout_p=dropout_p)
    assert isinstance(out, Tensor)
    return out


@autocast("lower")
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query key^T) value, with the arguments and the meaning of torch's function of this name.

    query (..., H, L, D), key (..., H, S, D), value (..., H, S, E) -> (..., H, L, E), or without H; axes before the last
    two broadcast. With enable_gqa key and value may have fewer heads, divisors of query's. With is_causal query i sees
    key j where j <= i, counted from the top left also where L != S (`attention` aligns the last query with the last
    key instead). L = 2, S = 4, and L = 4, S = 2:

        1 0 0 0        1 0
        1 1 0 0        1 1
                       1 1
                       1 1

    D and E lie in 1..256; where they differ, the narrower is padded with zeros, a copy. dropout_p in [0, 1) drops
    whenever it is not 0, as torch's does, but not the same elements. Differentiable in all three.
    attn_mask must be None: is_causal, `attention(window=)` and `attention_varlen` serve causal text, sliding windows
    and padded batches. Raises ValueError on a mask, and on a shape, dtype, device or option that does not fit.
    """
    if attn_mask is not None:
        _check.fail(
            OP,
            "attn_mask must be None (for causal text is_causal=True, for a sliding window gpt2_kernels.attention, for "
            "padded batches gpt2_kernels.attention_varlen, for any other mask torch's own function)",
            f"a mask {tuple(attn_mask.shape)}",
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            _check.fail(OP, f"{name} must be (..., T, D)", tuple(tensor.shape))
    _check.same_kind(OP, "query", query, key=key, value=value)
    L, D = query.shape[-2:]
    S, E = value.shape[-2:]
    if tuple(key.shape[-2:]) != (S, D):
        _check.fail(OP, f"key must be (..., S, D) = (..., {S}, {D}), S from value and D from query", tuple(key.shape))
    for name, width in (("query", D), ("value", E)):
        if not 1 <= width <= _check.MAX_HEAD_DIM:
            _check.fail(OP, f"last axis of {name} must lie in 1..{_check.MAX_HEAD_DIM}", width)
    if not 0.0 <= dropout_p < 1.0:
        _check.fail(OP, "dropout_p must lie in [0, 1)", dropout_p)
    factor, _ = _check.attention_options(OP, D, scale, None)
    headless = max(query.dim(), key.dim(), value.dim()) == 2
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) == 2:
        _check.fail(OP, "with enable_gqa query, key and value must be (..., H, T, D)", tuple(query.shape))

    q, k, v = (t.unsqueeze(0) if t.dim() == 2 else t for t in (query, key, value))
    q, k, v = _match_heads(q, k, v, enable_gqa)
    batch = _broadcast(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, k, v = (_heads_inside(t, batch) for t in (q, k, v))
    if D != E:
        q, k, v = (F.pad(t, (0, max(D, E) - t.shape[-1])) for t in (q, k, v))
    if not is_causal:
        out = _attend(q, k, v, False, factor, dropout_p)
    elif L <= S:  # no query sees the keys behind key L - 1, and without them both alignments are the same
        if L != S:
            k, v = k[:, :L], v[:, :L]
        out = _attend(q, k, v, True, factor, dropout_p)
    else:
        square = _attend(q[:, :S], k, v, True, factor, dropout_p)
        out = torch.cat([square, _attend(q[:, S:], k, v, False, factor, dropout_p)], dim=1)
    out = (out if D == E else out[..., :E]).transpose(1, 2)  # (B, H, L, E)
    if len(batch) != 1:
        out = out.reshape(*batch, *out.shape[1:])  # splits an axis: a view
    return out[0] if headless else out
