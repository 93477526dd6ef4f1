"""paged_decode_: it writes what append_kv_ writes, and attends to that, in one launch."""

from __future__ import annotations

import pytest
import torch
from test_paged import FLOAT8, SPLIT_BORDERS, Batch, dense, gathered, lay_out, make_batch, with_float8
from tolerance import DTYPES, assert_accurate
from torch import Tensor
from torch.library import opcheck

import gpt2_kernels as ops
from gpt2_kernels import paged


def arguments(batch: Batch) -> dict[str, Tensor]:
    """The batch before its last keys and values are in the cache: their slots hold NaN, in float8 too.

    k and v are views, as GPT-2's projection gives them.
    """
    block_size, S = batch.k_cache.shape[1], len(batch.context_lens)
    last = (batch.context_lens - 1).long()
    slots = batch.block_table.long().gather(1, (last.clamp(min=0) // block_size)[:, None])[:, 0] * block_size
    slots = torch.where(last >= 0, slots + last % block_size, -1)
    kv = torch.zeros(S, 2, *batch.k_cache.shape[2:], dtype=batch.k_cache.dtype, device=slots.device)
    caches = batch.k_cache.clone(), batch.v_cache.clone()
    for s, slot in enumerate(slots.tolist()):
        for i, cache in enumerate(caches if slot >= 0 else ()):
            place = cache[slot // block_size, slot % block_size]
            kv[s, i] = place
            place.copy_(torch.full_like(place, torch.nan))
    return {
        "q": batch.q,
        "k": kv[:, 0],
        "v": kv[:, 1],
        "k_cache": caches[0],
        "v_cache": caches[1],
        "slots": slots,
        "block_table": batch.block_table,
        "context_lens": batch.context_lens,
    }


def check(batch: Batch, window: int | None = None) -> Tensor:
    given = arguments(batch)
    out = ops.paged_decode_(**given, window=window)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(given[name], getattr(batch, name), rtol=0, atol=0, equal_nan=True)
    cu, texts = batch.cu_seqlens_q.tolist(), gathered(batch)
    exact = [(k.double(), v.double()) for k, v in texts]
    assert_accurate(out, dense(batch.q, texts, cu, window), dense(batch.q.double(), exact, cu, window))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "Hkv"), [(2, 2), (6, 2), (18, 1)], ids=str)  # 18: two programs read the same keys
def test_the_new_key_at_the_borders_of_blocks_and_splits(
    path: torch.device, H: int, Hkv: int, dtype: torch.dtype
) -> None:
    """Alone in the sequence, in its block and in its split; with 33, a cache block crosses a split."""
    contexts = [1, 2, 16, 17, *SPLIT_BORDERS]
    for block_size in (16, 33):
        check(make_batch(path, dtype, contexts, [1] * len(contexts), H=H, Hkv=Hkv, D=32, block_size=block_size)[0])


@pytest.mark.parametrize("Hkv", [4, 2])
@pytest.mark.parametrize("D", [1, 33, 80, 256])
def test_any_head_dimension(path: torch.device, D: int, Hkv: int) -> None:
    check(make_batch(path, torch.bfloat16, [300, 9], [1, 1], H=4, Hkv=Hkv, D=D)[0])


@pytest.mark.parametrize("Hkv", [2, 1])
@pytest.mark.parametrize("window", [1, 2, 44, 45, 256, 300, 5000])  # 1: the new key alone
def test_window(path: torch.device, window: int, Hkv: int) -> None:
    contexts = [1, 64, 257, 300, 600]
    check(make_batch(path, torch.float32, contexts, [1] * 5, Hkv=Hkv, D=16)[0], window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("Hkv", [4, 2])
def test_a_float8_cache(path: torch.device, Hkv: int, dtype: torch.dtype) -> None:
    """New keys are attended to as stored, rounded."""
    batch, _ = make_batch(path, dtype, [300, 40, 257, 1], [1] * 4, H=4, Hkv=Hkv, D=33)
    batch, scales, exact = with_float8(batch, path)
    given = arguments(batch)
    for name in ("k", "v"):
        given[name] = (given[name].float() * scales[f"{name}_scale"][:, None]).to(dtype)
        given[name] *= 1 + torch.finfo(dtype).eps  # not representable in float8
    alike = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    ops.append_kv_(given["k"], given["v"], *alike.values(), given["slots"], **scales)
    out = ops.paged_decode_(**given, **scales)
    for name, cache in alike.items():
        assert torch.equal(given[name].view(torch.uint8), cache.view(torch.uint8))
    values = [alike[f"{n}_cache"].double() * scales[f"{n}_scale"][:, None].double() for n in "kv"]
    cu, texts = batch.cu_seqlens_q.tolist(), gathered(exact._replace(k_cache=values[0], v_cache=values[1]))
    assert_accurate(out, dense(batch.q, texts, cu), dense(batch.q.double(), texts, cu))


def test_rows_without_a_new_token(path: torch.device) -> None:
    """An idle row writes nothing and gives 0; slot -1 with a context attends to what the cache holds, bit for bit."""
    batch, _ = make_batch(path, torch.float32, [300, 0, 513, 7], [1] * 4, D=16)
    given = arguments(batch)
    given["slots"] = given["slots"].clone()
    given["slots"][2:] = -1
    for name in ("k_cache", "v_cache"):
        given[name] = getattr(batch, name).clone()
    given["k"][1:], given["v"][1:] = torch.nan, torch.nan
    out = ops.paged_decode_(**given)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(given[name], getattr(batch, name), rtol=0, atol=0, equal_nan=True)
    assert not out[1].any() and out[0].all()
    assert torch.equal(out[2:], ops.paged_attention(*batch)[2:])


@pytest.mark.parametrize("Hkv", [2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_the_sequence_alone(path: torch.device, dtype: torch.dtype, Hkv: int) -> None:
    """Alone or in a batch, whatever the size and order of blocks and the table's width; and when repeated."""
    contexts = [600, 1, 257, 256]
    texts = [tuple(torch.randn(2, context, Hkv, 16, device=path).to(dtype)) for context in contexts]
    q = torch.randn(4, 2, 16, device=path).to(dtype)
    expected = check(lay_out(q, texts, [1] * 4, 16))
    for block_size, spare in ((16, 1), (16, 40), (8, 0), (33, 0), (256, 7)):
        assert torch.equal(check(lay_out(q, texts, [1] * 4, block_size, spare)), expected), (block_size, spare)
    for s in range(4):
        assert torch.equal(check(lay_out(q[s : s + 1], texts[s : s + 1], [1], 16, spare=0)), expected[s : s + 1]), s


def test_token_after_token(path: torch.device) -> None:
    """A sequence that grows from nothing past a split, in a cache that starts as NaN."""
    K, V = torch.randn(2, 300, 2, 16, device=path)
    caches = [torch.full((20, 16, 2, 16), torch.nan, device=path) for _ in range(2)]
    table = torch.randperm(20, device=path).to(torch.int32)[None]
    wanted = (0, 1, 15, 16, 254, 255, 256, 299)
    for t in range(300):
        slot = table[:, t // 16].long() * 16 + t % 16
        if t not in wanted:
            ops.append_kv_(K[t : t + 1], V[t : t + 1], *caches, slot)
            continue
        q, length = torch.randn(1, 2, 16, device=path), torch.tensor([t + 1], dtype=torch.int32, device=path)
        out = ops.paged_decode_(q, K[t : t + 1], V[t : t + 1], *caches, slot, table, length)
        truth = dense(q.double(), [(K[: t + 1].double(), V[: t + 1].double())], [0, 1])
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


def test_more_sequences_than_one_launch_takes(path: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, _ = make_batch(path, torch.float32, [3, 20, 1, 7, 300], [1] * 5, D=16)
    expected = check(batch)
    monkeypatch.setattr(paged, "MAX_SEQUENCES", 2)
    assert torch.equal(check(batch), expected)
    given = arguments(batch)
    none = {name: given[name][:0] for name in ("q", "k", "v", "slots", "block_table", "context_lens")}
    assert ops.paged_decode_(**{**given, **none}).shape == (0, 2, 16)


def test_a_new_key_that_the_context_does_not_count(path: torch.device) -> None:
    if not ops.path_of("paged_decode_", "cpu").startswith("Triton"):
        pytest.skip("asserted by the kernel, in the interpreter and under TRITON_DEBUG=1")
    given = arguments(make_batch(path, torch.float32, [20, 3], [1] * 2, D=16)[0])
    with pytest.raises(Exception, match="paged_decode_: a new key that context_lens does not count"):
        ops.paged_decode_(**{**given, "context_lens": given["context_lens"] * 0})


def test_opcheck(path: torch.device) -> None:
    batch, _ = make_batch(path, torch.float32, [20, 0, 300], [1] * 3, D=16)
    opcheck(torch.ops.gpt2_kernels.paged_decode_.default, (*arguments(batch).values(), 0.25, 0))


def test_bad_input(path: torch.device) -> None:
    batch, _ = make_batch(path, torch.float32, [20, 3], [1] * 2, D=16)
    given = arguments(batch)
    kept = [given[name].clone() for name in ("k_cache", "v_cache")]
    grad = torch.zeros_like(given["k"]).requires_grad_()
    for changes, message in (
        ({"q": given["q"][0]}, r"q must be \(S, H, D\)"),
        ({"k": given["k"][:1]}, r"k must be \(S, Hkv, D\) = \(2, 2, 16\), got \(1, 2, 16\)"),
        ({"v": given["v"][..., :8]}, r"v must be \(S, Hkv, D\) = \(2, 2, 16\)"),
        ({"k": given["k"].half()}, r"k must have the dtype of q"),
        ({"slots": given["slots"].int()}, r"slots must be torch.int64"),
        ({"slots": given["slots"][:1]}, r"slots must be \(S,\) = \(2,\), got \(1,\)"),
        ({"block_table": given["block_table"][:1]}, r"context_lens must be \(S,\) = \(1,\)"),
        ({"context_lens": given["context_lens"].long()}, r"context_lens must be torch.int32"),
        ({"v_cache": given["v_cache"][:1]}, r"v_cache must be the shape of k_cache"),
        ({"k_cache": given["k_cache"].to(FLOAT8)}, r"v_cache must have the dtype of k_cache"),
        ({"k_cache": given["k_cache"].transpose(2, 3).contiguous().transpose(2, 3)}, r"last axis of k_cache"),
        ({"window": 0}, r"window must be None or an int of at least 1"),
        ({"k": grad}, r"k must not require a gradient"),
    ):
        with pytest.raises(ValueError, match=f"paged_decode_: {message}"):
            ops.paged_decode_(**{**given, **changes})
    rows = {name: torch.cat([given[name]] * 2) for name in ("block_table", "context_lens")}
    with pytest.raises(ValueError, match=r"paged_decode_: block_table must be \(S, max_blocks\) = \(2, \d\)"):
        ops.paged_decode_(**{**given, **rows})
    for cache, before in zip((given["k_cache"], given["v_cache"]), kept):
        torch.testing.assert_close(cache, before, rtol=0, atol=0, equal_nan=True)
