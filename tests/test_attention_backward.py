"""The gradients of attention, through out and the logsumexp, against float64 PyTorch and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from called import Called
from layouts import GRADIENT_LAYOUTS, LAYOUTS, in_layout
from test_fused_attention import CASES, FAR, Case, call, inputs, torch_attention
from tolerance import assert_accurate, wide
from torch import Tensor

import gpt2_kernels as ops


@pytest.mark.parametrize(
    "name",
    ["gpt2 head, two row tiles", "grouped heads", "first rows see no key", "window", "full", "window of all 32 bits"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(path: torch.device, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    leaves = [t.detach().requires_grad_() for t in inputs(path, dtype, case)]
    grad = torch.randn(case.B, case.Tq, 1, 1, device=path).to(dtype).expand(case.B, case.Tq, case.H, case.D)
    exact = wide(*leaves)
    options = (case.causal, case.window)
    out = ops.attention(*leaves, causal=case.causal, window=case.window)
    ours = torch.autograd.grad(out, leaves, grad)
    rows = (
        slice(max(0, case.Tq - case.Tk), None) if case.causal else slice(None)
    )  # torch gives NaN for rows with no key
    theirs = torch.autograd.grad(torch_attention(*_tail(leaves, rows), *options)[0], leaves, grad[:, rows])
    truth = torch.autograd.grad(torch_attention(*_tail(exact, rows), *options)[0], exact, grad[:, rows].double())
    for letter, a, b, c in zip("qkv", ours, theirs, truth):
        assert_accurate(a, b, c, factor=3, what=f"gradient of {letter}")


def _tail(tensors: tuple | list, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tensors
    return q[:, rows], k, v


@pytest.mark.parametrize(
    ("name", "case"),
    {
        "causal": Case(1, 18, 18, 1, 1, 5),
        "grouped, over a past": Case(2, 3, 19, 4, 2, 3),
        "full": Case(1, 3, 17, 1, 1, 4, causal=False),
        "window": Case(1, 20, 20, 1, 1, 2, window=5),
        "rows without keys": Case(1, 18, 2, 1, 1, 2),
    }.items(),
    ids=str,
)
def test_gradients_are_those_of_finite_differences(path: torch.device, name: str, case: Case) -> None:
    """Through out and the logsumexp, by the kernels themselves."""
    if path.type == "cuda" or not ops.path_of("attention", "cpu").startswith("Triton"):
        pytest.skip("float64 exists in the interpreter alone")
    leaves = [t.detach().requires_grad_() for t in inputs(path, torch.float64, case)]

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = call(list(leaves), case)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["gpt2 head, two row tiles", "grouped heads", "window"])
def test_gradient_of_the_logsumexp(path: torch.device, name: str) -> None:
    case = CASES[name]
    leaves = [t.detach().requires_grad_() for t in inputs(path, torch.float32, case)]
    grads = torch.randn(case.B, case.Tq, case.H, case.D, device=path), torch.randn(case.B, case.H, case.Tq, device=path)
    ours = torch.autograd.grad(
        ops.attention(*leaves, causal=case.causal, window=case.window, return_lse=True), leaves, grads
    )
    theirs = torch.autograd.grad(torch_attention(*leaves, case.causal, case.window), leaves, grads)
    exact = wide(*leaves)
    truth = torch.autograd.grad(torch_attention(*exact, case.causal, case.window), exact, [g.double() for g in grads])
    for letter, a, b, c in zip("qkv", ours, theirs, truth):
        assert_accurate(a, b, c, factor=3, what=f"gradient of {letter}")
    alone = torch.autograd.grad(ops.attention(*leaves, return_lse=True)[1].sum(), leaves)
    assert not alone[2].any()  # the logsumexp does not depend on v


@pytest.mark.parametrize(
    ("which", "layout"), [("inputs", x) for x in LAYOUTS] + [("gradient", x) for x in GRADIENT_LAYOUTS]
)
def test_layouts(path: torch.device, which: str, layout: str) -> None:
    """Forward and backward on every memory layout of all inputs, and of the incoming gradient."""
    case = Case(2, 35, 35, 2, 2, 24)
    leaves = [t.detach() for t in inputs(path, torch.float32, case)]
    grad = torch.randn(case.B, case.Tq, case.H, case.D, device=path)
    if which == "inputs":
        leaves = [in_layout(t, layout) for t in leaves]
    else:
        grad = in_layout(grad, layout)
    leaves = [t.requires_grad_() for t in leaves]
    out = ops.attention(*leaves)
    ours = torch.autograd.grad(out, leaves, grad)
    result = torch_attention(*leaves, True, None)[0]
    theirs = torch.autograd.grad(result, leaves, grad)
    exact = wide(*leaves)
    true_result = torch_attention(*exact, True, None)[0]
    truth = torch.autograd.grad(true_result, exact, grad.double())
    assert_accurate(out, result, true_result)
    for letter, a, b, c in zip("qkv", ours, theirs, truth):
        assert_accurate(a, b, c, factor=3, what=f"gradient of {letter}")


def test_gradients_have_the_same_bits_each_time_and_alone(path: torch.device) -> None:
    case = Case(3, 70, 70, 4, 2, 32)
    leaves = [t.detach().requires_grad_() for t in inputs(path, torch.bfloat16, case)]
    grad = torch.randn(3, 70, 4, 32, device=path).bfloat16()
    first = torch.autograd.grad(ops.attention(*leaves), leaves, grad)
    again = torch.autograd.grad(ops.attention(*leaves), leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    if ops.path_of("attention_backward", path.type) != "PyTorch":  # PyTorch makes no such promise
        one = [t.detach()[1:2].requires_grad_() for t in leaves]
        alone = torch.autograd.grad(ops.attention(*one), one, grad[1:2])
        assert all(torch.equal(a[1:2], b) for a, b in zip(first, alone))


@pytest.mark.parametrize("layout", ["contiguous", "columns sliced", "transposed", "last axis strided"])
@pytest.mark.parametrize("options", [{}, {"causal": False, "scale": 0.3}, {"window": 9}, {"dropout_p": 0.3}], ids=str)
def test_one_projection(path: torch.device, options: dict[str, Any], layout: str) -> None:
    """out, logsumexp and gradient have the bits of the three parts passed apart; no operator assembles the gradient."""
    qkv = in_layout(torch.randn(2, 35, 3, 2, 24, device=path), layout).detach().requires_grad_()
    grads = torch.randn(2, 35, 2, 24, device=path), torch.randn(2, 2, 35, device=path)
    torch.manual_seed(2)
    apart = ops.attention(*qkv.unbind(2), return_lse=True, **options)
    torch.manual_seed(2)
    packed = ops.attention_qkvpacked(qkv, return_lse=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(apart, packed))
    for used in ((0,), (1,), (0, 1)):  # either result alone, and both
        results = [[pair[i] for i in used] for pair in (apart, packed)]
        (expected,) = torch.autograd.grad(results[0], qkv, [grads[i] for i in used], retain_graph=True)
        with Called() as called:
            (found,) = torch.autograd.grad(results[1], qkv, [grads[i] for i in used], retain_graph=True)
        assert torch.equal(found, expected)
        assert "gpt2_kernels.attention_qkvpacked_backward.default" in called.names
        assert not any("stack" in name or "cat" in name or "copy" in name for name in called.names), called.names


@FAR
def test_offsets_beyond_two_to_the_31_backward(path: torch.device, T: int, stride: int) -> None:
    """In turn, every pointer of the backward pass has rows so far apart that an int32 offset would wrap."""
    if path.type == "cuda" and torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    D = 16
    storage = torch.empty(T * stride + D, dtype=torch.float16, device=path)
    far = storage.as_strided((1, T, 1, D), (0, stride, D, 1))
    q, k, v, grad = (torch.randn(1, T, 1, D, device=path).to(torch.float16) for _ in range(4))
    out, lse = torch.ops.gpt2_kernels.attention(q, k, v, None, None, T, T, True, 0.25, 0, 0.0, None)

    def backward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out = tensors
        return torch.ops.gpt2_kernels.attention_backward(
            grad, None, q, k, v, out, lse, None, None, T, T, True, 0.25, 0, 0.0, None
        )

    near = [grad, q, k, v, out]
    expected = backward(*near)
    for i in range(5):
        far.copy_(near[i])
        got = backward(*near[:i], far, *near[i + 1 :])
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
