"""A whole layer of a GPT-2 over a paged cache in one call, for generation on a CPU.

    y = x + c_proj(attention(c_attn(ln_1(x)))),    result = y + c_proj(gelu(c_fc(ln_2(y))))

It stands for seven calls: layer_norm, linear, append_kv_, paged_attention, linear, layer_norm, gelu_mlp (eight with
linear_int8); the result and the cache have their bits. A GPU has no use for it, since a captured graph launches all of
them without the host. On a CPU a token of GPT-2 124M reads 85 MB of layers in int8, 2.5 ms at 34 GB/s, and eighty-odd
calls from Python take 3 ms beside them.
Specification: gpt2_kernels.reference.paged_layer_.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2_kernels import _check, _native, _operator, _runtime
from gpt2_kernels._operator import register

OP = "paged_layer_"
WEIGHTS = "weight and bias of ln_1, c_attn, attn.c_proj, ln_2, c_fc and mlp.c_proj"


def _paged_layer_cpu(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    eps: float,
    activation: str,
) -> Tensor:
    cache = k_cache, v_cache, slots, block_table, context_lens, cu_seqlens_q
    kind = _check.ACTIVATIONS[activation]
    try:  # which looks at every tensor before it writes; asking all of that in Python too would cost as much again
        return _native.ops().paged_layer_(x.contiguous(), weights, scales, *cache, scale, eps, kind)
    except RuntimeError as e:
        _, found, message = str(e).partition(f"{OP}: ")
        if not found:
            raise
        raise ValueError(f"{OP}: {message.splitlines()[0]}") from e


register(
    f"{OP}(Tensor x, Tensor[] weights, Tensor[] scales, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots,"
    " Tensor block_table, Tensor context_lens, Tensor cu_seqlens_q, float scale, float eps, str activation) -> Tensor",
    triton_impl=_paged_layer_cpu,  # there is no kernel: the public function refuses all but a CPU's own path
    cpu_impl=_paged_layer_cpu,
    fake=lambda x, *rest: x.new_empty(x.shape),
    cpu="layer",
)


def has_paged_layer(x: Tensor) -> bool:
    """Whether `paged_layer_` takes `x` here, with weights of its dtype or in int8: on a CPU whose products the compiled
    extension computes, outside of autocast, and not while the Triton kernels are interpreted."""
    return not torch.is_autocast_enabled("cpu") and _serves(x.device.type, x.dtype)


@torch.compiler.assume_constant_result
def _serves(device: str, dtype: torch.dtype) -> bool:
    return device == "cpu" and not _runtime.triton_on_cpu() and _runtime.native_products(torch.empty(0, dtype=dtype))


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

    weights: weight and bias of ln_1, c_attn, attn.c_proj, ln_2, c_fc and mlp.c_proj, as PyTorch keeps them, dense along
    the last axis, in the dtype of x; or the four matrices in int8, and then weight_scales holds their scales, from
    `quantize`. k_cache, v_cache (num_blocks, block_size, H, D) with H D = C, in the dtype of x; slots, block_table,
    context_lens and cu_seqlens_q as in `append_kv_` and `paged_attention`; scale, of the products of queries and keys,
    eps and activation as in `paged_attention`, `layer_norm` and `linear`.
    Raises ValueError, having written nothing, where `has_paged_layer` is False, or on a number, shape, dtype or device
    of tensors that does not fit.
    """
    int8 = len(weight_scales) > 0
    if not has_paged_layer(x):
        what = f"{'int8' if int8 else x.dtype} weights, x on {x.device}"
        if torch.is_autocast_enabled("cpu"):
            what += ", under autocast"
        rule = "needs the products of a CPU to be compiled C++"
        _check.fail(OP, f"{rule} (`linear` is {_operator.path_of('linear', 'cpu', x.dtype)} here)", what)
    if activation not in ("gelu", "gelu_tanh"):
        _check.fail(OP, "activation must be 'gelu' or 'gelu_tanh'", repr(activation))
    if len(weights) != 12:
        _check.fail(OP, f"weights must be 12 tensors, {WEIGHTS}", len(weights))
    scale, _ = _check.attention_options(OP, k_cache.shape[-1], scale, None)
    if not eps >= 0:
        _check.fail(OP, "eps must be at least 0", eps)
    others = (k_cache, v_cache, slots, block_table, context_lens, cu_seqlens_q)
    for tensor in (*weights, *weight_scales, *others):
        if tensor.device != x.device:
            _check.fail(OP, f"all tensors must be on the device of x ({x.device})", tensor.device)
    if torch.is_grad_enabled():
        named = {f"weights[{i}]": w for i, w in enumerate(weights)}
        _check.no_gradient(OP, x=x, k_cache=k_cache, v_cache=v_cache, **named)
    return torch.ops.gpt2_kernels.paged_layer_(x, weights, weight_scales, *others, scale, eps, activation)
