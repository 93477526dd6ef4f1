"""flash-attn's functions, with the signatures and the meaning of version 2.8, on our operators.

    from gpt2_kernels.compat.flash_attn import flash_attn_func  # in place of: from flash_attn import ...

Layout and conventions are flash-attn's: q (B, Tq, H, D); the last query is aligned with the last key; window_size
(left, right) keeps keys i - left .. i + right, -1 for no border; softmax_scale is 1/sqrt(D) unless given; a row with no
key gives 0. float32 is taken too. What is not computed (ALiBi, soft caps, rotary embeddings, windows that look ahead)
raises ValueError: nothing is left out in silence. Gradients are deterministic whether that is asked for or not.
Specification: https://github.com/Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt2_kernels import _check
from gpt2_kernels.fused_attention import attention, attention_qkvpacked, attention_varlen
from gpt2_kernels.kv_cache import append_kv_
from gpt2_kernels.paged import paged_attention, paged_decode_

INSTEAD = "torch.nn.functional.scaled_dot_product_attention takes any mask"


def _window(op: str, causal: bool, window_size: tuple[int, int], Tk: int) -> tuple[bool, int | None]:
    """(causal, window) as our functions take them."""
    left, right = window_size
    if left < -1 or right < -1:
        _check.fail(op, "window_size must be at least -1, which is no border", window_size)
    left, right = (-1 if border >= Tk else border for border in (left, right))  # as flash-attn reads them
    if causal or right == 0:
        return True, None if left < 0 else left + 1
    if right > 0:
        _check.fail(op, f"window_size must not end ahead of the query ({INSTEAD})", window_size)
    if left >= 0:
        _check.fail(op, f"a window must be causal, or window_size[1] 0 ({INSTEAD})", window_size)
    return False, None


def _parts(op: str, name: str, tensor: Tensor, number: int, dims: str) -> tuple[Tensor, ...]:
    """What a packed tensor holds along its third axis from the end, as views."""
    _check.rank(op, name, tensor, dims)
    _check.shape(op, name, tensor, (*tensor.shape[:-3], number, *tensor.shape[-2:]), dims)
    return tensor.unbind(-3)


def _refuse(op: str, softcap: float, alibi_slopes: Tensor | None) -> None:
    if softcap:
        _check.fail(op, "softcap must be 0 (torch.nn.attention.flex_attention takes any score_mod)", softcap)
    if alibi_slopes is not None:
        _check.fail(op, f"alibi_slopes must be None ({INSTEAD}, ALiBi's too)", tuple(alibi_slopes.shape))


def _refuse_probabilities(op: str, return_attn_probs: bool, dropout_p: float) -> None:
    if return_attn_probs and dropout_p:
        _check.fail(op, "return_attn_probs must be without dropout: its mask is never stored", dropout_p)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """q (B, Tq, H, D), k and v (B, Tk, Hkv, D) -> (B, Tq, H, D), and with return_attn_probs the logsumexp (B, H, Tq)
    and None, where flash-attn has its mask of dropout."""
    op = "flash_attn_func"
    _refuse(op, softcap, alibi_slopes)
    _refuse_probabilities(op, return_attn_probs, dropout_p)
    causal, window = _window(op, causal, window_size, k.shape[1])
    out, lse = attention(
        q, k, v, causal=causal, scale=softmax_scale, window=window, dropout_p=dropout_p, return_lse=True
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of the parts of qkv (B, T, 3, H, D), whose gradient the kernels write as one."""
    op = "flash_attn_qkvpacked_func"
    _refuse(op, softcap, alibi_slopes)
    _refuse_probabilities(op, return_attn_probs, dropout_p)
    _check.rank(op, "qkv", qkv, "(B, T, 3, H, D)")
    causal, window = _window(op, causal, window_size, qkv.shape[1])
    out, lse = attention_qkvpacked(
        qkv, causal=causal, scale=softmax_scale, window=window, dropout_p=dropout_p, return_lse=True
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` with k and v in kv (B, Tk, 2, Hkv, D)."""
    k, v = _parts("flash_attn_kvpacked_func", "kv", kv, 2, "(B, Tk, 2, Hkv, D)")
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, k, v, *options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Packed sequences: q (Nq, H, D), k and v (Nk, Hkv, D), cu_seqlens (S + 1,) int32 -> (Nq, H, D), and with
    return_attn_probs the logsumexp (H, Nq) and None. For a paged cache call gpt2_kernels.paged_attention."""
    op = "flash_attn_varlen_func"
    _refuse(op, softcap, alibi_slopes)
    _refuse_probabilities(op, return_attn_probs, dropout_p)
    if block_table is not None:
        _check.fail(op, "block_table must be None (gpt2_kernels.paged_attention takes one)", tuple(block_table.shape))
    causal, window = _window(op, causal, window_size, max_seqlen_k)
    options = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    out, lse = attention_varlen(
        q, k, v, *options, causal=causal, scale=softmax_scale, window=window, dropout_p=dropout_p, return_lse=True
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_varlen_func` of the parts of qkv (N, 3, H, D)."""
    q, k, v = _parts("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 3, "(N, 3, H, D)")
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_varlen_func` with k and v in kv (Nk, 2, Hkv, D)."""
    k, v = _parts("flash_attn_varlen_kvpacked_func", "kv", kv, 2, "(Nk, 2, Hkv, D)")
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """q (B, Tq, H, D) over a cache (B or more, Tmax, Hkv, D), or a paged one (num_blocks, block_size, Hkv, D) with
    block_table (B, max_blocks) int32 -> (B, Tq, H, D). No gradient.

    k and v (B, Tnew, Hkv, D), where given, are first written into the cache in place, behind its cache_seqlens tokens
    ((B,) int32, an int for all, or None for a full cache); the queries then see them too. Without causal every query
    sees all of them, which our paged kernel computes for one query, and for more raises ValueError.
    """
    op = "flash_attn_with_kvcache"
    _refuse(op, softcap, alibi_slopes)
    for name, value in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin), ("cache_leftpad", cache_leftpad)):
        if value is not None:
            advice = "rotate q and k before" if "rotary" in name else "gpt2_kernels.attention_varlen takes such batches"
            _check.fail(op, f"{name} must be None ({advice})", tuple(value.shape))
    if return_softmax_lse:
        _check.fail(op, "return_softmax_lse must be False (flash_attn_func has return_attn_probs)", True)
    _check.rank(op, "q", q, "(B, Tq, H, D)")
    _check.rank(op, "k_cache", k_cache, "(B, Tmax, Hkv, D)")
    B, Tq = q.shape[:2]
    if block_table is None:  # a row of the cache is one block of the length of the row
        rows, capacity = k_cache.shape[0], k_cache.shape[1]
        index = torch.arange(B, device=q.device) if cache_batch_idx is None else cache_batch_idx
        _check.shape(op, "cache_batch_idx", index, (B,), "(B,)")
        if cache_batch_idx is None and rows < B:
            _check.fail(op, f"k_cache must have a row for each of the {B} of q", rows)
        block_table = index.to(torch.int32)[:, None]
    elif cache_batch_idx is not None:
        _check.fail(op, "cache_batch_idx must be None where a block_table is given", tuple(cache_batch_idx.shape))
    else:
        _check.rank(op, "block_table", block_table, "(B, max_blocks)")
        capacity = block_table.shape[1] * k_cache.shape[1]
    if cache_seqlens is None:
        if k is not None:
            _check.fail(op, "cache_seqlens must say where k and v go", None)
        cache_seqlens = capacity
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((B,), cache_seqlens, dtype=torch.int32, device=q.device)
    _check.index(op, "cache_seqlens", cache_seqlens, torch.int32, q)
    _check.shape(op, "cache_seqlens", cache_seqlens, (B,), "(B,)")

    if (k is None) != (v is None):
        _check.fail(op, "k and v must come together", "one of them")
    causal, window = _window(op, causal, window_size, capacity)
    if not causal and Tq > 1:
        _check.fail(op, "causal must be True for more than one query (flash_attn_func takes either)", f"Tq = {Tq}")
    options: dict[str, Any] = {"scale": softmax_scale, "window": window}
    lengths, caches = cache_seqlens, (k_cache, v_cache)
    if k is not None and v is not None:
        _check.rank(op, "k", k, "(B, Tnew, Hkv, D)")
        _check.shape(op, "k", k, (B, k.shape[1], *k_cache.shape[2:]), "(B, Tnew, Hkv, D)")
        _check.shape(op, "v", v, tuple(k.shape), "(B, Tnew, Hkv, D)")
        slots = _slots(op, lengths, k, k_cache, block_table)
        lengths = lengths + k.shape[1]
        if Tq == k.shape[1] == 1:
            return paged_decode_(q[:, 0], k[:, 0], v[:, 0], *caches, slots, block_table, lengths, **options)[:, None]
        # What paged_attention will ask, before anything is written.
        _check.paged(op, q.flatten(0, 1), *caches, None, None, block_table, lengths)
        _check.attention_options(op, q.shape[3], softmax_scale, window)
        append_kv_(k.flatten(0, 1), v.flatten(0, 1), *caches, slots)
    cu_seqlens = torch.arange(0, B * Tq + 1, Tq, dtype=torch.int32, device=q.device) if Tq else lengths.new_zeros(B + 1)
    out = paged_attention(q.flatten(0, 1), *caches, block_table, lengths, cu_seqlens, Tq, **options)
    return out.unflatten(0, (B, Tq))


def _slots(op: str, lengths: Tensor, k: Tensor, k_cache: Tensor, block_table: Tensor) -> Tensor:
    """(B Tnew,) where each new token goes: behind the tokens that its row of the cache holds."""
    block_size, room = k_cache.shape[1], block_table.shape[1] * k_cache.shape[1]
    positions = lengths.long()[:, None] + torch.arange(k.shape[1], device=k.device)  # (B, Tnew)
    fits = ((positions >= 0) & (positions < room)).all()
    rule = f"cache_seqlens plus the {k.shape[1]} tokens of k must lie in 0..{room}"
    if k.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(fits, f"{op}: {rule}")  # without waiting for the GPU, and a graph cannot branch
    elif not fits:
        _check.fail(op, rule, lengths.tolist())
    blocks = block_table.long().gather(1, positions.clamp(0, room - 1) // block_size)
    return (blocks * block_size + positions % block_size).flatten()
