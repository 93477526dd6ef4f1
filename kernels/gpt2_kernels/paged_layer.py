"""A whole layer of a GPT-2 over a paged cache in one call, for generation on a CPU.

    y = x + c_proj(attention(c_attn(ln_1(x)))),    result = y + c_proj(gelu(c_fc(ln_2(y))))

It stands for seven calls: layer_norm, linear, append_kv_, paged_attention, linear, layer_norm, gelu_mlp, or linear_int8
in place of the products; the result and the cache have their bits. A GPU has no use for it, since a captured graph
launches all of them without the host. On a CPU a token of GPT-2 124M reads 85 MB of layers in int8, 2.5 ms at 34 GB/s,
and eighty-odd calls from Python take 3 ms beside them.
Specification: gpt2_kernels.reference.paged_layer_.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2_kernels import _check, _native, _runtime

WEIGHTS = "weight and bias of ln_1, c_attn, attn.c_proj, ln_2, c_fc and mlp.c_proj"


def has_paged_layer(x: Tensor, *, int8: bool = False) -> bool:
    """Whether `paged_layer_` takes `x` here, with weights of its dtype or in int8: on a CPU whose products the compiled
    extension computes, outside of autocast, and not while the Triton kernels are interpreted."""
    if x.device.type != "cpu" or _runtime.triton_on_cpu() or torch.is_autocast_enabled("cpu"):
        return False
    return (_runtime.native_int8 if int8 else _runtime.native_products)(x)


def paged_layer_(
    x: Tensor,
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    eps: float = 1e-5,
    activation: str = "gelu_tanh",
    weight_scales: Sequence[Tensor] = (),
) -> Tensor:
    """One layer of packed tokens x (N, C), whose keys and values are written to the cache first; no gradient.

    weights: weight and bias of ln_1, c_attn, attn.c_proj, ln_2, c_fc and mlp.c_proj, as PyTorch keeps them, in the
    dtype of x; or the four matrices in int8, and then weight_scales holds their scales, from `quantize`. k_cache,
    v_cache (num_blocks, block_size, H, D) with H D = C, in the dtype of x; slots, block_table, context_lens and
    cu_seqlens_q as in `append_kv_` and `paged_attention`; activation as in `linear`.
    Raises ValueError where `has_paged_layer` is False, or on a number, shape or dtype of tensors that does not fit.
    """
    op, int8 = "paged_layer_", len(weight_scales) > 0
    if not has_paged_layer(x, int8=int8):
        what = f"{'int8' if int8 else x.dtype} weights on {x.device}"
        _check.fail(
            op, "needs the compiled operators on a CPU with AVX-512 BF16 and VNNI", f"{what}; {_native.status()}"
        )
    if activation not in ("gelu", "gelu_tanh"):
        _check.fail(op, "activation must be 'gelu' or 'gelu_tanh'", repr(activation))
    if len(weights) != 12:
        _check.fail(op, f"weights must be 12 tensors, {WEIGHTS}", len(weights))
    if torch.is_grad_enabled():
        _check.no_gradient(op, x=x, **{f"weights[{i}]": w for i, w in enumerate(weights)})
    cache = k_cache, v_cache, slots, block_table, context_lens, cu_seqlens_q
    kind = _check.ACTIVATIONS[activation]
    try:  # the compiled operator looks at every tensor before it writes; asking all of that here too would cost as much
        return _native.ops().paged_layer_(x.contiguous(), weights, weight_scales, *cache, scale, eps, kind)
    except RuntimeError as e:
        raise ValueError(str(e).splitlines()[0]) from None
