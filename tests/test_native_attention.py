"""The compiled CPU operators over a paged cache: numbers against float64 PyTorch, the same bits in any company."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gpt2_kernels import _native
from gpt2_kernels._runtime import ALL_INSTRUCTIONS

# ------------------------------------------------------------------------------------------------ a cache and its truth


class Cache:
    """A paged cache filled through append_kv_, its blocks scattered; whatever no sequence owns is NaN."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], block_size: int, *, by_head: bool = True):
        needed = [math.ceil(len(k) / block_size) for k in keys]
        num_blocks = sum(needed) + 2
        _, heads, dim = keys[0].shape
        shape = (num_blocks, heads, block_size, dim) if by_head else (num_blocks, block_size, heads, dim)
        self.k = torch.full(shape, math.nan, dtype=keys[0].dtype)
        self.v = torch.full(shape, math.nan, dtype=keys[0].dtype)
        if by_head:  # the engine's layout
            self.k, self.v = self.k.transpose(1, 2), self.v.transpose(1, 2)
        free = torch.randperm(num_blocks).tolist()
        self.table = torch.full((len(keys), max(1, *needed)), -1, dtype=torch.int32)  # -1: must never be read
        self.lengths = torch.tensor([len(k) for k in keys], dtype=torch.int32)
        for row, count, k, v in zip(self.table, needed, keys, values):
            row[:count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
            position = torch.arange(len(k))
            slots = row[position // block_size].long() * block_size + position % block_size
            _native.ops().append_kv_(k, v, self.k, self.v, slots)

    def attend(self, queries: list[Tensor], *, scale: float | None = None, window: int = 0) -> list[Tensor]:
        """Attention of the last len(q) positions of every sequence; one result per sequence."""
        counts = [len(q) for q in queries]
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        q = torch.cat(queries)
        out = _native.ops().paged_attention(
            q, self.k, self.v, self.table, self.lengths, starts, q.shape[-1] ** -0.5 if scale is None else scale, window
        )
        assert out.is_contiguous() and out.dtype == q.dtype
        return list(out.split(counts))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """q (n, H, D) are the last n of len(k) positions; k, v (L, Hkv, D). In the dtype of its arguments."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    i, j = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))
    seen = (j <= i) & (j > i - window) if window else j <= i
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def check(ours: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> None:
    truth = plain_attention(q.double(), k.double(), v.double(), window)
    error = (ours.double() - truth).abs().max().item()
    theirs = (plain_attention(q, k, v, window).double() - truth).abs().max().item()
    floor = (1e-6 if q.dtype == torch.float32 else 4e-3) * truth.abs().max().item()  # a rounding of the largest result
    assert error <= 2 * theirs + floor, f"error {error:.3e}, PyTorch's in {q.dtype} {theirs:.3e}, floor {floor:.3e}"


def sequences(lengths: list[int], heads: int, dim: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    keys = [torch.randn(n, heads, dim).to(dtype) for n in lengths]
    return keys, [torch.randn_like(k) for k in keys]


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "dim, block_size, heads, kv_heads, window",
    [
        (64, 16, 12, 12, 0),  # GPT-2
        (64, 16, 4, 4, 40),  # a window longer than a chunk of keys
        (64, 33, 8, 2, 7),  # GQA, a window shorter than a chunk, blocks that straddle chunks
        (16, 8, 2, 1, 0),  # the narrowest head without padding
        (65, 1, 3, 3, 0),  # padded to 80; blocks of one slot
        (80, 33, 6, 2, 0),  # 64 + 16 columns
        (128, 8, 5, 1, 1),  # MQA; a window of the query's own key alone
        (1, 16, 2, 2, 0),
        (256, 256, 1, 1, 0),  # the widest head, a sequence within one block
    ],
)
def test_attention_agrees_with_float64(ops, dtype, dim, block_size, heads, kv_heads, window):
    lengths = [1, 31, 32, 33, 100, 300, 300]
    counts = [1, 31, 1, 33, 20, 300, 1]  # prefill, decode, a later chunk of a prompt
    keys, values = sequences(lengths, kv_heads, dim, dtype)
    queries = [torch.randn(n, heads, dim).to(dtype) for n in counts]
    ours = Cache(keys, values, block_size).attend(queries, window=window)
    for o, q, k, v in zip(ours, queries, keys, values):
        check(o, q, k, v, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_agrees_with_float64(ops, dtype):
    keys, values = sequences([75, 200], 2, 65, dtype)
    queries = [torch.randn(n, 4, 65).to(dtype) for n in (75, 1)]
    results = {}
    for level in {ops.simd_level(limit) for limit in range(ALL_INSTRUCTIONS + 1)}:
        ops.simd_level(level)
        results[level] = Cache(keys, values, 16).attend(queries)
        for o, q, k, v in zip(results[level], queries, keys, values):
            check(o, q, k, v)
    if {1, 2} <= results.keys():
        assert all(torch.equal(a, b) for a, b in zip(results[1], results[2])), "AVX2 and AVX-512 differ"


def test_large_scores_neither_overflow_nor_lose_the_small_ones(ops):
    keys, values = sequences([100], 1, 64, torch.float32)
    keys[0] *= torch.linspace(-60, 60, 100)[:, None, None]  # the running maximum rises by hundreds from chunk to chunk
    queries = [torch.randn(100, 2, 64) * 5]
    check(Cache(keys, values, 16).attend(queries)[0], queries[0], keys[0], values[0])


def test_infinite_and_nan_values_stay_with_the_queries_that_see_them(ops):
    keys, values = sequences([64], 1, 16, torch.float32)
    values[0][40] = math.inf
    keys[0][50] = math.nan
    out = Cache(keys, values, 16).attend([torch.randn(64, 4, 16)])[0]
    assert out[:40].isfinite().all()
    assert (out[40:50] == math.inf).all()
    assert out[50:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_without_keys_and_unused_rows_are_zero(ops, dtype):
    keys, values = sequences([0, 5, 0], 2, 16, dtype)
    cache = Cache(keys, values, 4)
    # 3 queries without a key, 7 for 5 keys, none; 2 rows of q belong to no sequence
    starts = torch.tensor([0, 3, 10, 10], dtype=torch.int32)
    q = torch.randn(12, 2, 16).to(dtype)
    for _ in range(2):
        poison = torch.full_like(q, math.nan)  # so that reused memory is not zero by luck
        del poison
        out = ops.paged_attention(q, cache.k, cache.v, cache.table, cache.lengths, starts, 0.25, 0)
        assert (out[:5] == 0).all() and (out[10:] == 0).all()
        check(out[5:10], q[5:10], keys[1], values[1])
    empty = ops.paged_attention(q[:0], cache.k, cache.v, cache.table, cache.lengths, starts * 0, 0.25, 0)
    assert empty.shape == (0, 2, 16)


def test_any_strides_with_a_unit_last_one(ops):
    keys, values = sequences([70], 3, 16, torch.float32)
    qkv = torch.randn(70, 3 * 3 * 16)
    q = qkv.view(70, 3, 3, 16)[:, 1]  # a slice of a fused projection
    rows = Cache(keys, values, 16, by_head=False).attend([q])[0]
    assert torch.equal(rows, Cache(keys, values, 16).attend([q.contiguous()])[0])
    cache = Cache(keys, values, 16)
    table = torch.stack([cache.table, cache.table], -1)[..., 0]
    lengths, starts = torch.tensor([70, 0], dtype=torch.int32)[::2], torch.tensor([0, 9, 70], dtype=torch.int32)[::2]
    wide = torch.stack([cache.k, cache.k], 3)[:, :, :, 0]  # a head stride that differs from v's
    assert torch.equal(rows, ops.paged_attention(q, wide, cache.v, table, lengths, starts, 0.25, 0))
    query = torch.randn(3, 16).expand(70, 3, 16)
    check(Cache(keys, values, 16).attend([query])[0], query, keys[0], values[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_writes_its_slots_and_nothing_else(ops, dtype):
    k_cache = torch.full((5, 2, 4, 16), 7.0, dtype=dtype).transpose(1, 2)  # 5 blocks of 4 slots, 2 heads
    v_cache = torch.full((5, 4, 2, 16), 8.0, dtype=dtype)
    k, v = torch.randn(4, 2, 32).to(dtype)[..., 5:21], torch.randn(2, 4, 16).to(dtype).transpose(0, 1)
    slots = torch.tensor([19, -1, 0, 6])
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for token, slot in ((0, 19), (2, 0), (3, 6)):
        expected_k[slot // 4, slot % 4], expected_v[slot // 4, slot % 4] = k[token], v[token]
    ops.append_kv_(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)
    ops.append_kv_(k[:0], v[:0], k_cache, v_cache, slots[:0])
    assert torch.equal(k_cache, expected_k)


def test_append_of_many_tokens_over_threads(ops):
    k, v = torch.randn(2000, 12, 64), torch.randn(2000, 12, 64)
    k_cache, v_cache = torch.zeros(250, 8, 12, 64), torch.zeros(250, 8, 12, 64)
    slots = torch.randperm(2000)
    ops.append_kv_(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.flatten(0, 1)[slots], k) and torch.equal(v_cache.flatten(0, 1)[slots], v)


# -------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim, heads, kv_heads, window", [(64, 4, 4, 0), (64, 6, 2, 50), (80, 3, 1, 0), (33, 2, 2, 3)])
def test_a_row_has_the_same_bits_in_any_company(ops, level, dtype, dim, heads, kv_heads, window):
    if ops.simd_level(level) != level:
        pytest.skip("this processor lacks the instruction set")
    length = 200
    keys, values = sequences([length], kv_heads, dim, dtype)
    q = torch.randn(length, heads, dim).to(dtype)
    whole = Cache(keys, values, 16).attend([q], window=window)[0]
    for block_size in (1, 8, 33, 256):  # other blocks, in another order
        assert torch.equal(Cache(keys, values, block_size).attend([q], window=window)[0], whole)
    torch.set_num_threads(1)
    assert torch.equal(Cache(keys, values, 16).attend([q], window=window)[0], whole)
    torch.set_num_threads(2)

    def part(start: int, end: int) -> Tensor:  # queries start..end when the cache holds end keys
        return Cache([keys[0][:end]], [values[0][:end]], 16).attend([q[start:end]], window=window)[0]

    for position in (0, 1, 15, 31, 32, 33, 63, 64, 100, 127, 199):  # decode: alone
        assert torch.equal(part(position, position + 1)[0], whole[position]), position
    for chunk in (3, 64, 77, 130):  # prefill in chunks
        pieces = [part(start, min(start + chunk, length)) for start in range(0, length, chunk)]
        assert torch.equal(torch.cat(pieces), whole), chunk
    group = heads // kv_heads
    for head in range(kv_heads):  # one kv head alone
        k, v = keys[0][:, head : head + 1], values[0][:, head : head + 1]
        mine = slice(head * group, head * group + group)
        assert torch.equal(Cache([k], [v], 16).attend([q[:, mine]], window=window)[0], whole[:, mine])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_in_any_batch(ops, dtype):
    lengths = [1, 300, 17, 64, 65, 200, 33]
    keys, values = sequences(lengths, 2, 64, dtype)
    for counts in ([1] * 7, [1, 300, 1, 10, 65, 3, 5]):  # decode; decode and prefill mixed
        queries = [torch.randn(n, 4, 64).to(dtype) for n in counts]
        together = Cache(keys, values, 16).attend(queries)
        for s in range(len(lengths)):
            assert torch.equal(Cache(keys[s : s + 1], values[s : s + 1], 16).attend(queries[s : s + 1])[0], together[s])
        backwards = Cache(keys[::-1], values[::-1], 16).attend(queries[::-1])
        assert all(torch.equal(a, b) for a, b in zip(backwards[::-1], together))


# ------------------------------------------------------------------------------------------------------ PyTorch's rules


def example(dtype: torch.dtype = torch.float32) -> dict[str, Tensor | float | int]:
    """Valid arguments of paged_attention: two sequences of 20 and 3 keys, 2 and 1 queries."""
    return {
        "q": torch.randn(3, 4, 16).to(dtype),
        "k_cache": torch.randn(6, 8, 2, 16).to(dtype),
        "v_cache": torch.randn(6, 8, 2, 16).to(dtype),
        "block_table": torch.tensor([[5, 0, 2], [1, 99, 99]], dtype=torch.int32),
        "context_lens": torch.tensor([20, 3], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 2, 3], dtype=torch.int32),
        "scale": 0.25,
        "window": 0,
    }


def append_example() -> dict[str, Tensor]:
    return {
        "k": torch.randn(3, 2, 16),
        "v": torch.randn(3, 2, 16),
        "k_cache": torch.randn(6, 8, 2, 16),
        "v_cache": torch.randn(6, 8, 2, 16),
        "slots": torch.tensor([4, -1, 47]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(ops, dtype):
    torch.library.opcheck(ops.paged_attention.default, tuple(example(dtype).values()))
    transposed = example(dtype)
    transposed["q"] = torch.randn(4, 3, 16).to(dtype).transpose(0, 1)
    torch.library.opcheck(ops.paged_attention.default, tuple(transposed.values()))
    torch.library.opcheck(ops.append_kv_.default, tuple(append_example().values()))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": torch.randn(3, 64)}, r"q must be \(queries, heads, head dim\), got 2 axes"),
        ({"q": torch.randn(3, 4, 16).half()}, "q must be float32 or bfloat16, got float16"),
        ({"k_cache": torch.randn(6, 8, 2, 16).bfloat16()}, "k_cache must have the dtype of q, float32, got bfloat16"),
        ({"v_cache": torch.randn(6, 8, 1, 16)}, "v_cache must have k_cache's shape, got 1 instead of 2 in axis 2"),
        ({"q": torch.randn(3, 4, 8)}, "the cache's head dim must be 8, got 16"),
        ({"q": torch.randn(3, 5, 16)}, "heads of q must be a multiple of the cache's 2 kv heads, got 5"),
        ({"q": torch.randn(3, 4, 300)}, r"head dim must lie in 1..256, got 300"),
        ({"q": torch.randn(3, 4, 32)[..., ::2]}, "the last stride of q must be 1, got 2"),
        ({"k_cache": torch.randn(6, 8, 2, 32)[..., ::2]}, "the last stride of k_cache must be 1, got 2"),
        ({"block_table": torch.tensor([[5, 0, 2], [1, 9, 9]])}, "block_table must be int32, got int64"),
        ({"context_lens": int32(20, 3, 3)}, "the rows of block_table must be 3, got 2"),
        ({"cu_seqlens_q": int32(0, 3)}, "the length of cu_seqlens_q must be 3, got 2"),
        ({"cu_seqlens_q": int32(1, 2, 3)}, "cu_seqlens_q must start with 0, got 1"),
        ({"cu_seqlens_q": int32(0, 3, 2)}, "cu_seqlens_q must not decrease, got 2 after 3"),
        ({"cu_seqlens_q": int32(0, 2, 4)}, r"cu_seqlens_q must lie in 0..3 \(the rows of q\), got 4"),
        ({"context_lens": int32(25, 3)}, r"context_lens must lie in 0..24 \(max_blocks \* block_size\), got 25"),
        ({"context_lens": int32(20, -1)}, "context_lens must lie in 0..24"),
        ({"block_table": torch.tensor([[5, 0, 6], [1, 9, 9]]).int()}, "block_table must lie in 0..5, got 6"),
        ({"block_table": torch.tensor([[-1, 0, 2], [1, 9, 9]]).int()}, "block_table must lie in 0..5, got -1"),
        ({"context_lens": int32(20, 9)}, "block_table must lie in 0..5, got 99"),
        ({"window": -1}, r"window must be >= 0 \(0 = none\), got -1"),
    ],
)
def test_paged_attention_refuses(ops, changes, message):
    with pytest.raises(RuntimeError, match=f"paged_attention: {message}"):
        ops.paged_attention(**{**example(), **changes})


def test_blocks_that_left_the_window_are_not_looked_at(ops):
    arguments = example() | {"window": 3}  # queries at 18 and 19 see keys from 16 on: block 2 alone
    expected = ops.paged_attention(**arguments)
    arguments["block_table"] = torch.tensor([[-1, 99, 2], [1, 99, 99]], dtype=torch.int32)
    assert torch.equal(ops.paged_attention(**arguments), expected)
    ops.paged_attention(**{**arguments, "window": 2**63 - 1, "block_table": example()["block_table"]})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"slots": torch.tensor([0, 48, 1])}, r"slots must lie in -1..47, got 48"),
        ({"slots": torch.tensor([0, -2, 1])}, r"slots must lie in -1..47, got -2"),
        ({"slots": int32(0, 1, 2)}, "slots must be int64, got int32"),
        ({"slots": torch.tensor([0, 1])}, "the length of slots must be 3, got 2"),
        ({"v": torch.randn(2, 2, 16)}, "v's tokens must be 3, got 2"),
        ({"k": torch.randn(3, 2, 16).double()}, "k must be float32 or bfloat16, got float64"),
        ({"k_cache": torch.randn(6, 8, 2, 16).bfloat16()}, "k_cache must have the dtype of k, float32, got bfloat16"),
        ({"k": torch.randn(3, 1, 16), "v": torch.randn(3, 1, 16)}, "the cache's kv heads must be 1, got 2"),
        ({"v_cache": torch.randn(6, 8, 2, 32)[..., ::2]}, "the last stride of v_cache must be 1, got 2"),
        ({"v_cache": torch.randn(6, 2, 16)}, r"v_cache must be \(num_blocks, block_size, kv heads, head dim\), got 3"),
    ],
)
def test_append_refuses_before_it_writes(ops, changes, message):
    arguments = append_example() | changes
    before = arguments["k_cache"].clone()
    with pytest.raises(RuntimeError, match=f"append_kv_: {message}"):
        ops.append_kv_(**arguments)
    assert torch.equal(arguments["k_cache"], before)
