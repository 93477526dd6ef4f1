"""linear and gelu_mlp against float64 PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from called import Called
from layouts import GRADIENT_LAYOUTS, LAYOUTS, in_layout
from tolerance import DTYPES, assert_accurate, wide
from torch import Tensor
from torch.library import opcheck

import gpt2_kernels as ops
from gpt2_kernels import _linear_decode, _native, _runtime, gemm

SHAPES = [
    (1, 96, 80),  # one row: decode
    (5, 64, 64),  # K a multiple of the tile
    (130, 72, 136),  # one past a row tile, ragged everywhere
    (9, 1, 3),  # K = 1
    (600, 32, 70),  # more row tiles than one group holds, the last group short
]


def inputs(device: torch.device, dtype: torch.dtype, M: int, K: int, N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(M, K, device=device).to(dtype)
    weight = (torch.randn(N, K, device=device) / K**0.5).to(dtype)
    bias = torch.randn(N, device=device).to(dtype)
    residual = torch.randn(M, N, device=device).to(dtype)
    return x, weight, bias, residual


def torch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    y = F.linear(x, weight, bias)
    if activation:
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(path: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias, _ = inputs(path, dtype, *shape)
    truth = torch_linear(x.double(), weight.double(), bias.double())
    assert_accurate(ops.linear(x, weight, bias), torch_linear(x, weight, bias), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_epilogue(path: torch.device, activation: str, dtype: torch.dtype) -> None:
    x, weight, bias, residual = inputs(path, dtype, 20, 64, 70)
    x = x * 4  # far enough out to reach both tails of the GELU
    truth = torch_linear(x.double(), weight.double(), bias.double(), activation, residual.double())
    theirs = torch_linear(x, weight, bias, activation, residual)
    assert_accurate(ops.linear(x, weight, bias, activation=activation, residual=residual), theirs, truth)


def test_the_two_gelus_differ(path: torch.device) -> None:
    x, weight, bias, _ = inputs(path, torch.float32, 20, 64, 70)
    erf, tanh = (ops.linear(x, weight, bias, activation=a) for a in ("gelu", "gelu_tanh"))
    assert 1e-5 < (erf - tanh).abs().max() < 1e-2


def test_gelu_at_the_ends(path: torch.device) -> None:
    """exp of a large argument must give 0 or x in the end, never NaN."""
    x = torch.tensor([[-1e4], [-50.0], [0.0], [50.0], [1e4]], device=path)
    one = torch.ones(1, 1, device=path)
    for activation in ("gelu", "gelu_tanh"):
        y = ops.linear(x, one, activation=activation)
        assert torch.equal(y, x.clamp_min(0)), activation


@pytest.mark.parametrize(
    ("which", "layout"),
    [(w, x) for w in ("x", "weight", "residual") for x in LAYOUTS] + [("gradient", x) for x in GRADIENT_LAYOUTS],
)
def test_layouts(path: torch.device, which: str, layout: str) -> None:
    """Forward and backward on every memory layout of every input, and of the incoming gradient."""
    x, weight, bias, residual = inputs(path, torch.float32, 12, 48, 40)
    tensors = {"x": x, "weight": weight, "residual": residual, "gradient": torch.randn(12, 40, device=path)}
    tensors[which] = in_layout(tensors[which], layout)
    grad = tensors.pop("gradient")
    leaves = [*(t.detach().requires_grad_() for t in tensors.values()), bias.requires_grad_()]

    def ours_way(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        return ops.linear(x, weight, bias, activation="gelu_tanh", residual=residual)

    def torch_way(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        return torch_linear(x, weight, bias, "gelu_tanh", residual)

    compare_gradients(ours_way, torch_way, leaves, grad)


def test_a_transposed_weight_is_not_copied(path: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' GPT-2 stores it: forward and backward read it in place."""
    x, weight, _, _ = inputs(path, torch.float32, 12, 48, 40)
    grad = torch.randn(12, 40, device=path)
    expected = ops.linear(x, weight), torch.ops.gpt2_kernels.linear_backward(grad, weight, None, "", True)
    transposed = weight.T.contiguous().T
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied"))
    torch.testing.assert_close(ops.linear(x, transposed), expected[0])  # on a CPU the two may add in different orders
    assert torch.equal(torch.ops.gpt2_kernels.linear_backward(grad, transposed, None, "", True), expected[1])


def compare_gradients(ours_way: Any, torch_way: Any, leaves: list[Tensor], grad: Tensor) -> None:
    """The result and its gradients, against the same in float64."""
    exact = wide(*leaves)
    ours, theirs, truth = ours_way(*leaves), torch_way(*leaves), torch_way(*exact)
    assert_accurate(ours, theirs, truth)
    grads = [
        torch.autograd.grad(result, inputs_, grad.to(result.dtype))
        for result, inputs_ in ((ours, leaves), (theirs, leaves), (truth, exact))
    ]
    for i, (a, b, c) in enumerate(zip(*grads)):
        assert_accurate(a, b, c, factor=3, what=f"gradient of input {i}")


def test_batch_axes(path: torch.device) -> None:
    x, weight, bias, _ = inputs(path, torch.float32, 12, 48, 40)
    x, bias = x.view(3, 4, 48).transpose(0, 1).requires_grad_(), bias.repeat_interleave(2)[::2]
    grad = torch.randn(4, 3, 40, device=path)

    def torch_way(x: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    compare_gradients(lambda x: ops.linear(x, weight, bias), torch_way, [x], grad)


@pytest.mark.parametrize("stride", [2**29, 2**25 + 16], ids=["within a tile", "in the second step along K"])
def test_offsets_beyond_two_to_the_31(path: torch.device, stride: int) -> None:
    """x, weight and residual with rows so far apart that an int32 offset would wrap, forward and backward."""
    if path.type == "cuda" and torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    rows = 2**31 // stride + 3
    storage = torch.empty(rows * stride, dtype=torch.float16, device=path)
    near, other, square = (torch.randn(n, 16, device=path).half() for n in (rows, rows, 16))
    far = storage.as_strided((rows, 16), (stride, 1))
    far.copy_(near)
    op = torch.ops.gpt2_kernels
    for call in (
        lambda t: ops.linear(t, other),
        lambda t: ops.linear(other, t),
        lambda t: ops.linear(other, square, residual=t),
        lambda t: op.linear_backward(t, square, None, "", True),
        lambda t: op.linear_backward(other @ near.T, t, None, "", True),
    ):
        assert torch.equal(call(far), call(near))


def test_empty(path: torch.device) -> None:
    x, weight, bias, _ = inputs(path, torch.float32, 1, 32, 16)
    assert ops.linear(x[:0], weight, bias).shape == (0, 16)
    assert ops.linear(x, weight[:0], bias[:0]).shape == (1, 0)
    nothing = torch.zeros(1, 0, device=path, requires_grad=True)
    ops.linear(x, weight[:0], residual=nothing).sum().backward()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant(path: torch.device, dtype: torch.dtype, threads: int, request: pytest.FixtureRequest) -> None:
    """A row has the same bits alone and among any others, which the engine's promise rests on.

    On a CPU this is a property of the installed PyTorch, with any number of threads, and of our GELU.
    """
    on_kernel = ops.path_of("linear", path.type).startswith("Triton")
    if on_kernel and threads > 1:
        pytest.skip("threads are the CPU path's")
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    # 67 x 500 elements: more than one thread's share of an elementwise operation, which ends inside a row
    x, weight, bias, residual = inputs(path, dtype, 67, 128, 130 if on_kernel else 500)
    activation = "gelu_tanh" if on_kernel or _native.load() else None
    together = ops.linear(x, weight, bias, activation=activation, residual=residual)
    for size in (1, 33) if on_kernel else (1, 2, 3, 5, 6, 11, 16, 33):
        apart = [
            ops.linear(a, weight, bias, activation=activation, residual=r)
            for a, r in zip(x.split(size), residual.split(size))
        ]
        assert torch.equal(torch.cat(apart), together), f"in batches of {size}"


def test_gradients_are_batch_invariant_too(path: torch.device) -> None:
    """A row of dx, through one layer and through the MLP."""
    x, w1, b1, _ = inputs(path, torch.bfloat16, 35, 64, 130)
    _, w2, b2, _ = inputs(path, torch.bfloat16, 35, 130, 64)
    grad = torch.randn(35, 64, device=path).bfloat16()
    pre, grad1 = torch.randn(35, 130, device=path).bfloat16(), torch.randn(35, 130, device=path).bfloat16()
    backward = torch.ops.gpt2_kernels.linear_backward

    def dx(x: Tensor, activation: str | None) -> Tensor:
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(ops.linear(x, w1, b1, activation=activation), x, grad1[: x.shape[0]])
        return found

    for activation in (None, "gelu_tanh"):
        assert torch.equal(dx(x, activation)[:1], dx(x[:1], activation))
    together = backward(grad, w2, None, "", True)
    assert torch.equal(torch.cat([backward(g, w2, None, "", True) for g in grad.split(1)]), together)
    together = backward(grad, w2, pre, "gelu_tanh", True)
    apart = [backward(g, w2, p, "gelu_tanh", True) for g, p in zip(grad.split(11), pre.split(11))]
    assert torch.equal(torch.cat(apart), together)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_slope_of_gelu_is_batch_invariant(path: torch.device, activation: str) -> None:
    """aten.gelu_backward on a CPU rounds differently at the end of a thread's share, which 67 x 501 elements have."""
    grad, pre = torch.randn(67, 501, device=path), torch.randn(67, 501, device=path)
    together = gemm._gelu_backward(grad, pre, activation, True)
    for size in (1, 2, 11, 33):
        apart = [gemm._gelu_backward(g, p, activation, True) for g, p in zip(grad.split(size), pre.split(size))]
        assert torch.equal(torch.cat(apart), together), f"in batches of {size}"


def test_a_gradient_does_not_change_the_result(path: torch.device) -> None:
    """Training also writes the GELU's input; generation computes the same bits."""
    x, w1, b1, _ = inputs(path, torch.bfloat16, 10, 48, 96)
    _, w2, b2, residual = inputs(path, torch.bfloat16, 10, 96, 48)
    plain = ops.linear(x, w1, b1, activation="gelu_tanh"), ops.gelu_mlp(x, w1, b1, w2, b2, residual=residual)
    x.requires_grad_()
    assert torch.equal(ops.linear(x, w1, b1, activation="gelu_tanh"), plain[0])
    assert torch.equal(ops.gelu_mlp(x, w1, b1, w2, b2, residual=residual), plain[1])


def test_programs_walk_over_tiles(path: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper a few persistent programs compute all tiles, with the same bits as one program per tile."""
    x, weight, bias, residual = inputs(path, torch.float32, 200, 40, 150)
    arguments = {"activation": "gelu", "residual": residual}
    expected = ops.linear(x, weight, bias, **arguments)
    monkeypatch.setattr(_runtime, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(gemm, "PERSISTENT_FROM", 0)
    assert torch.equal(ops.linear(x, weight, bias, **arguments), expected)
    grad = torch.ops.gpt2_kernels.linear_backward(residual, weight, None, "", True)
    monkeypatch.setattr(gemm, "PERSISTENT_FROM", 1000)
    assert torch.equal(torch.ops.gpt2_kernels.linear_backward(residual, weight, None, "", True), grad)


@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_mlp(path: torch.device, approximate: str, dtype: torch.dtype, batch_invariant: bool) -> None:
    x, w1, b1, _ = inputs(path, dtype, 6, 48, 96)
    _, w2, b2, residual = inputs(path, dtype, 6, 96, 48)
    leaves = [t.requires_grad_() for t in (2 * x, w1, b1, w2, b2, residual)]

    def torch_way(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2) + residual

    def ours_way(*tensors: Tensor) -> Tensor:
        *inputs_, residual = tensors
        return ops.gelu_mlp(*inputs_, approximate=approximate, residual=residual, batch_invariant=batch_invariant)

    compare_gradients(ours_way, torch_way, leaves, torch.randn(6, 48, device=path))


@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(path: torch.device, dtype: torch.dtype, activation: str | None, batch_invariant: bool) -> None:
    x, *others = inputs(path, dtype, 10, 24, 40)
    leaves = [t.requires_grad_() for t in (3 * x, *others)]  # both tails of the GELU

    def ours_way(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        options = {"activation": activation, "residual": residual, "batch_invariant": batch_invariant}
        return ops.linear(x, weight, bias, **options)

    def torch_way(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return torch_linear(x, weight, bias, activation, residual)

    compare_gradients(ours_way, torch_way, leaves, torch.randn(10, 40, device=path))


@pytest.mark.parametrize("server", ["ours", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whoever_serves_nothing_is_left_out(
    path: torch.device, dtype: torch.dtype, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either entry of FASTER gives the activation, the residual and GELU'; batch_invariant bypasses the table."""
    monkeypatch.setattr(gemm, "FASTER", dict.fromkeys(gemm.FASTER, server))
    launches: list[int] = []
    launched = gemm._product

    def counted(*args: Any, **options: Any) -> Tensor:
        launches.append(1)
        return launched(*args, **options)

    monkeypatch.setattr(gemm, "_product", counted)
    x, w1, b1, _ = inputs(path, dtype, 6, 48, 96)
    _, w2, b2, residual = inputs(path, dtype, 6, 96, 48)
    leaves = [t.requires_grad_() for t in (2 * x, w1, b1, w2, b2, residual)]

    def torch_way(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2) + residual

    for batch_invariant in (True, False):
        launches.clear()

        def ours_way(*tensors: Tensor, batch_invariant: bool = batch_invariant) -> Tensor:
            *inputs_, residual = tensors
            return ops.gelu_mlp(*inputs_, residual=residual, batch_invariant=batch_invariant)

        compare_gradients(ours_way, torch_way, leaves, torch.randn(6, 48, device=path))
        if ops.path_of("linear", path.type).startswith("Triton"):
            assert len(launches) == (4 if batch_invariant or server == "ours" else 0)


def test_dbias_is_added_in_float32(path: torch.device) -> None:
    """4096 numbers from 1 to 2: a sum kept in bfloat16 would stop growing at 512."""
    x, weight, bias, _ = inputs(path, torch.bfloat16, 4096, 2, 3)
    bias.requires_grad_()
    grad = (1 + torch.rand(4096, 3, device=path)).bfloat16()
    (ours,) = torch.autograd.grad(ops.linear(x, weight, bias, batch_invariant=False), bias, grad)
    (theirs,) = torch.autograd.grad(F.linear(x, weight, bias), bias, grad)
    assert_accurate(ours, theirs, grad.double().sum(0))


def test_plain_product_without_batch_invariance(path: torch.device) -> None:
    x, weight, bias, _ = inputs(path, torch.float32, 10, 24, 40)
    truth = F.linear(x.double(), weight.double(), bias.double())
    assert_accurate(ops.linear(x, weight, bias, batch_invariant=False), F.linear(x, weight, bias), truth)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_without_batch_invariance(path: torch.device, dtype: torch.dtype, transposed: bool) -> None:
    """From 128 rows on, PyTorch may compute this on a CPU; the residual is added to its result and stays unchanged."""
    x, weight, bias, residual = inputs(path, dtype, 130, 24, 40)
    weight = weight.T.contiguous().T if transposed else weight
    x, residual = x.view(2, 65, 24), residual.view(2, 65, 40)
    kept = residual.clone()
    for other in (None, residual):
        found = ops.linear(x, weight, bias, residual=other, batch_invariant=False)
        exact = None if other is None else other.double()
        truth = torch_linear(x.double(), weight.double(), bias.double(), None, exact)
        assert found.shape == (2, 65, 40)
        assert_accurate(found, torch_linear(x, weight, bias, None, other), truth)
    assert torch.equal(residual, kept)
    if path.type == "cpu" and not ops.path_of("linear", "cpu").startswith("Triton"):
        with Called() as called, _runtime.force("native"):
            ops.linear(x, weight, bias, batch_invariant=False)
        assert "aten.linear.default" not in called.names


@pytest.mark.parametrize("wanted", ["x", "w1", "b1", "w2", "b2", "residual"])
def test_only_wanted_gradients_are_made(path: torch.device, wanted: str) -> None:
    x, w1, b1, _ = inputs(path, torch.float32, 4, 16, 24)
    _, w2, b2, residual = inputs(path, torch.float32, 4, 24, 16)
    tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "residual": residual}
    tensors[wanted].requires_grad_()
    ops.gelu_mlp(**tensors).square().sum().backward()
    alone = tensors[wanted].grad
    assert all((t.grad is not None) == (name == wanted) for name, t in tensors.items())
    for t in tensors.values():
        t.requires_grad_()
    (among,) = torch.autograd.grad(ops.gelu_mlp(**tensors).square().sum(), tensors[wanted])
    torch.testing.assert_close(alone, among)


# --- decode ---------------------------------------------------------------------------------------------------------

DECODED = [
    (1, 300, 70),  # two splits, the last one short; ragged everywhere
    (5, 1024, 64),  # splits of equal length
    (70, 256, 200),  # two tiles of rows
    (3, 40, 9),  # one split
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", DECODED, ids=str)
def test_decode(path: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool) -> None:
    x, weight, bias, residual = inputs(path, dtype, *shape)
    weight = weight.T.contiguous().T if transposed else weight
    for options in ({}, {"bias": bias, "activation": "gelu_tanh", "residual": residual}, {"activation": "gelu"}):
        found = ops.linear(x, weight, decode=True, **options)
        theirs = torch_linear(x, weight, **{"bias": None, **options})
        exact = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
        assert_accurate(found, theirs, torch_linear(x.double(), weight.double(), **{"bias": None, **exact}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_is_batch_invariant(path: torch.device, dtype: torch.dtype) -> None:
    """Over several splits, and twice: the last program leaves the tickets as they were."""
    if not ops.path_of("linear", path.type).startswith("Triton"):
        pytest.skip("decode is a kernel of its own on a GPU alone")
    x, w1, b1, _ = inputs(path, dtype, 130, 384, 136)
    _, w2, b2, residual = inputs(path, dtype, 130, 136, 384)
    assert _linear_decode.splits_of(136, 384, 64, 64)[0] > 1
    together = ops.gelu_mlp(x, w1, b1, w2, b2, residual=residual, decode=True)
    for size in (1, 33, 130):
        parts = zip(x.split(size), residual.split(size))
        apart = [ops.gelu_mlp(a, w1, b1, w2, b2, residual=r, decode=True) for a, r in parts]
        assert torch.equal(torch.cat(apart), together), f"in batches of {size}"


def test_decode_gives_its_tickets_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer serves launch after launch, of any shape; unwritten scratch is not read."""
    if not ops.path_of("linear", "cpu").startswith("Triton"):
        pytest.skip("counts programs of the interpreter")
    tickets = torch.zeros(100, dtype=torch.int32)
    monkeypatch.setattr(_linear_decode, "tickets", lambda number, device: tickets)
    for M, K, N in DECODED:
        x, weight, bias, _ = inputs(torch.device("cpu"), torch.float32, M, K, N)
        expected = F.linear(x, weight, bias)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", lambda shape, **options: torch.full(shape, torch.nan, **options))
            torch.testing.assert_close(ops.linear(x, weight, bias, decode=True), expected)
        assert not tickets.any()


def test_splits_depend_on_the_weight_alone_and_fill_a_gpu() -> None:
    for N, K, splits, split_k in [
        (2304, 768, 4, 192), (768, 768, 6, 128), (3072, 768, 3, 256), (768, 3072, 12, 256), (50257, 768, 1, 768),
        (4800, 1600, 2, 832), (1600, 6400, 6, 1088), (7, 5, 1, 64),
    ]:  # fmt: skip
        assert _linear_decode.splits_of(N, K, 64, 64) == (splits, split_k)


def test_decode_of_nothing_and_of_gradients(path: torch.device) -> None:
    x, weight, bias, _ = inputs(path, torch.float32, 4, 16, 24)
    assert ops.linear(x[:0], weight, bias, decode=True).shape == (0, 24)
    assert ops.linear(x, weight[:0], decode=True).shape == (4, 0)
    assert torch.equal(
        ops.linear(x.view(2, 2, 16), weight, decode=True).view(4, 24), ops.linear(x, weight, decode=True)
    )
    for call in (
        lambda: ops.linear(x.requires_grad_(), weight, decode=True),
        lambda: ops.gelu_mlp(x.requires_grad_(), weight, bias, weight.T, bias[:16], decode=True),
    ):
        with pytest.raises(
            ValueError, match=r"(linear|gelu_mlp): decode must be without gradients .* got requires_grad"
        ):
            call()


# --- gradients of weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_weights_lie_as_the_weights_do(path: torch.device, transposed: bool) -> None:
    """Autograd copies any other layout into .grad element by element, which takes twenty times the product's time."""
    x, w1, b1, _ = inputs(path, torch.float32, 4, 16, 24)
    _, w2, b2, _ = inputs(path, torch.float32, 4, 24, 16)
    weights = [(w.T.contiguous().T if transposed else w).requires_grad_() for w in (w1, w2)]
    for y, wanted in (
        (ops.gelu_mlp(x, weights[0], b1, weights[1], b2), weights),
        (ops.linear(x, weights[0], b1, activation="gelu"), weights[:1]),
    ):
        found = torch.autograd.grad(y.square().sum(), wanted)
        assert [g.stride() for g in found] == [w.stride() for w in wanted]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gradients_are_those_of_finite_differences(path: torch.device, activation: str) -> None:
    if path.type == "cuda" or not ops.path_of("linear", "cpu").startswith("Triton"):
        pytest.skip("float64 exists in the interpreter alone")
    x, w1, b1, _ = (t.requires_grad_() for t in inputs(path, torch.float64, 3, 5, 18))
    _, w2, b2, residual = (t.requires_grad_() for t in inputs(path, torch.float64, 3, 18, 4))

    def mlp(*tensors: Tensor) -> Tensor:
        return gemm._GeluMLP.apply(*tensors, activation, True)

    def layer(*tensors: Tensor) -> Tensor:
        return gemm._Linear.apply(*tensors, None, activation, True)

    assert torch.autograd.gradcheck(mlp, (x, w1, b1, w2, b2, residual), fast_mode=True)
    assert torch.autograd.gradcheck(layer, (x, w1, b1), fast_mode=True)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_derivative_at_the_ends(path: torch.device, activation: str) -> None:
    pre = torch.tensor([[-1e4, -50.0, 0.0, 50.0, 1e4]], device=path)
    grad, weight = torch.ones(1, 1, device=path), torch.ones(1, 5, device=path)
    slope = torch.ops.gpt2_kernels.linear_backward(grad, weight, pre, activation, True)
    torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=path))


def test_opcheck(path: torch.device) -> None:
    x, weight, bias, residual = inputs(path, torch.float32, 4, 32, 24)
    op = torch.ops.gpt2_kernels.linear.default
    opcheck(op, (x, weight, bias, residual, "gelu_tanh", True, True))
    opcheck(op, (x.view(2, 2, 32), weight, None, None, "", False, False))
    opcheck(op, (x, weight, bias, None, "", True, False))  # nothing to keep where there is no activation
    backward = torch.ops.gpt2_kernels.linear_backward.default
    opcheck(backward, (residual, weight, x.clone(), "gelu", True))
    opcheck(backward, (residual, weight, None, "", False))


def test_compile(path: torch.device) -> None:
    x, w1, b1, _ = (t.requires_grad_() for t in inputs(path, torch.float32, 4, 32, 48))
    _, w2, b2, _ = (t.requires_grad_() for t in inputs(path, torch.float32, 4, 48, 32))

    def function(x: Tensor) -> Tensor:
        return ops.gelu_mlp(x.sin(), w1, b1, w2, b2, residual=x).sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = (x, w1, b1, w2, b2)
    expected = torch.autograd.grad(function(x), leaves)
    for a, b in zip(torch.autograd.grad(compiled(x), leaves), expected):
        torch.testing.assert_close(a, b)


def test_bad_input(path: torch.device) -> None:
    x, weight, bias, residual = inputs(path, torch.float32, 4, 32, 24)
    for call, message in [
        (lambda: ops.linear(x[:, :31], weight), r"linear: last axis of x must be K = 32, got \(4, 31\)"),
        (lambda: ops.linear(x, weight[0]), r"linear: weight must be \(N, K\), got \(32,\)"),
        (lambda: ops.linear(x, weight, bias[:3]), r"linear: bias must be \(N,\) = \(24,\), got \(3,\)"),
        (lambda: ops.linear(x, weight.half()), r"linear: weight must have the dtype of x"),
        (lambda: ops.linear(x, weight, activation="relu"), r"linear: activation must be .* got 'relu'"),
        (lambda: ops.linear(x, weight, residual=residual[:2]), r"linear: residual must be the shape of the result"),
        (lambda: ops.gelu_mlp(x, weight, bias, weight, bias), r"gelu_mlp: w2 must be \(N, I\)"),
        (lambda: ops.gelu_mlp(x, weight, bias, weight.T, bias, approximate="erf"), r"gelu_mlp: approximate must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
