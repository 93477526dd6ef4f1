"""layer_norm and add_layer_norm, forward and backward, against float64 PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from called import Called
from tolerance import DTYPES, assert_accurate, wide
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import gpt2_kernels as ops
from gpt2_kernels import _native, _operator, _runtime, layernorm

WIDTHS = [
    1,  # variance 0: y is the bias
    33,  # far below a power of two
    768,  # GPT-2
    769,  # one past it: rows start at odd addresses
    1600,  # GPT-2 XL, not a power of two
]


def inputs(device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    C = shape[-1]
    x = (3 * torch.randn(shape, device=device) + 1).to(dtype)
    weight = (1 + 0.5 * torch.randn(C, device=device)).to(dtype)
    bias = torch.randn(C, device=device).to(dtype)
    return x, weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", WIDTHS)
def test_forward(path: torch.device, C: int, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(path, dtype, 3, 2, C)
    truth = F.layer_norm(x.double(), (C,), weight.double(), bias.double())
    assert_accurate(ops.layer_norm(x, weight, bias), F.layer_norm(x, (C,), weight, bias), truth)


def test_widest_row(path: torch.device) -> None:
    x, weight, bias = inputs(path, torch.float32, 1, 16384)
    truth = F.layer_norm(x.double(), (16384,), weight.double(), bias.double())
    assert_accurate(ops.layer_norm(x, weight, bias), F.layer_norm(x, (16384,), weight, bias), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_forward(path: torch.device, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(path, dtype, 5, 100)
    residual = torch.randn_like(x)
    y, total = ops.add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)  # one rounding, as PyTorch's
    assert torch.equal(y, ops.layer_norm(total, weight, bias))  # and it is the rounded sum that is normalised
    truth = F.layer_norm(total.double(), (100,), weight.double(), bias.double())
    assert_accurate(y, F.layer_norm(total, (100,), weight, bias), truth)


def test_no_bias_and_eps(path: torch.device) -> None:
    x, weight, _ = inputs(path, torch.float32, 4, 64)
    x = x * 1e-3  # variance near eps, so that a wrong eps shows
    truth = F.layer_norm(x.double(), (64,), weight.double(), None, 1e-6)
    assert_accurate(ops.layer_norm(x, weight, eps=1e-6), F.layer_norm(x, (64,), weight, None, 1e-6), truth)


def test_large_mean_does_not_cancel(path: torch.device) -> None:
    """E[x^2] - E[x]^2 would lose every digit here: the variance is taken from the centred row."""
    x, weight, bias = inputs(path, torch.float32, 4, 256)
    x = x + 1e4
    truth = F.layer_norm(x.double(), (256,), weight.double(), bias.double())
    assert_accurate(ops.layer_norm(x, weight, bias), F.layer_norm(x, (256,), weight, bias), truth, factor=4)


@pytest.mark.parametrize("layout", ["columns", "transposed", "expanded", "rows", "last_axis_strided"])
def test_layouts(path: torch.device, layout: str) -> None:
    base, weight, bias = inputs(path, torch.float32, 6, 8, 48)
    x = {
        "columns": base[..., 5:37],
        "transposed": base.transpose(0, 1),
        "expanded": base[:1].expand(4, 8, 48),
        "rows": base[::2, 1:5],
        "last_axis_strided": base[..., ::2],
    }[layout]
    C = x.shape[-1]
    y = ops.layer_norm(x, weight[:C], bias[:C])
    truth = F.layer_norm(x.double(), (C,), weight[:C].double(), bias[:C].double())
    assert_accurate(y, F.layer_norm(x, (C,), weight[:C], bias[:C]), truth)


def test_strided_weight(path: torch.device) -> None:
    x, weight, bias = inputs(path, torch.float32, 3, 64)
    weight, bias = weight.repeat_interleave(2)[::2], bias.repeat_interleave(3)[::3]
    truth = F.layer_norm(x.double(), (64,), weight.double(), bias.double())
    assert_accurate(ops.layer_norm(x, weight, bias), F.layer_norm(x, (64,), weight, bias), truth)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_empty(path: torch.device, shape: tuple[int, ...]) -> None:
    x, weight, bias = inputs(path, torch.float32, *shape)
    assert ops.layer_norm(x, weight, bias).shape == shape


def test_rows_do_not_depend_on_each_other(path: torch.device) -> None:
    x, weight, bias = inputs(path, torch.float32, 9, 768)
    together = ops.layer_norm(x, weight, bias)
    alone = torch.cat([ops.layer_norm(row, weight, bias) for row in x.split(1)])
    assert torch.equal(together, alone)


def sum_then_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    total = x if residual is None else x + residual
    return F.layer_norm(total, (x.shape[-1],), weight, bias), None if residual is None else total


def ours(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (
        (ops.layer_norm(x, weight, bias), None) if residual is None else ops.add_layer_norm(x, residual, weight, bias)
    )


def gradients(function: Callable, leaves: tuple, dy: Tensor, dtotal: Tensor | None) -> list[Tensor]:
    y, total = function(*leaves)
    results, grads = ((y,), (dy,)) if dtotal is None else ((y, total), (dy, dtotal))
    return list(torch.autograd.grad(results, [t for t in leaves if t is not None], grads))


def check_gradients(leaves: tuple, dy: Tensor, dtotal: Tensor | None) -> None:
    for t in leaves:
        if t is not None:
            t.requires_grad_()
    got, theirs = (gradients(function, leaves, dy, dtotal) for function in (ours, sum_then_norm))
    doubles = None if dtotal is None else dtotal.double()
    truth = gradients(sum_then_norm, wide(*leaves), dy.double(), doubles)
    names = [name for name, t in zip(("x", "residual", "weight", "bias"), leaves) if t is not None]
    for name, a, b, c in zip(names, got, theirs, truth, strict=True):
        assert_accurate(a, b, c, factor=3, what=f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("add", [True, False], ids=["add", "alone"])
def test_gradients(path: torch.device, add: bool, dtype: torch.dtype, with_bias: bool) -> None:
    x, weight, bias = inputs(path, dtype, 7, 96)  # two programs, the second with one row fewer
    residual, dtotal = (torch.randn_like(x), torch.randn_like(x)) if add else (None, None)
    check_gradients((x, residual, weight, bias if with_bias else None), torch.randn_like(x), dtotal)


@pytest.mark.parametrize(
    ("R", "C"),
    [
        (1, 1),  # variance 0: no gradient reaches x; float32 only, since PyTorch's exact zeros leave no tolerance
        (1, 768),  # GPT-2, one row: a single partial sum
        (5, 769),  # one past it; one row in the second program
        (3, 1600),  # GPT-2 XL: several warps to a row
        (2, 4097),  # one past a row of the launch table
    ],
)
def test_gradient_shapes(path: torch.device, R: int, C: int) -> None:
    x, weight, bias = inputs(path, torch.float32 if C == 1 else torch.bfloat16, R, C)
    check_gradients((x, torch.randn_like(x), weight, bias), torch.randn_like(x), torch.randn_like(x))


def test_gradients_when_programs_own_many_rows(path: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layernorm, "BACKWARD", ((1024, 1, 2, 3),))
    x, weight, bias = inputs(path, torch.float32, 20, 40)
    check_gradients((x, torch.randn_like(x), weight, bias), torch.randn_like(x), torch.randn_like(x))


def test_gradients_with_more_partial_sums_than_a_tile_holds(
    path: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layernorm, "ROWS_PER_PROGRAM", 1)
    monkeypatch.setattr(layernorm, "SUM_ROWS", 8)
    x, weight, bias = inputs(path, torch.float32, 19, 24)  # and columns that end inside a block of 16
    check_gradients((x, None, weight, bias), torch.randn_like(x), None)


@pytest.mark.parametrize("add", [True, False], ids=["add", "alone"])
def test_gradients_of_rows_too_wide_for_sums_in_registers(
    path: torch.device, add: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layernorm, "BACKWARD", ((64, 1, 2, 3),))
    monkeypatch.setattr(layernorm, "WIDE_COLUMNS", 32)
    x, weight, bias = inputs(path, torch.float32, 9, 100)  # four blocks of columns, the last one cut
    residual, dtotal = (torch.randn_like(x), torch.randn_like(x)) if add else (None, None)
    check_gradients((x, residual, weight, bias), torch.randn_like(x), dtotal)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # each (6, 8, 64) -> (4, 6, 32)
    "columns": lambda t: t[:4, :6, 5:37],
    "rows": lambda t: t[:4, 1:7, :32],
    "transposed": lambda t: t.transpose(0, 1)[:4, :, :32],
    "last_axis_strided": lambda t: t[:4, :6, ::2],
    "channels_first": lambda t: t[:4, : 32 // 8].reshape(4, 4, 64)[:, :, :48].reshape(4, 32, 6).transpose(1, 2),
    "expanded_rows": lambda t: t[:1, :1, :32].expand(4, 6, 32),
    "expanded_columns": lambda t: t[:4, :6, :1].expand(4, 6, 32),
    "expanded": lambda t: t[0, 0, 0].expand(4, 6, 32),  # as sum().backward() gives
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "residual", "dy", "dtotal"])
def test_gradients_of_layouts(path: torch.device, which: str, layout: str) -> None:
    _, weight, bias = inputs(path, torch.float32, 32)
    tensors = {name: torch.randn(4, 6, 32, device=path) for name in ("x", "residual", "dy", "dtotal")}
    tensors[which] = LAYOUTS[layout](torch.randn(6, 8, 64, device=path))
    leaves = (tensors["x"], tensors["residual"], weight, bias)
    # a view that requires a gradient keeps its strides
    check_gradients(tuple(t.detach() for t in leaves), tensors["dy"], tensors["dtotal"])


@pytest.mark.parametrize("kind", ["only_y", "only_total"])
def test_a_result_that_nobody_uses_brings_no_gradient(path: torch.device, kind: str) -> None:
    x, weight, bias = inputs(path, torch.float32, 5, 48)
    residual = torch.randn_like(x)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    y, total = ops.add_layer_norm(*leaves)
    grad = torch.randn_like(x)
    got = torch.autograd.grad(y if kind == "only_y" else total, leaves, grad, allow_unused=True)
    if kind == "only_total":
        assert torch.equal(got[0], grad) and torch.equal(got[1], grad) and got[2] is None and got[3] is None
        return
    expected = torch.autograd.grad(F.layer_norm(x + residual, (48,), weight, bias), leaves, grad)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_only_what_is_wanted_is_computed(path: torch.device, wanted: tuple[int, int, int]) -> None:
    x, weight, bias = inputs(path, torch.float32, 6, 40)
    dy = torch.randn_like(x)
    _, statistics = torch.ops.gpt2_kernels.layer_norm(x, weight, bias, 1e-5, True)
    backward = torch.ops.gpt2_kernels.layer_norm_backward
    everything = backward(dy, None, x, weight, statistics, True, True, True)
    some = backward(dy, None, x, weight, statistics, *map(bool, wanted))
    for want, a, b in zip(wanted, some, everything):
        assert a is None if not want else torch.equal(a, b)
    assert torch.ops.gpt2_kernels.layer_norm(x, weight, bias, 1e-5, False)[1] is None


def test_frozen_inputs_get_no_gradient(path: torch.device) -> None:
    x, weight, bias = inputs(path, torch.float32, 6, 40)
    ops.layer_norm(x, weight.requires_grad_(), bias).sum().backward()
    assert x.grad is None and weight.grad is not None and bias.grad is None
    residual = torch.randn_like(x).requires_grad_()
    y, _ = ops.add_layer_norm(x, residual, weight.detach(), bias)
    y.square().sum().backward()
    assert x.grad is None and residual.grad is not None


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_empty_gradients(path: torch.device, shape: tuple[int, ...]) -> None:
    leaves = [t.requires_grad_() for t in inputs(path, torch.float32, *shape)]
    x, weight, bias = leaves
    dx, dweight, dbias = torch.autograd.grad(ops.layer_norm(x, weight, bias), leaves, torch.empty(shape, device=path))
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros_like(bias))


def test_gradients_have_the_same_bits_twice_and_alone(path: torch.device) -> None:
    x, weight, bias = inputs(path, torch.bfloat16, 9, 768)
    dy, dtotal = torch.randn_like(x), torch.randn_like(x)

    def run(rows: slice) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x[rows], x[rows].flip(0), weight, bias)]
        return gradients(ours, tuple(leaves), dy[rows], dtotal[rows])

    together = run(slice(0, 9))
    assert all(torch.equal(a, b) for a, b in zip(together, run(slice(0, 9))))
    total = (x + x.flip(0))[:1]
    alone = gradients(
        ours,
        tuple(t.detach().clone().requires_grad_() for t in (total, torch.zeros_like(total), weight, bias)),
        dy[:1],
        dtotal[:1],
    )
    assert torch.equal(together[0][:1], alone[0])


@pytest.mark.skipif(not _native.load(), reason=_native.status())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_cpu_pytorch_computes_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's path is also right, only slower: no other test shows that it is not taken."""
    monkeypatch.delattr(layernorm, "reference")
    x, weight, bias = inputs(torch.device("cpu"), dtype, 5, 48)
    leaves = [t.requires_grad_() for t in (x, torch.randn_like(x), weight, bias)]
    with _runtime.force("native"):
        gradients(ours, tuple(leaves), torch.randn_like(x), torch.randn_like(x))
        for op in ("layer_norm", "add_layer_norm", "layer_norm_backward"):
            assert _operator.path_of(op, "cpu", dtype) == "compiled C++"


def test_offsets_beyond_two_to_the_31(path: torch.device) -> None:
    """Rows 2^29 elements apart: of this storage, only the rows themselves are ever touched."""
    R, C, stride = 6, 32, 2**29
    try:
        storage = torch.empty(R * stride, dtype=torch.float16, device=path)
    except (RuntimeError, MemoryError):
        pytest.skip("no room for 6 GB of address space")
    far = storage.as_strided((R, C), (stride, 1))
    near, weight, bias = inputs(path, torch.float16, R, C)
    far.copy_(near)
    backward = torch.ops.gpt2_kernels.layer_norm_backward

    def results(t: Tensor) -> list[Tensor]:
        y, total, statistics = torch.ops.gpt2_kernels.add_layer_norm(t, t, weight, bias, 1e-5, True)
        return [y, total, statistics, *backward(t, t, t, weight, statistics, True, True, True)]

    for a, b in zip(results(far), results(near), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("add", [True, False], ids=["add", "alone"])
def test_gradcheck(path: torch.device, add: bool) -> None:
    """The kernels themselves, in float64, against finite differences."""
    if not _runtime.triton_on_cpu():
        pytest.skip("float64 kernels exist in the interpreter alone")
    leaves = [t.double().requires_grad_() for t in inputs(path, torch.float32, 3, 5)]
    x, weight, bias = leaves
    if add:
        residual = torch.randn_like(x).requires_grad_()
        function = layernorm._AddLayerNorm.apply
        assert torch.autograd.gradcheck(lambda *t: function(*t, 1e-5), (x, residual, weight, bias))
        assert torch.autograd.gradcheck(lambda *t: function(*t, None, 1e-5), (x, residual, weight))
    else:
        assert torch.autograd.gradcheck(lambda *t: layernorm._LayerNorm.apply(*t, 1e-5, False), (x, weight, bias))
        assert torch.autograd.gradcheck(lambda *t: layernorm._LayerNorm.apply(*t, 1e-5, True), (x, weight, bias))


def test_opcheck(path: torch.device) -> None:
    x, weight, bias = inputs(path, torch.float32, 4, 32)
    operators = torch.ops.gpt2_kernels
    for statistics in (True, False):
        opcheck(operators.layer_norm.default, (x, weight, bias, 1e-5, statistics))
        opcheck(operators.add_layer_norm.default, (x, x.clone(), weight, None, 1e-5, statistics))
    kept = operators.layer_norm(x, weight, bias, 1e-5, True)[1]
    for dtotal, wanted in [(None, (True, True, True)), (x.clone(), (True, False, True)), (None, (False, True, False))]:
        opcheck(operators.layer_norm_backward.default, (x.cos(), dtotal, x, weight, kept, *wanted))


def test_compile(path: torch.device) -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(path, torch.float32, 4, 32))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, total = ops.add_layer_norm(ops.layer_norm(x.sin(), weight, bias), x, weight, bias)
        return (y * total).sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, bias), function(x, weight, bias))
    expected = torch.autograd.grad(function(x, weight, bias), (x, weight, bias))
    got = torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_bad_input(path: torch.device) -> None:
    x, weight, bias = inputs(path, torch.float32, 4, 32)
    for arguments, message in [
        ((x, weight[:31]), r"layer_norm: weight must be \(C,\) = \(32,\), got \(31,\)"),
        ((x, weight, bias.double()), r"layer_norm: bias must have the dtype of x"),
        (
            (x.double(), weight.double()),
            r"layer_norm: dtype of x must be float32, float16 or bfloat16, got torch.float64",
        ),
        ((torch.empty(2, 16385, device=path), weight), r"layer_norm: last axis of x must lie in 1..16384"),
        ((x, weight, bias, -1.0), r"layer_norm: eps must be at least 0, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.layer_norm(*arguments)
    with pytest.raises(ValueError, match=r"add_layer_norm: residual must be the shape of x"):
        ops.add_layer_norm(x, x[:3], weight, bias)


def test_compile_with_one_tensor_for_several(path: torch.device) -> None:
    """Dynamo refuses an autograd.Function that is given one tensor twice."""
    x, weight, _ = (t.requires_grad_() for t in inputs(path, torch.float32, 4, 32))

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return (ops.add_layer_norm(x, x, weight, weight)[0] * ops.layer_norm(x, weight, weight)).sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(x, weight), (x, weight))
    for a, b in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("used", ["both", "y", "stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prenorm(path: torch.device, dtype: torch.dtype, used: str) -> None:
    """The stream is x itself, and only the kernel adds its gradient."""
    leaves = [t.requires_grad_() for t in inputs(path, dtype, 5, 100)]
    exact, grads = wide(*leaves), [torch.randn(5, 100, device=path).to(dtype) for _ in range(2)]
    chosen = {"both": slice(None), "y": slice(1), "stream": slice(1, None)}[used]

    def gradients(results: Any, leaves: Any, grads: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(results[chosen], leaves, grads[chosen], allow_unused=True, materialize_grads=True)

    ours = ops.layer_norm(*leaves, prenorm=True)
    assert torch.equal(ours[0], ops.layer_norm(*leaves)) and torch.equal(ours[1], leaves[0])
    with Called() as called:
        found = gradients(ours, leaves, grads)
    assert used == "stream" or "gpt2_kernels.layer_norm_backward.default" in called.names
    assert not any("add" in name.split(".")[1] for name in called.names), called.names
    theirs = gradients((F.layer_norm(leaves[0], (100,), *leaves[1:]), leaves[0]), leaves, grads)
    truth = gradients((F.layer_norm(exact[0], (100,), *exact[1:]), exact[0]), exact, [g.double() for g in grads])
    for a, b, c in zip(found, theirs, truth):
        assert_accurate(a, b, c, factor=3)
    with torch.no_grad():
        y, stream = ops.layer_norm(*leaves, prenorm=True)
    assert stream is leaves[0] and torch.equal(y, ours[0])


def test_prenorm_of_what_needs_no_gradient(path: torch.device) -> None:
    """Frozen embeddings below, trainable weights: the stream still needs no gradient."""
    x, weight, bias = inputs(path, torch.float32, 5, 100)
    y, stream = ops.layer_norm(x, weight.requires_grad_(), bias, prenorm=True)
    assert stream is x
    (found,) = torch.autograd.grad((y * stream).sum(), weight)
    (expected,) = torch.autograd.grad((ops.layer_norm(x, weight, bias) * x).sum(), weight)
    torch.testing.assert_close(found, expected)


def test_prenorm_under_autocast(path: torch.device) -> None:
    """The norm is computed in float32, and the stream keeps its dtype and its gradient."""
    x, weight, bias = inputs(path, torch.float32, 5, 100)
    for stream_dtype in (torch.bfloat16, torch.float32):
        leaf = x.to(stream_dtype).requires_grad_()
        with torch.autocast(path.type, torch.bfloat16):
            y, stream = ops.layer_norm(leaf, weight, bias, prenorm=True)
        assert (y.dtype, stream.dtype) == (torch.float32, stream_dtype)
        (found,) = torch.autograd.grad((y.sin() + stream).sum(), leaf)
        other = leaf.detach().requires_grad_()
        out = ops.layer_norm(other.float(), weight, bias).sin() + other
        torch.testing.assert_close(found, torch.autograd.grad(out.sum(), other)[0], rtol=1e-2, atol=1e-2)


def test_prenorm_compiled_and_checkpointed(path: torch.device) -> None:
    leaves = [t.requires_grad_() for t in inputs(path, torch.float32, 4, 32)]

    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        for _ in range(2):
            y, x = ops.layer_norm(x, weight, bias, prenorm=True)
            x = x + y.tanh()
        return x.square().sum()

    torch._dynamo.reset()
    expected = torch.autograd.grad(block(*leaves), leaves)
    for way in (
        torch.compile(block, fullgraph=True, backend="aot_eager"),
        functools.partial(checkpoint, block, use_reentrant=False),
    ):
        for a, b in zip(torch.autograd.grad(way(*leaves), leaves), expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
