"""flash-attn's functions against their documented behaviour, written out in float64."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tolerance import assert_accurate, wide
from torch import Tensor

import gpt2_kernels as ops
from gpt2_kernels.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)


def seen(Tq: int, Tk: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """Query i sees keys i + Tk - Tq - left .. i + Tk - Tq + right, as flash-attn's docstrings say."""
    left, right = window
    right = 0 if causal else right
    i, j = torch.arange(Tq)[:, None] + Tk - Tq, torch.arange(Tk)[None]
    keep = torch.ones(Tq, Tk, dtype=torch.bool)
    if left >= 0:
        keep &= j >= i - left
    if right >= 0:
        keep &= j <= i + right
    return keep


def written_out(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int], scale: float | None
) -> tuple[Tensor, Tensor]:
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    keep = seen(q.shape[1], k.shape[1], causal, window).to(q.device)
    lse = torch.logsumexp(scores.masked_fill(~keep, -torch.inf), -1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(~keep, 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


CASES: dict[str, dict[str, Any]] = {
    "full": dict(),
    "causal": dict(causal=True),
    "causal window": dict(causal=True, window_size=(3, -1)),
    "window that ends at the query": dict(window_size=(2, 0)),
    "window of one": dict(window_size=(0, 0)),
    "no left border, to the query": dict(window_size=(-1, 0)),
    "borders wider than the keys": dict(window_size=(50, 50)),
    "scale": dict(softmax_scale=0.3),
}


@pytest.mark.parametrize("lengths", [(7, 7), (3, 9), (9, 4)], ids=str)  # equal; a cache before; rows with no key
@pytest.mark.parametrize("name", CASES)
def test_func(path: torch.device, name: str, lengths: tuple[int, int]) -> None:
    Tq, Tk = lengths
    q = torch.randn(2, Tq, 4, 16, device=path, requires_grad=True)
    k, v = (torch.randn(2, Tk, 2, 16, device=path, requires_grad=True) for _ in range(2))
    options = CASES[name]
    asked = options.get("causal", False), options.get("window_size", (-1, -1)), options.get("softmax_scale")
    out, lse, mask = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert mask is None and torch.equal(flash_attn_func(q, k, v, **options), out)
    exact = wide(q, k, v)
    truth, true_lse = written_out(*exact, *asked)
    assert_accurate(out, written_out(q, k, v, *asked)[0], truth)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(truth, exact, grad.double())
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), grad), expected):
        if theirs.isfinite().all():  # written out, a row that sees no key has no finite gradient
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["full", "causal", "causal window"])
def test_varlen(path: torch.device, name: str) -> None:
    options = CASES[name]
    asked = options.get("causal", False), options.get("window_size", (-1, -1)), None
    q_lengths, k_lengths = (5, 1, 8), (5, 9, 8)
    q = torch.randn(sum(q_lengths), 4, 16, device=path)
    k, v = torch.randn(2, sum(k_lengths), 2, 16, device=path)
    cu_q, cu_k = (
        torch.tensor([0, *lengths], device=path).cumsum(0).to(torch.int32) for lengths in (q_lengths, k_lengths)
    )
    out, lse, mask = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 8, 9, return_attn_probs=True, **options)
    assert mask is None and torch.equal(flash_attn_varlen_func(q, k, v, cu_q, cu_k, 8, 9, **options), out)
    for rows, keys in zip(ops.reference.spans(cu_q), ops.reference.spans(cu_k)):
        truth, true_lse = written_out(q[None, rows].double(), k[None, keys].double(), v[None, keys].double(), *asked)
        torch.testing.assert_close(out[rows].double(), truth[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:, rows].double(), true_lse[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_packed_is_the_same_as_apart(path: torch.device, name: str) -> None:
    """Results, logsumexp and gradients are equal, bit for bit."""
    options = {"return_attn_probs": True, **CASES[name]}
    qkv = torch.randn(2, 9, 3, 2, 16, device=path, requires_grad=True)
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    flat, cu = qkv.flatten(0, 1), torch.tensor([0, 5, 18], dtype=torch.int32, device=path)
    apart = flash_attn_func(*qkv.unbind(2), **options)
    varlen = flash_attn_varlen_func(*flat.unbind(1), cu, cu, 13, 13, **options)
    for found, expected in (
        (flash_attn_qkvpacked_func(qkv, **options), apart),
        (flash_attn_kvpacked_func(q, kv, **options), apart),
        (flash_attn_varlen_qkvpacked_func(flat, cu, 13, **options), varlen),
        (flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 13, 13, **options), varlen),
    ):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and found[2] is None
        grad = torch.randn_like(found[0])
        ours, theirs = (torch.autograd.grad(out[0], qkv, grad, retain_graph=True)[0] for out in (found, expected))
        assert torch.equal(ours, theirs)
    with pytest.raises(
        ValueError, match=r"flash_attn_kvpacked_func: kv must be \(B, Tk, 2, Hkv, D\) = \(2, 9, 2, 2, 16"
    ):
        flash_attn_kvpacked_func(q, qkv)
    with pytest.raises(ValueError, match=r"flash_attn_varlen_qkvpacked_func: qkv must be \(N, 3, H, D\), got"):
        flash_attn_varlen_qkvpacked_func(qkv, cu, 13)


def test_dropout_is_honoured(path: torch.device) -> None:
    q, k, v = torch.randn(3, 1, 9, 2, 16, device=path)
    cu = torch.tensor([0, 9], dtype=torch.int32, device=path)
    torch.manual_seed(1)
    dense = flash_attn_func(q, k, v, 0.5, causal=True)
    torch.manual_seed(1)
    packed = flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 9, 9, 0.5, causal=True)
    torch.testing.assert_close(dense[0], packed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(dense, flash_attn_func(q, k, v, causal=True))


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("Tq, new", [(1, 1), (3, 3), (1, 0), (2, 4)])  # decode, chunk, read alone, more new keys
def test_kvcache(path: torch.device, paged: bool, Tq: int, new: int) -> None:
    B, Tmax, Hkv, D, block = 3, 16, 2, 16, 4
    lengths = torch.tensor([5, 0 if new else 2, 12], dtype=torch.int32, device=path)
    cache = torch.randn(2, B, Tmax, Hkv, D, device=path)
    q = torch.randn(B, Tq, 4, D, device=path)
    k, v = torch.randn(2, B, new, Hkv, D, device=path) if new else (None, None)
    expected = cache.clone()
    for b in range(B):
        if k is not None and v is not None:
            expected[0, b, lengths[b] : lengths[b] + new] = k[b]
            expected[1, b, lengths[b] : lengths[b] + new] = v[b]
    given, options = cache.clone(), {}
    if paged:
        order = torch.randperm(B * Tmax // block, device=path)  # block i of the batch lies at order[i]
        pages = torch.empty(2, len(order), block, Hkv, D, device=path)
        pages[:, order] = given.view(2, -1, block, Hkv, D)
        given, options = pages, {"block_table": order.view(B, -1).to(torch.int32)}
    out = flash_attn_with_kvcache(q, given[0], given[1], k, v, cache_seqlens=lengths, causal=True, **options)
    written = given[:, order].reshape(cache.shape) if paged else given
    assert torch.equal(written, expected)
    for b in range(B):
        keys, values = expected[:, b : b + 1, : lengths[b] + new].double()
        truth, _ = written_out(q[b : b + 1].double(), keys, values, True, (-1, -1), None)
        torch.testing.assert_close(out[b : b + 1].double(), truth, rtol=1e-5, atol=1e-5)


def test_kvcache_rows_by_index_an_int_and_a_window(path: torch.device) -> None:
    cache = torch.randn(2, 5, 8, 2, 16, device=path)
    q, rows = torch.randn(2, 1, 2, 16, device=path), torch.tensor([3, 0], dtype=torch.int32, device=path)
    out = flash_attn_with_kvcache(q, *cache, cache_seqlens=6, cache_batch_idx=rows, window_size=(2, 0))
    keys, values = cache[:, [3, 0], :6].double()
    truth, _ = written_out(q.double(), keys, values, True, (2, -1), None)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    full = flash_attn_with_kvcache(q, cache[0, :2], cache[1, :2])  # a full cache; one query needs no causal mask
    truth, _ = written_out(q.double(), *cache[:, :2].double(), False, (-1, -1), None)
    torch.testing.assert_close(full.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("Tq", [1, 3])
def test_kvcache_compiles_whole(production: torch.device, Tq: int) -> None:
    """Whether the new keys fit is asserted in the graph; a branch on it would break the graph on a CPU."""
    cache = torch.randn(2, 2, 8, 2, 16, device=production)
    q, k, v = torch.randn(3, 2, Tq, 2, 16, device=production)
    lengths = torch.tensor([0, 5], dtype=torch.int32, device=production)
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    ours, theirs = cache.clone(), cache.clone()
    out = compiled(q, *ours, k, v, cache_seqlens=lengths, causal=True)
    expected = flash_attn_with_kvcache(q, *theirs, k, v, cache_seqlens=lengths, causal=True)
    torch.testing.assert_close(out, expected)
    assert torch.equal(ours, theirs) and not torch.equal(ours, cache)
    if production.type == "cpu":  # on a GPU the failed assertion would make it unusable for this process
        with pytest.raises(RuntimeError, match=r"cache_seqlens plus the . tokens of k must lie in 0\.\.8"):
            compiled(q, *ours, k, v, cache_seqlens=lengths + 4, causal=True)


# --- signatures and refusals ----------------------------------------------------------------------------------------


def test_signatures_are_flash_attns() -> None:
    """As flash-attn 2.8 publishes them: code that passes arguments by position keeps its meaning."""
    names = {f.__name__: list(inspect.signature(f).parameters) for f in (flash_attn_func, flash_attn_varlen_func)}
    last = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs".split()
    assert names["flash_attn_func"] == ["q", "k", "v", *last]
    packing = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k".split()
    assert names["flash_attn_varlen_func"] == ["q", "k", "v", *packing, *last, "block_table"]
    for function, first in (
        (flash_attn_qkvpacked_func, ["qkv"]),
        (flash_attn_kvpacked_func, ["q", "kv"]),
        (flash_attn_varlen_qkvpacked_func, ["qkv", "cu_seqlens", "max_seqlen"]),
        (flash_attn_varlen_kvpacked_func, ["q", "kv", *packing]),
    ):
        assert list(inspect.signature(function).parameters) == [*first, *last]
    assert (
        list(inspect.signature(flash_attn_with_kvcache).parameters)
        == (
            "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table "
            "softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
        ).split()
    )


def test_what_is_not_computed_raises(path: torch.device) -> None:
    q = torch.randn(1, 4, 2, 16, device=path)
    cu = torch.tensor([0, 4], dtype=torch.int32, device=path)
    slopes, four = torch.ones(2, device=path), torch.tensor([4], dtype=torch.int32, device=path)
    cases: list[tuple[Any, str]] = [
        (lambda: flash_attn_func(q, q, q, softcap=3.0), "flash_attn_func: softcap must be 0 .*flex_attention"),
        (lambda: flash_attn_func(q, q, q, alibi_slopes=slopes), "flash_attn_func: alibi_slopes must be None"),
        (lambda: flash_attn_func(q, q, q, window_size=(1, 1)), "window_size must not end ahead"),
        (lambda: flash_attn_func(q, q, q, window_size=(1, -1)), "a window must be causal"),
        (lambda: flash_attn_func(q, q, q, window_size=(-2, 0)), "window_size must be at least -1"),
        (lambda: flash_attn_func(q, q, q, 0.1, return_attn_probs=True), "return_attn_probs must be without dropout"),
        (
            lambda: flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 4, 4, block_table=cu[None]),
            "block_table must be None .*paged_attention",
        ),
        (lambda: flash_attn_with_kvcache(q, q, q, rotary_cos=slopes), "rotary_cos must be None"),
        (lambda: flash_attn_with_kvcache(q, q, q, cache_leftpad=four), "cache_leftpad must be None"),
        (lambda: flash_attn_with_kvcache(q, q, q, return_softmax_lse=True), "return_softmax_lse must be False"),
        (lambda: flash_attn_with_kvcache(q, q, q), "causal must be True for more than one query"),
        (lambda: flash_attn_with_kvcache(q, q, q, q, q), "cache_seqlens must say where k and v go"),
        (lambda: flash_attn_with_kvcache(q, q, q, q, cache_seqlens=0), "k and v must come together"),
    ]
    if path.type == "cpu":
        full = dict(cache_seqlens=four, causal=True)
        cases.append((lambda: flash_attn_with_kvcache(q, q, q, q, q, **full), r"must lie in 0..4, got \[4\]"))
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_nothing_is_written_before_all_is_checked(path: torch.device) -> None:
    q, new = torch.zeros(1, 2, 3, 16, device=path), torch.ones(1, 2, 2, 16, device=path)
    cache = torch.zeros(1, 8, 2, 16, device=path)
    for changes in (
        {"q": q},
        {"softmax_scale": -1.0},
        {"q": q[:, :, :2].half()},
        {"block_table": cache[0, :1, 0].long()},
    ):
        arguments = {"q": q[:, :, :2], "causal": True, "cache_seqlens": 0, **changes}
        with pytest.raises(ValueError, match="flash_attn_with_kvcache: "):
            flash_attn_with_kvcache(arguments.pop("q"), cache, cache, new, new, **arguments)
        assert not cache.any()
