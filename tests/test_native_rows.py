"""The compiled CPU operators on rows: numbers against float64 PyTorch, the same bits in any company."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from tolerance import assert_accurate
from torch import Tensor

from gpt2_kernels import _native, reference
from gpt2_kernels._runtime import ALL_INSTRUCTIONS, DOT_PRODUCTS

# ------------------------------------------------------------------------------------------------------------- products


needs_products = pytest.mark.skipif(
    not _native.load() or _native.ops().simd_level(ALL_INSTRUCTIONS) < DOT_PRODUCTS,
    reason="needs AVX-512 with BF16 and VNNI",
)


@pytest.fixture(params=[DOT_PRODUCTS, ALL_INSTRUCTIONS], ids=["avx512", "amx"])
def product_ops(ops, request) -> Iterator:
    """The operators on each instruction set that has products."""
    if ops.simd_level(request.param) != request.param:
        pytest.skip(f"the machine has no level {request.param}")
    yield ops


PRODUCTS = [  # M, K, N
    (1, 768, 200),  # decode: sixteen columns at a time, the last ones fewer
    (2, 100, 65),  # eight at a time; K ends inside a register of every type
    (3, 33, 7),  # one row short of four
    (5, 3072, 64),
    (17, 768, 96),  # an AMX tile and one row; a pair of column tiles and one
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
    # rows further apart, with nothing readable between them
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
    # the largest possible sums: none of them wraps or saturates
    for value in (-128, 127):
        x, weight = torch.ones(3, 65536, dtype=dtype), torch.full((20, 65536), value, dtype=torch.int8)
        y = product_ops.linear_int8(x, weight, torch.ones(20), None, None, 0)
        assert relative_error(y, torch.full((3, 20), 65536.0 * value).double()) <= limit


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("K", [768, 101, 5000])  # with K = 5000, many rows are summed piece by piece, few in one go
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
    """It adds bfloat16 sums in another order, so that some bits differ; int8 sums are exact."""
    if ops.simd_level(ALL_INSTRUCTIONS) != ALL_INSTRUCTIONS:
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


# ---------------------------------------------------------------------------------------------------------------- norms


NORM_WIDTHS = [
    1,  # variance 0
    7,  # less than a register
    768,  # GPT-2: whole registers
    769,  # one past it: rows at odd addresses, a register with one active lane
    1600,  # GPT-2 XL
    16384,  # the widest
]


def norm_inputs(R: int, C: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x and another (R, C), their rows further apart than C, weight and bias (C,)."""
    x, other = ((torch.randn(R, C + 3) + 3).to(dtype)[:, :C] for _ in range(2))
    return x, other, *((torch.randn(C) + 3).to(dtype) for _ in range(2))


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
    whole = x.contiguous()  # then of any rank
    assert torch.equal(
        ops.layer_norm(whole.view(3, 3, C), weight, bias, 1e-5)[0].view(9, C), ops.layer_norm(x, weight, bias, 1e-5)[0]
    )


@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", NORM_WIDTHS)
def test_gradients_of_layer_norm_on_every_instruction_set(ops, dtype: torch.dtype, C: int, level: int) -> None:
    """37 rows make three parts, the last one short."""
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


@pytest.mark.parametrize("R", [0, 1, 16, 17, 128 * 16, 128 * 16 + 1])
def test_every_row_is_in_one_part(ops, R: int) -> None:
    """Sums of ones are exact, so a missing or repeated row shows. 128 parts of 16 rows, then longer ones."""
    dy, x, statistics = torch.ones(R, 5), torch.full((R, 5), 3.0), torch.tensor([[1.0], [0.5]]).repeat(1, R)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        dx, dweight, dbias = ops.layer_norm_backward(dy, None, x, torch.ones(5), statistics, True, True, True)
        assert dx.shape == (R, 5) and dweight.tolist() == dbias.tolist() == [R] * 5


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


# ----------------------------------------------------------------------------------------------------------------- GELU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "erf"])
def test_gelu(ops, dtype: torch.dtype, tanh: bool) -> None:
    """Against float64, over the whole range; and each value alone, to show that its position does not matter."""
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0, 3e4, -3e4, 1e20, -1e20, torch.inf])
    x = torch.cat([torch.linspace(-9, 9, 1003), torch.randn(40_000), ends]).to(dtype)
    y = x.clone()
    ops.gelu_(y, tanh)
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
        ops.gelu_(part, tanh)
        assert torch.equal(part, y[5 : 5 + size])


def test_gelu_keeps_nan_and_refuses_what_it_cannot_do(ops) -> None:
    x = torch.tensor([torch.nan, 1.0])
    ops.gelu_(x, True)
    assert x[0].isnan() and not x[1].isnan()
    with pytest.raises(RuntimeError, match="gelu_: x must be contiguous"):
        ops.gelu_(torch.randn(4, 4).T, True)
    with pytest.raises(RuntimeError, match="gelu_: x must be float32 or bfloat16, got float16"):
        ops.gelu_(torch.randn(4).half(), True)


# -------------------------------------------------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize("level", range(ALL_INSTRUCTIONS + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_on_every_instruction_set(ops, dtype: torch.dtype, level: int) -> None:
    """Rows shorter than a register, ending inside one, and longer than four; a row's bits among any others."""
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


def test_cross_entropy_refuses(ops) -> None:
    logits, targets = torch.randn(3, 5), torch.tensor([0, 5, -100])
    with pytest.raises(RuntimeError, match=r"cross_entropy: targets must lie in 0..4 or be -100, got 5"):
        ops.cross_entropy(logits, targets, -100)
    with pytest.raises(RuntimeError, match="cross_entropy: targets must be a vector of 3 dense int64, got 2 of int64"):
        ops.cross_entropy(logits, targets[:2], -100)
    rows = torch.ones(3)
    with pytest.raises(RuntimeError, match="gradients must have the dtype of logits"):
        ops.cross_entropy_backward_(logits, targets % 5, rows, rows, 1.0, -100, logits.bfloat16())


# ------------------------------------------------------------------------------------------------------------- sampling


def test_sampling_on_every_instruction_set(ops):
    """Each gives the same tokens, for a row alone and with any number of threads."""
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
