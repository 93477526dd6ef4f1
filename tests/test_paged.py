"""paged_attention against float64 PyTorch over the same keys, made contiguous."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from tolerance import DTYPES, assert_accurate
from torch import Tensor
from torch.library import opcheck

import gpt2_kernels as ops
from gpt2_kernels import _launch, _native, _paged_decode, _runtime, paged

Text = tuple[Tensor, Tensor]  # keys and values of a sequence, (context, Hkv, D) each


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
    spare: int = 1,
) -> tuple[Batch, list[Text]]:
    """A batch over shuffled blocks with NaN in unused parts, and each sequence's keys and values, contiguous."""
    texts = [tuple(torch.randn(2, context, Hkv, D, device=device).to(dtype)) for context in contexts]
    q = 2 * torch.randn(sum(queries), 3, H, D, device=device).to(dtype)[:, 0]  # a view, as GPT-2's projection gives it
    return lay_out(q, texts, queries, block_size, spare), texts


def lay_out(q: Tensor, texts: list[Text], queries: list[int], block_size: int, spare: int = 1) -> Batch:
    """The batch of these queries and texts over shuffled blocks; `spare`: unused columns of the table."""
    contexts, (_, Hkv, D), device, dtype = [len(k) for k, _ in texts], texts[0][0].shape, q.device, q.dtype
    needed = [-(-c // block_size) for c in contexts]
    num_blocks = sum(needed) + 2
    caches = [
        torch.full((num_blocks, Hkv, block_size, D), torch.nan, dtype=dtype, device=device).transpose(1, 2)
        for _ in range(2)
    ]
    order = iter(torch.randperm(num_blocks).tolist())
    table = torch.full((len(contexts), max([*needed, 1]) + spare), -1, dtype=torch.int32)  # the tail is never read
    for s, text in enumerate(texts):
        for b in range(needed[s]):
            block = next(order)
            table[s, b] = block
            part = slice(b * block_size, min(contexts[s], (b + 1) * block_size))
            for cache, rows in zip(caches, text):
                cache[block, : part.stop - part.start] = rows[part]
    cu = [0, *itertools.accumulate(queries)]
    int32 = {"dtype": torch.int32, "device": device}
    return Batch(
        q, *caches, table.to(device), torch.tensor(contexts, **int32), torch.tensor(cu, **int32), max([*queries, 0])
    )


def dense(q: Tensor, texts: list[Text], cu: list[int], window: int | None = None) -> Tensor:
    """The same by a loop over sequences and a mask, in the inputs' dtype."""
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


def check(batch: Batch, texts: list[Text], window: int | None = None) -> Tensor:
    out = ops.paged_attention(*batch, window=window)
    cu = batch.cu_seqlens_q.tolist()
    exact = [(k.double(), v.double()) for k, v in texts]
    assert_accurate(out, dense(batch.q, texts, cu, window), dense(batch.q.double(), exact, cu, window))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 33, 256])
def test_decode(path: torch.device, block_size: int, dtype: torch.dtype) -> None:
    contexts = [1, 16, 17, 100]  # one key, one block, one past it, several
    check(*make_batch(path, dtype, contexts, [1] * 4, block_size=block_size))


SPLIT_BORDERS = [255, 256, 257, 512, 513, 1100]  # keys: just below one split, one, one past it, two, one past, several


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "Hkv"), [(2, 2), (6, 2), (18, 1)], ids=str)  # 18: more than one program handles
def test_decode_at_the_borders_of_splits(path: torch.device, H: int, Hkv: int, dtype: torch.dtype) -> None:
    check(*make_batch(path, dtype, SPLIT_BORDERS, [1] * 6, H=H, Hkv=Hkv, D=32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("Hkv", [4, 2])
@pytest.mark.parametrize("D", [1, 33, 80, 256])
def test_decode_of_any_head_dimension(path: torch.device, D: int, Hkv: int, dtype: torch.dtype) -> None:
    check(*make_batch(path, dtype, [300, 9], [1, 1], H=4, Hkv=Hkv, D=D))


@pytest.mark.parametrize("Hkv", [2, 1])
@pytest.mark.parametrize("window", [1, 44, 45, 256, 300, 5000])  # 44: the last split alone
def test_decode_through_a_window(path: torch.device, window: int, Hkv: int) -> None:
    check(*make_batch(path, torch.float32, [556, 255, 7], [1] * 3, Hkv=Hkv, D=16), window=window)


@pytest.mark.parametrize("Hkv", [2, 1])
@pytest.mark.parametrize("window", [None, 300, 513, 1100])
def test_decode_of_long_texts_has_wider_splits(
    path: torch.device, window: int | None, Hkv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where scratch for every 256 keys would be too much. A sequence's bits do not depend on the table's width."""
    if ops.path_of("paged_attention", path.type).startswith("Triton"):
        monkeypatch.setattr(_paged_decode, "MAX_PARTS", 3)
    batch, texts = make_batch(path, torch.float32, [2000, 513, 512, 20, 1025], [1] * 5, Hkv=Hkv, D=16)
    check(batch, texts, window=window)
    out = ops.paged_attention(*batch, window=window)
    for s in range(5):
        blocks = -(-int(batch.context_lens[s]) // batch.k_cache.shape[1])  # no wider than this sequence needs
        alone = batch._replace(
            q=batch.q[s : s + 1],
            block_table=batch.block_table[s : s + 1, :blocks],
            context_lens=batch.context_lens[s : s + 1],
            cu_seqlens_q=batch.cu_seqlens_q[:2],
        )
        assert torch.equal(ops.paged_attention(*alone, window=window)[0], out[s])


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
    """No context, no queries, and rows of q after the last sequence: all give 0 or nothing."""
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
                # decode and prefill use different tiles, chosen by the caller: a prompt's last token is prefill too
                max(queries[s], 2) if max(queries) > 1 else 1,
            )
            assert torch.equal(ops.paged_attention(*one), together[cu[s] : cu[s + 1]])


@pytest.mark.parametrize("Hkv", [2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_decode_depend_on_the_sequence_alone(path: torch.device, dtype: torch.dtype, Hkv: int) -> None:
    """Alone or in a batch, whatever the size and order of blocks and the table's width; and when repeated."""
    contexts = [600, 1, 257, 256]
    texts = [tuple(torch.randn(2, context, Hkv, 16, device=path).to(dtype)) for context in contexts]
    q = torch.randn(4, 2, 16, device=path).to(dtype)
    expected = ops.paged_attention(*lay_out(q, texts, [1] * 4, 16))
    for block_size, spare in ((16, 1), (16, 40), (8, 0), (33, 0), (256, 7)):
        batch = lay_out(q, texts, [1] * 4, block_size, spare)
        assert torch.equal(ops.paged_attention(*batch), expected), (block_size, spare)
    for s in range(4):
        alone = lay_out(q[s : s + 1], texts[s : s + 1], [1], 16, spare=0)
        assert torch.equal(ops.paged_attention(*alone), expected[s : s + 1]), s


CHUNKS = [[64, 64, 22], [1, 149], [50, 50, 50], [100, 0, 50]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_chunks_of_a_prompt_give_the_bits_of_the_whole(
    path: torch.device, chunks: list[int], dtype: torch.dtype
) -> None:
    """Even if the first chunks came from another request's prefix: their keys are in the cache like any others."""
    batch, texts = make_batch(path, dtype, [150], [150], D=32)
    expected = ops.paged_attention(*batch)
    done = 0
    for chunk in chunks:
        part = [(k[: done + chunk], v[: done + chunk]) for k, v in texts]
        out = ops.paged_attention(*lay_out(batch.q[done : done + chunk], part, [chunk], 16)._replace(max_seqlen_q=300))
        assert torch.equal(out, expected[done : done + chunk]), done
        done += chunk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_where_pytorch_computes(dtype: torch.dtype) -> None:
    """Without a compiler every dtype takes float16's path."""
    device = torch.device("cpu")
    with _runtime.force("torch"):
        for chunks in CHUNKS:
            test_chunks_of_a_prompt_give_the_bits_of_the_whole(device, chunks, dtype)
        check(*make_batch(device, dtype, [7, 0, 64, 200], [7, 0, 64, 90], D=32), window=70)


def test_decode_of_nothing(path: torch.device) -> None:
    """No context, sequences without a query, rows after the last sequence and no sequence at all give 0."""
    batch, texts = make_batch(path, torch.float32, [300, 0, 12, 0], [1, 1, 0, 1], D=16)
    poison = torch.full((40, 2, 16), torch.nan, device=path)  # so that reused memory is not zero by luck
    del poison
    out = ops.paged_attention(*batch._replace(q=torch.cat([batch.q, torch.ones_like(batch.q)])))
    assert out[0].abs().min() > 0 and not out[1:].any()
    truth = dense(batch.q[:1].double(), [(k.double(), v.double()) for k, v in texts[:1]], [0, 1])
    torch.testing.assert_close(out[:1].double(), truth, rtol=1e-5, atol=1e-5)
    none = batch._replace(
        block_table=batch.block_table[:0], context_lens=batch.context_lens[:0], cu_seqlens_q=batch.cu_seqlens_q[:1]
    )
    out = ops.paged_attention(*none)
    assert out.shape == (3, 2, 16) and not out.any()


def test_tickets_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer serves launch after launch, of any shape, without being zeroed in between."""
    if not ops.path_of("paged_attention", "cpu").startswith("Triton"):
        pytest.skip("counts programs of the interpreter")
    tickets = torch.zeros(100, dtype=torch.int32)
    monkeypatch.setattr(_paged_decode, "tickets", lambda number, device: tickets)
    for contexts, Hkv in (([600, 0, 257], 2), ([600, 0, 257], 2), ([5, 300], 1), ([513], 2)):
        check(*make_batch(torch.device("cpu"), torch.float32, contexts, [1] * len(contexts), Hkv=Hkv, D=16))
        assert not tickets.any()


def test_a_stream_keeps_its_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream's launches share one zeroed buffer, except during a graph capture that comes before it exists."""
    stream, capturing, zeros = [7], [True], torch.zeros
    active = SimpleNamespace(get_current_stream=lambda index: stream[0])
    monkeypatch.setattr(_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(_launch, "_tickets", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, device: zeros(size, dtype=dtype))
    segments: list[dict] = []
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    device = torch.device("cuda", 0)
    captured = _launch.tickets(10, device)
    assert captured is not _launch.tickets(10, device), "what a capture allocates is the graph's own"
    capturing[0] = False
    kept = _launch.tickets(10, device)
    capturing[0] = True
    assert kept is _launch.tickets(1000, device) and len(kept) >= 1000
    capturing[0] = False
    larger = _launch.tickets(2 * len(kept), device)
    assert larger is not kept and len(larger) >= 2 * len(kept)
    assert kept is _launch.tickets(10, device), "a graph may hold its address"
    stream[0] = 9
    segments.append({"segment_pool_id": (0, 3), "address": 0, "total_size": 2**64})  # torch.compile's, in warm-up
    assert _launch.tickets(10, device) is not _launch.tickets(10, device)
    segments[0]["segment_pool_id"] = (0, 0)
    stream[0] = 8
    assert kept is not _launch.tickets(10, device)
    stream[0] = 6

    def unsupported() -> list[dict]:
        raise RuntimeError("Calling snapshot with backend:cudaMallocAsync is not meaningful")

    monkeypatch.setattr(torch.cuda, "memory_snapshot", unsupported)
    assert _launch.tickets(10, device) is not _launch.tickets(10, device)


def test_decode_in_a_cuda_graph() -> None:
    """Replayed with other lengths and blocks, it gives what a plain call gives."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda")
    batch, _ = make_batch(device, torch.bfloat16, [1000, 257, 40], [1] * 3, spare=60)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.paged_attention(*batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = ops.paged_attention(*batch)
    for contexts in ([1000, 257, 40], [999, 1, 0], [512, 256, 30]):
        batch.context_lens.copy_(torch.tensor(contexts))
        for _ in range(2):
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, ops.paged_attention(*batch))


FLOAT8 = torch.float8_e4m3fn


def with_float8(batch: Batch, device: torch.device) -> tuple[Batch, dict[str, Tensor], Batch]:
    """The batch with float8 caches, the scales, and the batch over the values they represent, in float64.

    A scale maps a head's largest value to 400, as one would choose it.
    """
    caches, values, scales = [], [], {}
    for name, cache in (("k_scale", batch.k_cache), ("v_scale", batch.v_cache)):
        scale = (cache.double().nan_to_num().abs().amax(dim=(0, 1, 3)) / 400).float().contiguous()
        quantised = (cache.float() / scale[:, None]).to(FLOAT8)
        bits = quantised.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2)  # the engine's layout
        caches.append(bits.view(FLOAT8))
        values.append(quantised.double() * scale[:, None].double())
        scales[name] = scale
    return (
        batch._replace(k_cache=caches[0], v_cache=caches[1]),
        scales,
        batch._replace(k_cache=values[0], v_cache=values[1]),
    )


def gathered(batch: Batch) -> list[Text]:
    """Each sequence's keys and values, gathered from the caches."""
    texts = []
    for row, length in zip(batch.block_table, batch.context_lens.tolist()):
        blocks = row[: -(-length // batch.k_cache.shape[1])].long()
        k, v = (cache[blocks].flatten(0, 1)[:length] for cache in (batch.k_cache, batch.v_cache))
        texts.append((k, v))
    return texts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [[1, 1, 1], [300, 20, 1]], ids=["decode", "prefill"])
@pytest.mark.parametrize(("Hkv", "D"), [(4, 33), (2, 64)], ids=str)
def test_a_float8_cache(path: torch.device, Hkv: int, D: int, queries: list[int], dtype: torch.dtype) -> None:
    """Against float64 over exactly the values in the cache: nothing is lost beyond the cache's own rounding."""
    batch, _ = make_batch(path, dtype, [300, 40, 7], queries, H=4, Hkv=Hkv, D=D)
    batch, scales, exact = with_float8(batch, path)
    out = ops.paged_attention(*batch, window=290, **scales)
    cu, texts = batch.cu_seqlens_q.tolist(), gathered(exact)
    assert_accurate(out, dense(batch.q, texts, cu, 290), dense(batch.q.double(), texts, cu, 290))


def test_the_error_of_a_float8_cache_is_that_of_its_rounding(path: torch.device) -> None:
    """Against float64 over the unrounded keys and values.

    A number x becomes x (1 + e), |e| <= 2^-4 (three bits of mantissa, rounded), or moves by at most 2^-10 of its scale
    where float8 has no exponent left. So a score q.k / sqrt(D) moves by at most s = sum |q k| 2^-4 / sqrt(D) (plus
    that little), each weight by a factor within exp(2 s), and a sum of weighted values by the effect of both.
    """
    D = 64
    batch, texts = make_batch(path, torch.float32, [300, 257, 20], [1, 1, 1], D=D)
    batch = batch._replace(q=batch.q / 8)  # scores as large as a trained model's
    batch8, scales, _ = with_float8(batch, path)
    out = ops.paged_attention(*batch8, **scales).double()
    for s, (k, v) in enumerate(texts):
        q, k, v = batch.q[s].double(), k.double(), v.double()  # (H, D), (context, H, D)
        step = {name: scale.double()[None, :, None] * 2.0**-10 for name, scale in scales.items()}
        moved = torch.einsum("hd,jhd->hj", q.abs(), k.abs() * 2.0**-4 + step["k_scale"]) * D**-0.5
        weights = (torch.einsum("hd,jhd->hj", q, k) * D**-0.5).softmax(-1)
        truth = torch.einsum("hj,jhd->hd", weights, v)
        grown = weights * (torch.exp(2 * moved.amax(-1, keepdim=True)) - 1)
        bound = torch.einsum("hj,jhd->hd", weights + grown, v.abs() * 2.0**-4 + step["v_scale"])
        bound += torch.einsum("hj,jhd->hd", grown, v.abs())
        error = (out[s] - truth).abs()
        assert (error <= bound + 1e-6).all(), (error / bound).max()
        assert error.mean() < 0.02 * truth.abs().amax(), "and on average far below: roundings cancel"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_scale": None}, r"k_scale must be given for a torch.float8_e4m3fn cache, float32 \(Hkv,\), got None"),
        ({"v_scale": None}, r"v_scale must be given for a torch.float8_e4m3fn cache"),
        ({"v_scale": torch.ones(3)}, r"v_scale must be \(Hkv,\) = \(2,\), got \(3,\)"),
        ({"k_scale": torch.ones(2).double()}, r"k_scale must be torch.float32, got torch.float64"),
        ({"v_cache": torch.zeros(3, 8, 2, 16)}, r"v_cache must have the dtype of k_cache \(torch.float8_e4m3fn\)"),
        ({"k_cache": torch.zeros(3, 8, 2, 16)}, r"v_cache must have the dtype of q \(torch.float32\)"),
        (
            {"k_cache": torch.zeros(3, 8, 2, 16), "v_cache": torch.zeros(3, 8, 2, 16)},
            r"k_scale must be None for a cache that is not torch.float8_e4m3fn, got one for torch.float32",
        ),
        ({"k_cache": torch.zeros(3, 8, 2, 16).to(torch.float8_e5m2)}, r"k_cache must have the dtype of q"),
    ],
)
def test_scales_belong_to_float8_caches(changes: dict, message: str) -> None:
    cache = torch.zeros(3, 8, 2, 16).to(FLOAT8)
    arguments = {"k_cache": cache, "v_cache": cache, "k_scale": torch.ones(2), "v_scale": torch.ones(2)} | changes
    table, lens, cu = (torch.tensor(v, dtype=torch.int32) for v in ([[0]], [4], [0, 1]))
    rest = {"block_table": table, "context_lens": lens, "cu_seqlens_q": cu, "max_seqlen_q": 1}
    with pytest.raises(ValueError, match=f"paged_attention: {message}"):
        ops.paged_attention(torch.zeros(1, 2, 16), **arguments, **rest)
    new = torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match=f"append_kv_: {message.replace('of q', 'of k')}"):
        ops.append_kv_(new, new, slots=torch.tensor([0]), **arguments)


def test_an_old_gpu_has_no_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available() or not ops.path_of("append_kv_", "cpu").startswith("Triton"):
        pytest.skip("asks the kernels' path for another GPU than there is")
    monkeypatch.setattr(_runtime, "architecture", lambda device: 80)
    cache, new, one = torch.zeros(3, 8, 2, 16).to(FLOAT8), torch.zeros(1, 2, 16), torch.ones(2)
    message = "a torch.float8_e4m3fn cache needs a GPU of compute capability 8.9 or later, got 8.0"
    with pytest.raises(ValueError, match=f"append_kv_: {message}"):
        ops.append_kv_(new, new, cache, cache, torch.tensor([0]), k_scale=one, v_scale=one)
    table, lens, cu = (torch.tensor(v, dtype=torch.int32) for v in ([[0]], [4], [0, 1]))
    with pytest.raises(ValueError, match=f"paged_attention: {message}"):
        ops.paged_attention(new, cache, cache, table, lens, cu, 1, k_scale=one, v_scale=one)


def test_the_path_of_a_float8_cache_is_said() -> None:
    with _runtime.force("torch" if not _native.load() else "native"):
        found = ops.path_of("paged_attention", "cpu", FLOAT8)
        assert found == "PyTorch (the compiled operators know no float8_e4m3fn)"
        assert ops.path_of("append_kv_", "cpu") == ops.path_of("append_kv_", "cpu", torch.bfloat16)


def test_opcheck_of_a_float8_cache(path: torch.device) -> None:
    """Only shapes: PyTorch's other checks multiply arguments and do not support float8."""
    batch, _ = make_batch(path, torch.float32, [20, 9], [1, 1], D=16)
    batch, scales, _ = with_float8(batch, path)
    arguments = (*batch, 0.25, 0, *scales.values())
    opcheck(torch.ops.gpt2_kernels.paged_attention.default, arguments, test_utils="test_faketensor")


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


@pytest.mark.parametrize("queries", [1, 5], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("size", "strides"), [(12, (0, 2**28, 16, 1)), (8, (2**31 + 16, 16, 16, 1))], ids=["tokens", "blocks"]
)
def test_offsets_beyond_32_bits(path: torch.device, queries: int, size: int, strides: tuple[int, ...]) -> None:
    """Tokens and blocks of a pool of 139 GiB lie more than 2**31 elements apart; the memory between is not touched."""
    if path.type == "cuda" and torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    blocks = 1 if strides[0] == 0 else 3
    span = 1 + sum((n - 1) * stride for n, stride in zip((blocks, size, 1, 16), strides))
    cache = torch.empty(span, dtype=torch.float16, device=path).as_strided((blocks, size, 1, 16), strides)
    cache.copy_(torch.randn(cache.shape))
    q = torch.randn(queries, 1, 16, device=path).to(torch.float16)
    table, lens, cu = ([list(range(blocks))[::-1]], [blocks * size], [0, queries])
    indices = [torch.tensor(v, dtype=torch.int32, device=path) for v in (table, lens, cu)]
    compact = cache.contiguous()
    assert torch.equal(
        ops.paged_attention(q, cache, cache, *indices, queries),
        ops.paged_attention(q, compact, compact, *indices, queries),
    )


@pytest.mark.parametrize("queries", [[1] * 5, [5, 70, 1, 0, 9]], ids=["decode", "prefill"])
def test_more_sequences_than_one_launch_takes(
    path: torch.device, queries: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid's second axis is limited to 65535; here to 2, so that five sequences take three launches."""
    batch, _ = make_batch(path, torch.float32, [20, 75, 3, 6, 40], queries, D=16)
    expected = ops.paged_attention(*batch)
    assert expected.abs().amin(dim=(1, 2)).all()  # every row was written
    monkeypatch.setattr(paged, "MAX_SEQUENCES", 2)
    assert torch.equal(ops.paged_attention(*batch), expected)
