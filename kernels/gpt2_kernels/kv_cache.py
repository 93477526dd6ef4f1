"""Writing new keys and values into a paged cache.

The cache consists of blocks of `block_size` tokens; token n goes to slot = block * block_size + offset. Bytes, for
element size s: N Hkv D keys and as many values are read and written once, 4 N Hkv D s. No arithmetic, except for a
float8_e4m3fn cache: it holds x / scale of its head, clamped to +-448, rounded to nearest even.
Specification: gpt2_kernels.reference.append_kv_.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2_kernels import _check, _native, _runtime, reference
from gpt2_kernels._float8 import to_float8
from gpt2_kernels._launch import launch
from gpt2_kernels._operator import register
from gpt2_kernels._runtime import tl, triton


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["slots_ptr"])
def append_kv_kernel(
    k_ptr,  # (N, Hkv, D)
    v_ptr,  # (N, Hkv, D)
    k_cache_ptr,  # (num_blocks, block_size, Hkv, D)
    v_cache_ptr,  # (num_blocks, block_size, Hkv, D)
    slots_ptr,  # (N,) int64
    k_scale_ptr,  # (Hkv,) float32 for float8 caches, else None
    v_scale_ptr,  # (Hkv,)
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_kcb,
    stride_kct,
    stride_kch,
    stride_vcb,
    stride_vct,
    stride_vch,
    block_size,
    num_slots,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns one token, all heads."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + n)
    if slot >= 0:
        tl.device_assert(slot < num_slots, "append_kv_: slot outside the cache")
        block = slot // block_size
        offset = slot % block_size
        h = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
        d = tl.arange(0, BLOCK_D)[None, :]
        inside = (h < H) & (d < D)
        k = tl.load(k_ptr + n * stride_kn + h * stride_kh + d, mask=inside)
        v = tl.load(v_ptr + n * stride_vn + h * stride_vh + d, mask=inside)
        if k_scale_ptr is not None:
            k = to_float8(k, tl.load(k_scale_ptr + h, mask=h < H, other=1.0))
            v = to_float8(v, tl.load(v_scale_ptr + h, mask=h < H, other=1.0))
        tl.store(k_cache_ptr + block * stride_kcb + offset * stride_kct + h * stride_kch + d, k, mask=inside)
        tl.store(v_cache_ptr + block * stride_vcb + offset * stride_vct + h * stride_vch + d, v, mask=inside)


def _append_triton(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    _check.float8_gpu("append_kv_", k_cache)
    N, H, D = k.shape
    k, v = _check.unit_last_stride(k), _check.unit_last_stride(v)
    if N:
        launch(
            append_kv_kernel,
            (N,),
            k,
            v,
            k_cache,
            v_cache,
            slots.contiguous(),
            None if k_scale is None else k_scale.contiguous(),
            None if v_scale is None else v_scale.contiguous(),
            *k.stride()[:2],
            *v.stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            k_cache.shape[1],
            k_cache.shape[0] * k_cache.shape[1],
            H=H,
            D=D,
            BLOCK_H=_check.power_of_2(H),
            BLOCK_D=_check.power_of_2(D),
            num_warps=min(32, max(4, _check.power_of_2(H) * _check.power_of_2(D) // 1024)),  # 32 elements per thread
        )


def _append_cpu(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    if _runtime.native(k_cache):
        k, v = _check.unit_last_stride(k), _check.unit_last_stride(v)
        _native.ops().append_kv_(k, v, k_cache, v_cache, slots)
        return
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    if slots.numel() and not -1 <= int(slots.min()) <= int(slots.max()) < num_slots:
        _check.fail("append_kv_", f"slots must lie in -1..{num_slots - 1}", [int(slots.min()), int(slots.max())])
    reference.append_kv_(k, v, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)


register(
    "append_kv_(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor? k_scale=None,"
    " Tensor? v_scale=None) -> ()",
    triton_impl=_append_triton,
    cpu_impl=_append_cpu,
    fake=lambda k, v, k_cache, v_cache, slots, k_scale=None, v_scale=None: None,
    cpu="native",
)


def append_kv_(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write keys and values of N new tokens into a paged cache, in place.

    k, v (N, Hkv, D); k_cache, v_cache (num_blocks, block_size, Hkv, D), any strides with a dense last axis; slots (N,)
    int64, where slot = block * block_size + offset and -1 skips the token. No two tokens may share a slot.
    The caches have the dtype of k, or are float8_e4m3fn and hold k / k_scale and v / v_scale, both (Hkv,) float32,
    clamped to +-448 and rounded to nearest. On a GPU they need compute capability 8.9.
    Raises ValueError on a shape, dtype or device that does not fit; a slot outside the cache is an error on the CPU and
    a device assertion under TRITON_DEBUG=1 on a GPU.
    """
    _check.rank("append_kv_", "k", k, "(N, Hkv, D)")
    _check.rank("append_kv_", "k_cache", k_cache, "(num_blocks, block_size, Hkv, D)")
    _check.same_kind("append_kv_", "k", k, v=v)
    _check.cache("append_kv_", "k", k, k_cache, v_cache, k_scale, v_scale)
    _check.shape("append_kv_", "v", v, tuple(k.shape), "(N, Hkv, D)")
    _check.shape(
        "append_kv_", "k_cache", k_cache, (*k_cache.shape[:2], *k.shape[1:]), "(num_blocks, block_size, Hkv, D)"
    )
    _check.shape("append_kv_", "v_cache", v_cache, tuple(k_cache.shape), "the shape of k_cache")
    _check.index("append_kv_", "slots", slots, torch.int64, k)
    _check.shape("append_kv_", "slots", slots, (k.shape[0],), "(N,)")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:
            _check.fail(
                "append_kv_", f"last axis of {name} must be dense, since it is written in place", cache.stride()
            )
    _check.no_gradient("append_kv_", k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    torch.ops.gpt2_kernels.append_kv_(k, v, k_cache, v_cache, slots, k_scale, v_scale)
