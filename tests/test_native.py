"""The compiled CPU operators: numbers against float64 PyTorch, the same bits in any company, the first-use build."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tolerance import assert_accurate
from torch import Tensor

from gpt2_kernels import _native, reference

needs_native = pytest.mark.skipif(not _native.load(), reason=_native.status())
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no c++ on this machine")
X86 = platform.machine() in ("x86_64", "AMD64")
ALL_LEVELS = 4  # AMX where there is one
DOT_PRODUCTS = 3  # AVX-512 with BF16 and VNNI, which products need


@pytest.fixture
def ops() -> Iterator:
    """The operators; instruction set and thread count are put back afterwards."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield _native.ops()
    torch.set_num_threads(threads)
    _native.ops().simd_level(ALL_LEVELS)


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
        if by_head:  # as the engine keeps it
            self.k, self.v = self.k.transpose(1, 2), self.v.transpose(1, 2)
        free = torch.randperm(num_blocks).tolist()
        self.table = torch.full((len(keys), max(1, *needed)), -1, dtype=torch.int32)  # -1: never to be looked at
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


@needs_native
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


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_agrees_with_float64(ops, dtype):
    keys, values = sequences([75, 200], 2, 65, dtype)
    queries = [torch.randn(n, 4, 65).to(dtype) for n in (75, 1)]
    results = {}
    for level in {ops.simd_level(limit) for limit in range(ALL_LEVELS + 1)}:
        ops.simd_level(level)
        results[level] = Cache(keys, values, 16).attend(queries)
        for o, q, k, v in zip(results[level], queries, keys, values):
            check(o, q, k, v)
    if {1, 2} <= results.keys():
        assert all(torch.equal(a, b) for a, b in zip(results[1], results[2])), "AVX2 and AVX-512 differ"


@needs_native
def test_large_scores_neither_overflow_nor_lose_the_small_ones(ops):
    keys, values = sequences([100], 1, 64, torch.float32)
    keys[0] *= torch.linspace(-60, 60, 100)[:, None, None]  # the running maximum rises by hundreds from chunk to chunk
    queries = [torch.randn(100, 2, 64) * 5]
    check(Cache(keys, values, 16).attend(queries)[0], queries[0], keys[0], values[0])


@needs_native
def test_infinite_and_nan_values_stay_with_the_queries_that_see_them(ops):
    keys, values = sequences([64], 1, 16, torch.float32)
    values[0][40] = math.inf
    keys[0][50] = math.nan
    out = Cache(keys, values, 16).attend([torch.randn(64, 4, 16)])[0]
    assert out[:40].isfinite().all()
    assert (out[40:50] == math.inf).all()
    assert out[50:].isnan().all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_without_keys_and_unused_rows_are_zero(ops, dtype):
    keys, values = sequences([0, 5, 0], 2, 16, dtype)
    cache = Cache(keys, values, 4)
    # 3 queries without a key, 7 for 5 keys, none; 2 rows of q belong to no sequence
    starts = torch.tensor([0, 3, 10, 10], dtype=torch.int32)
    q = torch.randn(12, 2, 16).to(dtype)
    for _ in range(2):
        poison = torch.full_like(q, math.nan)  # so that memory handed out again is not zero by luck
        del poison
        out = ops.paged_attention(q, cache.k, cache.v, cache.table, cache.lengths, starts, 0.25, 0)
        assert (out[:5] == 0).all() and (out[10:] == 0).all()
        check(out[5:10], q[5:10], keys[1], values[1])
    empty = ops.paged_attention(q[:0], cache.k, cache.v, cache.table, cache.lengths, starts * 0, 0.25, 0)
    assert empty.shape == (0, 2, 16)


@needs_native
def test_any_strides_with_a_unit_last_one(ops):
    keys, values = sequences([70], 3, 16, torch.float32)
    qkv = torch.randn(70, 3 * 3 * 16)
    q = qkv.view(70, 3, 3, 16)[:, 1]  # a slice of a fused projection
    rows = Cache(keys, values, 16, by_head=False).attend([q])[0]
    assert torch.equal(rows, Cache(keys, values, 16).attend([q.contiguous()])[0])
    cache = Cache(keys, values, 16)
    table = torch.stack([cache.table, cache.table], -1)[..., 0]
    lengths, starts = torch.tensor([70, 0], dtype=torch.int32)[::2], torch.tensor([0, 9, 70], dtype=torch.int32)[::2]
    wide = torch.stack([cache.k, cache.k], 3)[:, :, :, 0]  # another head stride than v's
    assert torch.equal(rows, ops.paged_attention(q, wide, cache.v, table, lengths, starts, 0.25, 0))
    query = torch.randn(3, 16).expand(70, 3, 16)
    check(Cache(keys, values, 16).attend([query])[0], query, keys[0], values[0])


@needs_native
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


@needs_native
def test_append_of_many_tokens_over_threads(ops):
    k, v = torch.randn(2000, 12, 64), torch.randn(2000, 12, 64)
    k_cache, v_cache = torch.zeros(250, 8, 12, 64), torch.zeros(250, 8, 12, 64)
    slots = torch.randperm(2000)
    ops.append_kv_(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.flatten(0, 1)[slots], k) and torch.equal(v_cache.flatten(0, 1)[slots], v)


# -------------------------------------------------------------------------------------------------------- the same bits


@needs_native
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


@needs_native
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
    """Arguments of paged_attention that are right: two sequences of 20 and 3 keys, 2 and 1 queries."""
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


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(ops, dtype):
    torch.library.opcheck(ops.paged_attention.default, tuple(example(dtype).values()))
    transposed = example(dtype)
    transposed["q"] = torch.randn(4, 3, 16).to(dtype).transpose(0, 1)
    torch.library.opcheck(ops.paged_attention.default, tuple(transposed.values()))
    torch.library.opcheck(ops.append_kv_.default, tuple(append_example().values()))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@needs_native
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


@needs_native
def test_blocks_that_left_the_window_are_not_looked_at(ops):
    arguments = example() | {"window": 3}  # queries at 18 and 19 see keys from 16 on: block 2 alone
    expected = ops.paged_attention(**arguments)
    arguments["block_table"] = torch.tensor([[-1, 99, 2], [1, 99, 99]], dtype=torch.int32)
    assert torch.equal(ops.paged_attention(**arguments), expected)
    ops.paged_attention(**{**arguments, "window": 2**63 - 1, "block_table": example()["block_table"]})


@needs_native
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


# ------------------------------------------------------------------------------------------- products, norms, sampling


needs_products = pytest.mark.skipif(
    not _native.load() or _native.ops().simd_level(ALL_LEVELS) < DOT_PRODUCTS,
    reason="needs AVX-512 with BF16 and VNNI",
)


@pytest.fixture(params=[DOT_PRODUCTS, ALL_LEVELS], ids=["avx512", "amx"])
def product_ops(ops, request) -> Iterator:
    """The operators on each instruction set that has products."""
    if ops.simd_level(request.param) != request.param:
        pytest.skip(f"the machine has no level {request.param}")
    yield ops


PRODUCTS = [  # M, K, N
    (1, 768, 200),  # decode: sixteen columns at a time, the last ones fewer
    (2, 100, 65),  # eight at a time; K ends inside a register of every type
    (3, 33, 7),  # a row is missing of four
    (5, 3072, 64),
    (17, 768, 96),  # a tile of AMX's and one row; a pair of tiles of columns and one
    (70, 769, 130),  # two blocks of rows and three of columns, none full
    (1, 1, 1),
    (0, 5, 3),
    (4, 5, 0),
]


def product_inputs(M: int, K: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.to(dtype) for t in (torch.randn(M, K), torch.randn(N, K), torch.randn(N), torch.randn(M, N)))


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return 0.0 if ours.numel() == 0 else ((ours.double() - truth).abs().max() / truth.abs().max()).item()


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, K, N", PRODUCTS)
def test_linear_agrees_with_float64(product_ops, dtype, M, K, N):
    x, weight, bias, residual = product_inputs(M, K, N, dtype)
    limit = 2e-6 if dtype == torch.float32 else 2**-8  # a rounding of the largest result
    pre = x.double() @ weight.double().T + bias.double()
    for kind, name in enumerate((None, "none", "tanh")):
        after = pre if name is None else torch.nn.functional.gelu(pre, approximate=name)
        y, kept = product_ops.linear(x, weight, bias, residual, kind, True)
        assert relative_error(y, after + residual.double()) <= limit, name
        assert relative_error(kept, pre) <= limit, name
    # rows further apart, with nothing between them that may be read
    apart, weights_apart = (torch.full((len(t), K + 37), math.nan, dtype=dtype)[:, :K] for t in (x, weight))
    apart.copy_(x), weights_apart.copy_(weight)
    y, kept = product_ops.linear(apart, weights_apart, None, None, 0, False)
    assert relative_error(y, x.double() @ weight.double().T) <= limit and kept.shape == (0, N)


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_products_are_exact(product_ops, dtype):
    """The integers come out exactly, so only the float32 epilogue and the last rounding remain."""
    for M, K, N in PRODUCTS:
        x, weight, bias, residual = product_inputs(M, K, N, dtype)
        scale = torch.rand(N) + 0.1
        weight = torch.randint(-128, 128, (N, K)).to(torch.int8)
        y = product_ops.linear_int8(x, weight, scale, bias, residual, 0)
        largest = x.float().abs().amax(1, keepdim=True)
        rounded = (x.float() * (127 / largest)).round()
        truth = (rounded.double() @ weight.double().T) * (largest.double() / 127 * scale.double())
        limit = 4e-6 if dtype == torch.float32 else 2**-8
        assert relative_error(y, truth + bias.double() + residual.double()) <= limit, (M, K, N)
        spread = torch.full((N, K + 37), 127, dtype=torch.int8)[:, :K]  # rows further apart
        assert torch.equal(product_ops.linear_int8(x, spread.copy_(weight), scale, bias, residual, 0), y)
    # the largest sums there are: none of them wraps or saturates
    for value in (-128, 127):
        x, weight = torch.ones(3, 65536, dtype=dtype), torch.full((20, 65536), value, dtype=torch.int8)
        y = product_ops.linear_int8(x, weight, torch.ones(20), None, None, 0)
        assert relative_error(y, torch.full((3, 20), 65536.0 * value).double()) <= limit


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("K", [768, 101, 5000])  # of 5000 many rows are summed piece by piece, few at one go
def test_rows_of_products_have_the_same_bits_in_any_company(product_ops, dtype, K):
    x, weight, bias, residual = product_inputs(70, K, 200, torch.bfloat16 if dtype == torch.int8 else dtype)
    scale = torch.rand(200)
    x[1], x[3], x[12] = x[1] * 1e-38, x[3] * 1e-37, 0.0  # 127 / largest overflows

    def product(first: int, last: int) -> Tensor:
        some, other = x[first:last], residual[first:last]
        if dtype == torch.int8:
            return product_ops.linear_int8(some, (weight * 40).to(torch.int8), scale, bias, other, 2)
        return product_ops.linear(some, weight, bias, other, 2, False)[0]

    whole = product(0, 70)
    for rows in (1, 2, 3, 4, 5, 7, 64):
        for first in range(0, 70 - rows + 1, 11):
            assert torch.equal(product(first, first + rows), whole[first : first + rows]), (rows, first)
    torch.set_num_threads(2)
    assert torch.equal(product(0, 70), whole), "the number of threads matters"


@needs_products
def test_amx_is_used(ops):
    """Its sums of bfloat16 are added in another order, so that some bits differ; those of int8 are exact."""
    if ops.simd_level(ALL_LEVELS) != ALL_LEVELS:
        pytest.skip("the machine has no AMX")
    x, weight, bias, residual = product_inputs(64, 3072, 2000, torch.bfloat16)
    q, scale = reference.quantize(weight.float())
    tiles = ops.linear(x, weight, bias, residual, 0, False)[0], ops.linear_int8(x, q, scale, bias, residual, 0)
    ops.simd_level(DOT_PRODUCTS)
    dots = ops.linear(x, weight, bias, residual, 0, False)[0], ops.linear_int8(x, q, scale, bias, residual, 0)
    assert not torch.equal(tiles[0], dots[0]) and torch.equal(tiles[1], dots[1])


@needs_products
def test_a_row_that_is_not_finite_stays_so_in_int8(product_ops):
    x = torch.randn(4, 100)
    x[1, 3], x[2, 99], x[3] = math.nan, math.inf, 0.0
    y = product_ops.linear_int8(x, torch.ones(5, 100, dtype=torch.int8), torch.ones(5), None, None, 0)
    assert y[0].isfinite().all() and y[1:3].isnan().all() and (y[3] == 0).all()


@needs_products
def test_products_refuse_what_does_not_fit(ops):
    x, weight, bias, residual = product_inputs(3, 8, 4, torch.float32)
    for arguments, message in [
        ((x, weight[:, :7], bias, residual), "the columns of weight must be 8, got 7"),
        ((x, weight.bfloat16(), bias, residual), "weight must have the dtype of x, float32, got bfloat16"),
        ((x, weight, bias[:3], residual), "the length of bias must be 4, got 3"),
        ((x, weight, bias, residual[:2]), "the rows of residual must be 3, got 2"),
        ((x, weight.T.contiguous().T, bias, residual), "the last stride of weight must be 1, got 4"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.linear(*arguments, 0, False)
    with pytest.raises(RuntimeError, match="weight must be int8, got float32"):
        ops.linear_int8(x, weight, torch.ones(4), None, None, 0)
    with pytest.raises(RuntimeError, match="K must be <= 65536, got 65537"):
        ops.linear_int8(torch.ones(1, 65537), torch.ones(1, 65537, dtype=torch.int8), torch.ones(1), None, None, 0)
    ops.simd_level(2)
    with pytest.raises(RuntimeError, match="needs AVX-512 with BF16 and VNNI"):
        ops.linear(x, weight, bias, residual, 0, False)


NORM_WIDTHS = [
    1,  # variance 0
    7,  # less than a register
    768,  # GPT-2: whole registers
    769,  # one past it: rows at odd addresses, a register of which one lane counts
    1600,  # GPT-2 XL
    16384,  # the widest
]


def norm_inputs(R: int, C: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x and another (R, C), their rows further apart than C, weight and bias (C,)."""
    x, other = ((torch.randn(R, C + 3) + 3).to(dtype)[:, :C] for _ in range(2))
    return x, other, *((torch.randn(C) + 3).to(dtype) for _ in range(2))


@needs_native
@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", NORM_WIDTHS)
def test_layer_norm_on_every_instruction_set(ops, dtype: torch.dtype, C: int, level: int) -> None:
    if ops.simd_level(level) != level:
        pytest.skip(f"this CPU has no level {level}")
    x, residual, weight, bias = norm_inputs(9, C, dtype)
    for shift in (bias, None):
        wide = x.double(), (C,), weight.double(), None if shift is None else shift.double()
        y, statistics = ops.layer_norm(x, weight, shift, 1e-5)
        theirs = torch.nn.functional.layer_norm(x, (C,), weight, shift)
        if C > 1:
            assert_accurate(y, theirs, torch.nn.functional.layer_norm(*wide))
        else:
            assert torch.equal(y, torch.zeros_like(y) if shift is None else shift.expand(9, 1))
        torch.testing.assert_close(statistics[0], x.float().mean(1), rtol=1e-5, atol=1e-6)
        for row in range(9):
            assert torch.equal(ops.layer_norm(x[row : row + 1], weight, shift, 1e-5)[0][0], y[row])
        y, total, statistics = ops.add_layer_norm(x, residual, weight, shift, 1e-5)
        assert torch.equal(total, x + residual)
        assert all(map(torch.equal, ops.layer_norm(total, weight, shift, 1e-5), (y, statistics)))
    whole = x.contiguous()  # of any rank then
    assert torch.equal(
        ops.layer_norm(whole.view(3, 3, C), weight, bias, 1e-5)[0].view(9, C), ops.layer_norm(x, weight, bias, 1e-5)[0]
    )


@needs_native
@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", NORM_WIDTHS)
def test_gradients_of_layer_norm_on_every_instruction_set(ops, dtype: torch.dtype, C: int, level: int) -> None:
    """37 rows are three parts, the last one short."""
    if ops.simd_level(level) != level:
        pytest.skip(f"this CPU has no level {level}")
    x, dtotal, weight, bias = norm_inputs(37, C, dtype)
    dy = norm_inputs(37, C, dtype)[0] - 3
    _, statistics = ops.layer_norm(x, weight, bias, 1e-5)

    def by_torch(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors[2:]]
        y = torch.nn.functional.layer_norm(leaves[0], (C,), *leaves[1:])
        return torch.autograd.grad((y, leaves[0]), leaves, tensors[:2])

    given = dy, dtotal, x, weight, bias
    truth, theirs = by_torch(*(t.double() for t in given)), by_torch(*given)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.layer_norm_backward(dy, dtotal, x, weight, statistics, True, True, True))
    assert all(map(torch.equal, *results)), "the number of threads matters"
    for name, a, b, c in zip(("x", "weight", "bias"), results[0], theirs, truth, strict=True):
        assert_accurate(a, b, c, factor=3, what=f"gradient of {name}")
    for part in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        some = ops.layer_norm_backward(dy, dtotal, x, weight, statistics, *part)
        assert all(a is None if not want else torch.equal(a, b) for want, a, b in zip(part, some, results[0]))
    alone = ops.layer_norm_backward(dy, None, x, weight, statistics, True, False, False)[0]
    if dtype == torch.float32:
        torch.testing.assert_close(alone + dtotal, results[0][0], rtol=1e-5, atol=1e-5 * alone.abs().max().item())
    for row in (0, 36):  # dx of a row by itself
        one, mean_rstd = slice(row, row + 1), statistics[:, row : row + 1].contiguous()
        dx = ops.layer_norm_backward(dy[one], dtotal[one], x[one], weight, mean_rstd, True, False, False)[0]
        assert torch.equal(dx[0], results[0][0][row])


@needs_native
@pytest.mark.parametrize("R", [0, 1, 16, 17, 128 * 16, 128 * 16 + 1])
def test_every_row_is_in_one_part(ops, R: int) -> None:
    """Sums of ones are exact: a row that is missing, or there twice, shows. 128 parts of 16 rows, then longer ones."""
    dy, x, statistics = torch.ones(R, 5), torch.full((R, 5), 3.0), torch.tensor([[1.0], [0.5]]).repeat(1, R)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        dx, dweight, dbias = ops.layer_norm_backward(dy, None, x, torch.ones(5), statistics, True, True, True)
        assert dx.shape == (R, 5) and dweight.tolist() == dbias.tolist() == [R] * 5


@needs_native
def test_layer_norm_refuses(ops) -> None:
    x, statistics = torch.randn(4, 6), torch.ones(2, 4)
    weight = torch.ones(6)
    for call, message in [
        (lambda: ops.layer_norm(x.T, weight, None, 1e-5), "layer_norm: the last stride of x must be 1, got 6"),
        (lambda: ops.layer_norm(x, weight[:5], None, 1e-5), "layer_norm: weight must be a vector of 6 dense float32"),
        (
            lambda: ops.layer_norm(x.half(), weight, None, 1e-5),
            "layer_norm: x must be float32 or bfloat16, got float16",
        ),
        (
            lambda: ops.add_layer_norm(x, x[:3], weight, None, 1e-5),
            "add_layer_norm: residual's values must be 24, got 18",
        ),
        (
            lambda: ops.layer_norm_backward(x.bfloat16(), None, x, weight, statistics, True, True, True),
            "layer_norm_backward: dy must have the dtype of x, float32, got bfloat16",
        ),
        (
            lambda: ops.layer_norm_backward(x, x.view(6, 4), x, weight, statistics, True, True, True),
            "layer_norm_backward: dtotal's columns must be 6, got 4",
        ),
        (
            lambda: ops.layer_norm_backward(x, None, x, weight, statistics.T, True, True, True),
            "layer_norm_backward: the rows of statistics must be 2, got 4",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@needs_native
def test_sampling_on_every_instruction_set(ops):
    """The same tokens from each of them, from one row alone and from any number of threads."""
    S, V = 9, 1003
    logits = torch.randn(S, V) * 3
    options = [
        torch.tensor([0.0, 1.0, 0.7] * 3),
        torch.tensor([0, 40, 5] * 3),
        torch.tensor([1.0, 0.9, 1.0] * 3),
        torch.tensor([0.0, 0.0, 0.1] * 3),
        torch.arange(S) + 2**40,
        torch.arange(S) * 7,
    ]
    history, penalty = torch.rand(S, V) < 0.2, torch.full((S,), 1.3)
    results = []
    for limit in range(3):
        ops.simd_level(limit)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.sample(logits, *options, history, penalty, 3))
        for i in range(S):
            row = slice(i, i + 1)
            alone = ops.sample(logits[row], *(o[row] for o in options), history[row], penalty[row], 3)
            assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, results[-1])), i
    expected = reference.sample(
        logits,
        **dict(zip(("temperature", "top_k", "top_p", "min_p", "seeds", "positions"), options)),
        history=history,
        repetition_penalty=penalty,
        top_logprobs=3,
    )
    for tokens, logprobs, ids, values in results:
        assert torch.equal(tokens, expected[0]) and torch.equal(ids, expected[2][0])
        torch.testing.assert_close(logprobs, expected[1], rtol=0, atol=2e-6)
        torch.testing.assert_close(values, expected[2][1], rtol=0, atol=2e-6)


# -------------------------------------------------------------------------------------------------- the first-use build

CHILD = """
import torch
from gpt2_kernels import _native, reference
assert _native._outcome is None, "something was compiled or loaded at import"
loaded = _native.load()
if loaded:
    k = torch.randn(3, 2, 16)
    cache = torch.zeros(1, 4, 2, 16)
    _native.ops().append_kv_(k, k, cache, cache.clone(), torch.tensor([0, 1, 2]))
    assert torch.equal(cache[0, :3], k)
print(loaded, _native.status())
"""


OLD_COMPILER_CHILD = (
    CHILD
    + """
from gpt2_kernels import _runtime
import gpt2_kernels as ops
with _runtime.force("native"):
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    for dtype in (torch.float32, torch.bfloat16):  # by whatever there is
        y = ops.linear(x.to(dtype), weight.to(dtype))
        torch.testing.assert_close(y.float(), x @ weight.T, rtol=0.05, atol=0.1)
    print(_runtime._simd_level(), _runtime.path_of("linear", "cpu"), sep="\\n")
assert _runtime.has_amx() == torch.cpu._is_amx_tile_supported()
"""
)


class Machine:
    """Runs a fresh interpreter with a cache folder, temporary folder and compiler of its own, and logs the compiler."""

    def __init__(self, root: Path, *, compiler: str = 'exec c++ "$@"'):
        self.cache, self.temporary, self.log = root / "cache", root / "tmp", root / "log"
        self.temporary.mkdir(parents=True)
        self.log.touch()
        script = root / "cxx"
        script.write_text(f'#!/bin/sh\necho "$@" >> {self.log}\n{compiler}\n')
        script.chmod(0o755)
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(self.cache), "TMPDIR": str(self.temporary)}
        self.environment |= {"CXX": str(script), "PYTHONPATH": str(Path(_native.__file__).parents[1])}

    def start(self, code: str = CHILD) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, code: str = CHILD) -> str:
        return self.result(self.start(code))

    def result(self, child: subprocess.Popen[str]) -> str:
        out, err = child.communicate(timeout=600)
        assert child.returncode == 0 and err == "", err  # quiet
        return out.strip()

    def compilations(self) -> int:
        return self.log.read_text().count("-shared")

    def libraries(self) -> list[Path]:
        return sorted((self.cache / "gpt2_kernels").iterdir())


def test_every_header_is_part_of_the_key():
    assert sorted(_native.HEADERS) == sorted(path.name for path in _native._source_directory().glob("*.h"))


@needs_compiler
def test_first_use_builds_once_and_repairs_a_damaged_file(tmp_path):
    """Two processes at once on an empty cache, a third that finds the library, one that finds half of it."""
    machine = Machine(tmp_path)
    for child in [machine.start(), machine.start()]:
        assert machine.result(child).startswith(f"True compiled ops loaded from {machine.cache}")
    built = machine.compilations()
    assert built in (1, 2)
    assert 1 <= len(machine.libraries()) <= built, "scratch folders were left behind"
    for extra in machine.libraries()[1:]:
        extra.unlink()
    assert machine.run().startswith("True")
    assert machine.compilations() == built, "compiled although the library was there"

    (library,) = machine.libraries()
    content = library.read_bytes()
    library.write_bytes(content[: len(content) // 2])
    assert machine.run().startswith(f"True compiled ops loaded from {machine.cache}")
    assert machine.compilations() == built + 1
    (library,) = machine.libraries()

    # where the cache cannot be written, a private folder among the temporary files serves
    private = machine.temporary / f"gpt2_kernels-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(library, private)
    machine.environment["XDG_CACHE_HOME"] = str(machine.log)  # a file, so nothing can be created in it
    assert machine.run().startswith(f"True compiled ops loaded from {private}")
    assert machine.compilations() == built + 1


def test_no_compiler(tmp_path):
    machine = Machine(tmp_path)
    del machine.environment["CXX"]
    machine.environment["PATH"] = str(tmp_path / "nothing")
    assert machine.run() == "False no C++ compiler found (looked for c++, g++, clang++)"


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for a compiler is a shell script")
def test_a_compiler_that_fails_is_quoted(tmp_path):
    complain = 'echo note >&2; echo "a.h:1: error: no" >&2; exit 1'
    machine = Machine(tmp_path, compiler=f'[ "$1" = --version ] && exit 0; {complain}')
    assert machine.run() == "False compiler failed: a.h:1: error: no"
    assert machine.compilations() == (len(_native.LEVELS) if X86 else 1)
    assert machine.libraries() == []


@needs_compiler
@pytest.mark.skipif(not X86, reason="levels of x86's instructions")
@pytest.mark.parametrize("level, refused", [(3, "amx"), (2, "amx avx512_dot")], ids=["amx", "products"])
def test_a_compiler_that_is_too_old(tmp_path, level: int, refused: str) -> None:
    """All that it can compile is there, and the status says what is not; also of the library that is found again."""
    old = tmp_path / "old.h"
    old.write_text(f"#pragma GCC poison {refused}\n")  # an error where one of these namespaces is left in the source
    machine = Machine(tmp_path, compiler=f'exec c++ "$@" -O0 -include {old}')  # -O0: in a third of the time
    for _ in range(2):
        status, mine, product = machine.run(OLD_COMPILER_CHILD).splitlines()
        assert status.startswith(f"True compiled ops loaded from {machine.cache}")
        assert status.endswith(_native.LEVELS[level])
        assert int(mine) == min(level, _native.ops().simd_level(ALL_LEVELS))
        assert (product == "compiled C++") == (int(mine) >= DOT_PRODUCTS)
        assert machine.compilations() == 1 + max(_native.LEVELS) - level


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for a compiler is a shell script")
def test_a_new_assembler_is_asked_again(tmp_path, monkeypatch):
    """A library without AMX, made because of the old one, is not what is found then."""
    for version in "12":
        compiler, assembler = tmp_path / "cxx", tmp_path / "as"
        compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo C++ || echo {assembler}\n')
        assembler.write_text(f"#!/bin/sh\necho as {version}\n")
        compiler.chmod(0o755), assembler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        assert _native._find_compiler() == ([str(compiler)], f"C++; as {version}")


def test_missing_sources_and_surprises_are_a_status(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "_outcome", None)
    monkeypatch.setattr(_native, "_find_compiler", lambda: (["c++"], "1"))
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "a" / "b" / "_native.py"))
    assert not _native.load()
    assert _native.status().startswith("C++ sources not found (looked in ")
    monkeypatch.setattr(_native, "_outcome", None)
    monkeypatch.setattr(_native, "_source_directory", lambda: 1 / 0)
    assert not _native.load()
    assert _native.status() == "compiled ops failed: ZeroDivisionError: division by zero"


def test_disabled():
    before = _native.load()
    with _native.disabled():
        assert not _native.load()
        assert _native.status() == "compiled ops disabled"
        with pytest.raises(RuntimeError, match="compiled ops disabled"):
            _native.ops()
    assert _native.load() == before


@pytest.mark.skipif(os.name != "posix", reason="modes and owners of POSIX")
def test_a_shared_temporary_folder_is_not_trusted(tmp_path, monkeypatch):
    """Somebody else could put a library there under our name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    home, private = _native._cache_folders()
    assert home == Path.home() / ".cache" / "gpt2_kernels"
    assert private.parent == tmp_path and private.stat().st_mode & 0o777 == 0o700
    private.chmod(0o770)
    assert list(_native._cache_folders()) == [home]
    private.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    private.symlink_to(tmp_path / "elsewhere")
    assert list(_native._cache_folders()) == [home]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "erf"])
def test_gelu(dtype: torch.dtype, tanh: bool) -> None:
    """Against float64, over the whole range; and each value by itself, so that no place in the tensor matters."""
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0, 3e4, -3e4, 1e20, -1e20, torch.inf])
    x = torch.cat([torch.linspace(-9, 9, 1003), torch.randn(40_000), ends]).to(dtype)
    y = x.clone()
    _native.ops().gelu_(y, tanh)
    approximate = "tanh" if tanh else "none"
    truth = torch.nn.functional.gelu(x.double(), approximate=approximate)
    theirs = torch.nn.functional.gelu(x, approximate=approximate)
    finite = truth.isfinite()
    assert torch.equal(y[~finite].double(), truth[~finite])
    error = ((y.double() - truth).abs() / truth.abs().clamp_min(1e-3))[finite].max().item()
    allowed = ((theirs.double() - truth).abs() / truth.abs().clamp_min(1e-3))[finite].max().item()
    assert error <= 2 * allowed + torch.finfo(dtype).eps
    for size in (1, 7, 1000, 16 << 10):
        part = x[5 : 5 + size].clone()
        _native.ops().gelu_(part, tanh)
        assert torch.equal(part, y[5 : 5 + size])


def test_gelu_keeps_nan_and_refuses_what_it_cannot_do() -> None:
    x = torch.tensor([torch.nan, 1.0])
    _native.ops().gelu_(x, True)
    assert x[0].isnan() and not x[1].isnan()
    with pytest.raises(RuntimeError, match="gelu_: x must be contiguous"):
        _native.ops().gelu_(torch.randn(4, 4).T, True)
    with pytest.raises(RuntimeError, match="gelu_: x must be float32 or bfloat16, got float16"):
        _native.ops().gelu_(torch.randn(4).half(), True)


# ------------------------------------------------------------------------------------------------ cross-entropy


@needs_native
@pytest.mark.parametrize("level", range(ALL_LEVELS + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_on_every_instruction_set(ops, dtype: torch.dtype, level: int) -> None:
    """Rows shorter than a register, with an end of one, and longer than four; a row's bits in any company."""
    if ops.simd_level(level) != level:
        pytest.skip(f"this CPU has no level {level}")
    for V in (1, 5, 16, 67, 1000):
        logits = (8 * torch.randn(9, V + 3)).to(dtype)[:, :V]
        targets = torch.randint(V, (9,))
        targets[4] = -100
        losses, maxima, totals = ops.cross_entropy(logits, targets, -100)
        wide = logits.double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
        gradients = torch.empty(9, V, dtype=dtype)
        ops.cross_entropy_backward_(logits, targets, maxima, totals, -1.5, -100, gradients)
        (truth,) = torch.autograd.grad(expected.sum(), wide)
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(gradients.double(), -1.5 * truth, rtol=tolerance, atol=tolerance)
        for row in (0, 8):
            alone = ops.cross_entropy(logits[row : row + 1], targets[row : row + 1], -100)
            assert [t[0] for t in alone] == [t[row] for t in (losses, maxima, totals)]
        in_place = logits.clone()
        ops.cross_entropy_backward_(in_place, targets, maxima, totals, -1.5, -100, in_place)
        assert torch.equal(in_place, gradients)


@needs_native
def test_cross_entropy_refuses(ops) -> None:
    logits, targets = torch.randn(3, 5), torch.tensor([0, 5, -100])
    with pytest.raises(RuntimeError, match=r"cross_entropy: targets must lie in 0..4 or be -100, got 5"):
        ops.cross_entropy(logits, targets, -100)
    with pytest.raises(RuntimeError, match="cross_entropy: targets must be a vector of 3 dense int64, got 2 of int64"):
        ops.cross_entropy(logits, targets[:2], -100)
    rows = torch.ones(3)
    with pytest.raises(RuntimeError, match="gradients must have the dtype of logits"):
        ops.cross_entropy_backward_(logits, targets % 5, rows, rows, 1.0, -100, logits.bfloat16())
