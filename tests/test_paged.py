"""paged_attention against float64 PyTorch over the same keys laid side by side."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from tolerance import DTYPES, assert_accurate
from torch import Tensor
from torch.library import opcheck

import gpt2_kernels as ops
from gpt2_kernels import paged


class Batch(NamedTuple):
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int


def make_batch(
    device: torch.device,
    dtype: torch.dtype,
    contexts: list[int],
    queries: list[int],
    *,
    H: int = 2,
    Hkv: int = 2,
    D: int = 64,
    block_size: int = 16,
) -> tuple[Batch, list[tuple[Tensor, Tensor]]]:
    """A batch over shuffled blocks whose unused parts are NaN, and each sequence's keys and values side by side."""
    needed = [-(-c // block_size) for c in contexts]
    num_blocks = sum(needed) + 2
    caches = [
        torch.full((num_blocks, Hkv, block_size, D), torch.nan, dtype=dtype, device=device).transpose(1, 2)
        for _ in range(2)
    ]
    order = iter(torch.randperm(num_blocks).tolist())
    table = torch.full((len(contexts), max([*needed, 1]) + 1), -1, dtype=torch.int32)  # the tail is never read
    texts = []
    for s, context in enumerate(contexts):
        k, v = torch.randn(2, context, Hkv, D, device=device).to(dtype)
        for b in range(needed[s]):
            block = next(order)
            table[s, b] = block
            part = slice(b * block_size, min(context, (b + 1) * block_size))
            for cache, rows in zip(caches, (k, v)):
                cache[block, : part.stop - part.start] = rows[part]
        texts.append((k, v))
    cu = [0, *itertools.accumulate(queries)]
    q = 2 * torch.randn(cu[-1], 3, H, D, device=device).to(dtype)[:, 0]  # a view, as GPT-2's projection gives it
    int32 = {"dtype": torch.int32, "device": device}
    return Batch(
        q, *caches, table.to(device), torch.tensor(contexts, **int32), torch.tensor(cu, **int32), max([*queries, 0])
    ), texts


def dense(q: Tensor, texts: list[tuple[Tensor, Tensor]], cu: list[int], window: int | None = None) -> Tensor:
    """The same by a loop over sequences and a mask, in the dtype that is given."""
    out = torch.zeros_like(q)
    for (k, v), first, last in zip(texts, cu, cu[1:]):
        H, (context, Hkv, D) = q.shape[1], k.shape
        k, v = (t.to(q.dtype).repeat_interleave(H // Hkv, dim=1) for t in (k, v))
        at = torch.arange(context - (last - first), context, device=q.device)[:, None]
        j = torch.arange(context, device=q.device)
        hidden = (j > at) | (j <= at - (window or context + 1))
        scores = torch.einsum("ihd,jhd->hij", q[first:last], k) * D**-0.5
        out[first:last] = torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return out


def check(batch: Batch, texts: list[tuple[Tensor, Tensor]], window: int | None = None) -> Tensor:
    out = ops.paged_attention(*batch, window=window)
    cu = batch.cu_seqlens_q.tolist()
    exact = [(k.double(), v.double()) for k, v in texts]
    assert_accurate(out, dense(batch.q, texts, cu, window), dense(batch.q.double(), exact, cu, window))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 33])
def test_decode(path: torch.device, block_size: int, dtype: torch.dtype) -> None:
    contexts = [1, 16, 17, 100]  # alone, one block, one past it, several
    check(*make_batch(path, dtype, contexts, [1] * 4, block_size=block_size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill(path: torch.device, dtype: torch.dtype) -> None:
    contexts = [1, 70, 90, 33]  # whole prompts, and the end of a prompt whose beginning is in the cache
    check(*make_batch(path, dtype, contexts, [1, 70, 20, 5]))


@pytest.mark.parametrize("D", [16, 80, 128, 256])
def test_head_dimensions(path: torch.device, D: int) -> None:
    check(*make_batch(path, torch.float32, [40, 5], [3, 5], H=1, Hkv=1, D=D))


def test_grouped_heads(path: torch.device) -> None:
    check(*make_batch(path, torch.float32, [40, 5], [1, 1], H=6, Hkv=2, D=32))


@pytest.mark.parametrize("window", [1, 20, 1000])
def test_window(path: torch.device, window: int) -> None:
    check(*make_batch(path, torch.float32, [90, 40, 7], [1, 40, 3], D=16), window=window)


def test_empty_sequences(path: torch.device) -> None:
    """No context, no queries, and rows of q behind the last sequence: all give 0 or nothing."""
    batch, texts = make_batch(path, torch.float32, [30, 0, 12], [2, 1, 0], D=16)
    batch = batch._replace(q=torch.cat([batch.q, torch.randn_like(batch.q[:2])]))
    out = ops.paged_attention(*batch)
    assert not out[2:].any()
    truth = dense(batch.q[:2].double(), [(k.double(), v.double()) for k, v in texts[:1]], [0, 2])
    torch.testing.assert_close(out[:2].double(), truth, rtol=1e-5, atol=1e-5)
    assert ops.paged_attention(
        *batch._replace(q=batch.q[:0], cu_seqlens_q=batch.cu_seqlens_q * 0, max_seqlen_q=0)
    ).shape == (0, 2, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_does_not_matter(path: torch.device, dtype: torch.dtype) -> None:
    """The same bits alone and in a batch, for decode and for prefill."""
    for queries in ([1, 1, 1], [5, 40, 1]):
        batch, _ = make_batch(path, dtype, [50, 77, 3], queries, D=32)
        together = ops.paged_attention(*batch)
        cu = batch.cu_seqlens_q.tolist()
        for s in range(3):
            one = Batch(
                batch.q[cu[s] : cu[s + 1]],
                batch.k_cache,
                batch.v_cache,
                batch.block_table[s : s + 1],
                batch.context_lens[s : s + 1],
                torch.tensor([0, queries[s]], dtype=torch.int32, device=path),
                # decode and prefill have a tile each, and the caller says which: a prompt's last token is prefill too
                max(queries[s], 2) if max(queries) > 1 else 1,
            )
            assert torch.equal(ops.paged_attention(*one), together[cu[s] : cu[s + 1]])


def test_opcheck(path: torch.device) -> None:
    batch, _ = make_batch(path, torch.float32, [20, 9], [1, 1], D=16)
    opcheck(torch.ops.gpt2_kernels.paged_attention.default, (*batch, 0.25, 0))


def test_bad_input(path: torch.device) -> None:
    batch, _ = make_batch(path, torch.float32, [20, 9], [1, 1], D=16)
    for changes, message in [
        ({"q": batch.q[0]}, r"paged_attention: q must be \(Nq, H, D\), got \(2, 16\)"),
        ({"k_cache": batch.k_cache[..., :8]}, r"paged_attention: k_cache must be"),
        (
            {"block_table": batch.block_table.long()},
            r"paged_attention: block_table must be torch.int32, got torch.int64",
        ),
        (
            {"context_lens": batch.context_lens[:1]},
            r"paged_attention: context_lens must be \(S,\) = \(2,\), got \(1,\)",
        ),
        ({"cu_seqlens_q": batch.cu_seqlens_q[:2]}, r"paged_attention: cu_seqlens_q must be \(S \+ 1,\) = \(3,\)"),
        ({"max_seqlen_q": -1}, r"paged_attention: max_seqlen_q must be at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.paged_attention(*batch._replace(**changes))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("block_table", [[99] * 3, [0] * 3], "block"),
        ("context_lens", [2000, 9], "context_lens"),
        ("cu_seqlens_q", [0, 2, 1], "cu_seqlens_q"),
    ],
)
def test_indices_are_checked_on_a_cpu(name: str, values: list, message: str, production: torch.device) -> None:
    if production.type == "cuda":
        pytest.skip("a device assertion would end the CUDA context")
    batch, _ = make_batch(production, torch.float32, [20, 9], [1, 1], D=16)
    with pytest.raises((ValueError, RuntimeError), match=f"paged_attention: {message}"):
        ops.paged_attention(*batch._replace(**{name: torch.tensor(values, dtype=torch.int32)}))


def test_a_gradient_is_refused(path: torch.device) -> None:
    batch, _ = make_batch(path, torch.float32, [20, 9], [1, 1], D=16)
    with pytest.raises(ValueError, match="paged_attention: q must not require a gradient"):
        ops.paged_attention(*batch._replace(q=batch.q.clone().requires_grad_()))
    k = torch.zeros(1, 2, 16, device=path, requires_grad=True)
    with pytest.raises(ValueError, match="append_kv_: k must not require a gradient"):
        ops.append_kv_(k, k.detach(), batch.k_cache, batch.v_cache, torch.tensor([0], device=path))


def test_a_stride_of_tokens_beyond_two_to_the_27(path: torch.device) -> None:
    """Offset in a block times stride leaves int32; the memory between is never touched."""
    if path.type == "cuda" and torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    stride, D = 2**28, 16
    storage = torch.empty(12 * stride, dtype=torch.float16, device=path)
    cache = storage.as_strided((1, 12, 1, D), (0, stride, D, 1))
    cache.copy_(torch.randn(1, 12, 1, D))
    q = torch.randn(1, 1, D, device=path).to(torch.float16)
    indices = [torch.tensor(v, dtype=torch.int32, device=path) for v in ([[0]], [12], [0, 1])]
    compact = cache.contiguous()
    assert torch.equal(
        ops.paged_attention(q, cache, cache, *indices, 1), ops.paged_attention(q, compact, compact, *indices, 1)
    )


@pytest.mark.parametrize("queries", [[1] * 5, [5, 70, 1, 0, 9]], ids=["decode", "prefill"])
def test_more_sequences_than_one_launch_takes(
    path: torch.device, queries: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid's second axis ends at 65535; here at 2, so that three launches serve five sequences, the last alone."""
    batch, _ = make_batch(path, torch.float32, [20, 75, 3, 6, 40], queries, D=16)
    expected = ops.paged_attention(*batch)
    assert expected.abs().amin(dim=(1, 2)).all()  # every row was written
    monkeypatch.setattr(paged, "MAX_SEQUENCES", 2)
    assert torch.equal(ops.paged_attention(*batch), expected)
