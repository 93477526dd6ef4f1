"""Argument checks: each raises one ValueError that names the operator, the rule and the value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from gpt2_kernels import _operator, _runtime
from gpt2_kernels._runtime import FLOAT8

Tile = TypeVar("Tile", bound=tuple[int, ...])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2}  # of products: the number by which kernels and C++ know each
MAX_WINDOW = 2**30  # a wider one is no narrower, and a position plus it would not fit in the 32 bits of kernels


def fail(op: str, rule: str, got: Any) -> NoReturn:
    raise ValueError(f"{op}: {rule}, got {got}")


def same_kind(op: str, first: str, tensor: Tensor, **others: Tensor | None) -> None:
    """`tensor` has a dtype that the kernels support; the others have its dtype and device."""
    if tensor.dtype not in DTYPES:
        fail(op, f"dtype of {first} must be float32, float16 or bfloat16", tensor.dtype)
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != tensor.dtype:
            fail(op, f"{name} must have the dtype of {first} ({tensor.dtype})", other.dtype)
        if other.device != tensor.device:
            fail(op, f"{name} must be on the device of {first} ({tensor.device})", other.device)


def cache(
    op: str,
    first: str,
    tensor: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Caches have the dtype of `tensor`, or are float8_e4m3fn; scales (Hkv,) are given if and only if they are."""
    same_kind(op, first, tensor)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    if k_cache.dtype != FLOAT8:
        same_kind(op, first, tensor, k_cache=k_cache, v_cache=v_cache)
        for name, scale in scales.items():
            if scale is not None:
                fail(op, f"{name} must be None for a cache that is not {FLOAT8}", f"one for {k_cache.dtype}")
        return
    if v_cache.dtype != FLOAT8:
        fail(op, f"v_cache must have the dtype of k_cache ({FLOAT8})", v_cache.dtype)
    for name, other in {"k_cache": k_cache, "v_cache": v_cache, **scales}.items():
        if other is None:
            fail(op, f"{name} must be given for a {FLOAT8} cache, float32 (Hkv,)", None)
        if other.device != tensor.device:
            fail(op, f"{name} must be on the device of {first} ({tensor.device})", other.device)
    for name, scale in scales.items():
        assert scale is not None
        if scale.dtype != torch.float32:
            fail(op, f"{name} must be torch.float32", scale.dtype)
        shape(op, name, scale, (k_cache.shape[2],), "(Hkv,)")


def paged(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    context_lens: Tensor,
) -> None:
    """A paged cache to read from, with its block table and context lengths."""
    rank(op, "k_cache", k_cache, "(num_blocks, block_size, Hkv, D)")
    cache(op, "q", q, k_cache, v_cache, k_scale, v_scale)
    shape(op, "k_cache", k_cache, (*k_cache.shape[:3], q.shape[2]), "(num_blocks, block_size, Hkv, D)")
    shape(op, "v_cache", v_cache, tuple(k_cache.shape), "the shape of k_cache")
    heads(op, q.shape[1], k_cache.shape[2], q.shape[2])
    rank(op, "block_table", block_table, "(S, max_blocks)")
    shape(op, "context_lens", context_lens, (block_table.shape[0],), "(S,)")
    for name, tensor in (("block_table", block_table), ("context_lens", context_lens)):
        index(op, name, tensor, torch.int32, q)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            fail(op, f"last axis of {name} must be dense", tensor.stride())


def float8_gpu(op: str, k_cache: Tensor) -> None:
    """`gpu_refusal` for a float8 cache, also for the target of offline compilation."""
    if k_cache.dtype == FLOAT8 and (refusal := _runtime.too_old(_runtime.architecture(k_cache.device), FLOAT8)):
        raise ValueError(f"{op}: {refusal}")


def rank(op: str, name: str, tensor: Tensor, dims: str) -> None:
    """`dims` is the shape as documented, such as "(B, T, H, D)"."""
    if tensor.dim() != dims.count(",") + (not dims.endswith(",)")):
        fail(op, f"{name} must be {dims}", tuple(tensor.shape))


def shape(op: str, name: str, tensor: Tensor | None, expected: tuple[int, ...], dims: str) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        fail(op, f"{name} must be {dims} = {expected}", tuple(tensor.shape))


def index(op: str, name: str, tensor: Tensor, dtype: torch.dtype, like: Tensor) -> None:
    """An integer tensor of one dtype on the device of `like`."""
    if tensor.dtype != dtype:
        fail(op, f"{name} must be {dtype}", tensor.dtype)
    if tensor.device != like.device:
        fail(op, f"{name} must be on the device of the other tensors ({like.device})", tensor.device)


def targets(op: str, tensor: Tensor, V: int, ignore_index: int) -> None:
    """Class indices below V; values are read on a CPU only, at no cost. On a GPU the kernel asserts, in debug mode."""
    if tensor.device.type == "cpu":
        wrong = tensor[(tensor != ignore_index) & ((tensor < 0) | (tensor >= V))]
        if wrong.numel():
            fail(op, f"targets must lie in 0..{V - 1} or be ignore_index ({ignore_index})", int(wrong[0]))


def attention_options(op: str, head_dim: int, scale: float | None, window: int | None) -> tuple[float, int]:
    """The scale to use (1/sqrt(D) unless given) and the window (0 stands for none)."""
    if window is not None and not (isinstance(window, (int, torch.SymInt)) and window >= 1):
        fail(op, "window must be None or an int of at least 1", window)
    window = min(window, MAX_WINDOW) if window else 0
    if scale is None:
        return head_dim**-0.5, window
    if not 0.0 < scale < float("inf"):
        fail(op, "scale must be positive and finite", scale)
    return float(scale), window


def heads(op: str, q_heads: int, kv_heads: int, head_dim: int) -> None:
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        fail(op, f"head dimension D must lie in 1..{MAX_HEAD_DIM}", head_dim)
    if kv_heads < 1 or q_heads % kv_heads:
        fail(op, "query heads H must be a multiple of key and value heads Hkv", f"{q_heads} and {kv_heads}")


def no_gradient(op: str, **tensors: Tensor) -> None:
    """The cache operators have no gradient: an error is better than one that is silently missing."""
    _operator.refuse_tangents(op, *tensors.values())
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                fail(
                    op, f"{name} must not require a gradient (there is none; use torch.no_grad())", "requires_grad=True"
                )


def transposed(weight: Tensor) -> bool:
    """Whether a matrix is dense along its first axis only, as transformers' GPT-2 stores its weights."""
    return weight.stride(0) == 1 and weight.stride(1) != 1


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy if its last axis is not dense: kernels load rows as vectors."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """(rows, C) with a dense last axis: a view if the leading axes merge into one, else a copy."""
    return unit_last_stride(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))  # -1 is ambiguous where C is 0


def as_shape(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A new, contiguous result in another shape, but not as a view: FSDP's hooks warn about results that are views."""
    return y if y.shape == shape else torch.ops.aten._unsafe_view(y, shape)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own host function takes ten times as long, 2 us per call."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def tile_for(table: Mapping[tuple[int, int, int], Tile], tensor: Tensor, width: int | None = None) -> Tile:
    """The first matching row of a launch table keyed by (minimum compute capability, element size, maximum head
    dimension).

    `width` replaces the head dimension if a kernel needs the registers of a wider one.
    """
    arch, size, width = _runtime.architecture(tensor.device), tensor.element_size(), width or tensor.shape[-1]
    return next(
        row for (least, bytes_, most), row in table.items() if arch >= least and size == bytes_ and width <= most
    )


def product_tile(table: Mapping[tuple[int, int], Tile], tensor: Tensor) -> Tile:
    """The first matching row of a launch table keyed by (minimum compute capability, element size)."""
    arch, size = _runtime.architecture(tensor.device), tensor.element_size()
    return next(row for (least, bytes_), row in table.items() if arch >= least and size == bytes_)


def cpu_flash_serves(q: Tensor, k: Tensor, causal: bool, window: int, seed: Tensor | None) -> bool:
    """Whether PyTorch's CPU flash attention computes this, to our accuracy: it knows neither windows nor grouped heads
    nor our dropout, aligns the causal mask top-left, and keeps float16 scores in float16."""
    if q.device.type != "cpu" or window or seed is not None or q.shape[2] != k.shape[2]:
        return False
    same_length = q.shape[1] == k.shape[1] or not causal
    return same_length and q.numel() > 0 and k.numel() > 0 and q.dtype != torch.float16


def dense_heads_first(*tensors: Tensor) -> list[Tensor]:
    """(B, H, T, D) views with a dense last axis, which PyTorch's CPU flash attention assumes without checking."""
    return [unit_last_stride(t).transpose(1, 2) for t in tensors]
