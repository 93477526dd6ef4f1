"""attention against float64 PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tolerance import DTYPES, assert_accurate, wide
from torch import Tensor
from torch.library import opcheck

import gpt2_kernels as ops


class Case(NamedTuple):
    B: int
    Tq: int
    Tk: int
    H: int
    Hkv: int
    D: int
    causal: bool = True
    window: int | None = None


CASES = {
    "gpt2 head, two row tiles": Case(1, 140, 140, 2, 2, 64),
    "one token": Case(2, 1, 1, 2, 2, 64),
    "one short of a tile": Case(1, 127, 127, 1, 1, 64),
    "one past a tile": Case(1, 129, 129, 1, 1, 64),
    "grouped heads": Case(2, 40, 40, 6, 2, 32),
    "one new query over a past": Case(1, 1, 150, 2, 1, 64),
    "queries at the end of a past": Case(1, 20, 150, 2, 2, 24),
    "first rows see no key": Case(1, 150, 20, 1, 1, 16),
    "full": Case(1, 50, 70, 2, 1, 80, causal=False),
    "full, queries longer": Case(1, 140, 33, 1, 1, 16, causal=False),
    "window": Case(1, 150, 150, 1, 1, 64, window=37),
    "window of one: itself": Case(1, 70, 70, 1, 1, 16, window=1),
    "window wider than the text": Case(1, 70, 70, 1, 1, 16, window=1000),
    "window over a past": Case(1, 30, 200, 1, 1, 16, window=64),
    "window without causal": Case(1, 90, 90, 1, 1, 16, causal=False, window=20),
    "head dimension 1": Case(1, 20, 20, 1, 1, 1),
    "head dimension 256": Case(1, 40, 40, 1, 1, 256),
    "no keys": Case(1, 3, 0, 1, 1, 16),
    "no queries": Case(1, 0, 3, 1, 1, 16),
}


def inputs(device: torch.device, dtype: torch.dtype, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one fused projection where the lengths allow it, as GPT-2 makes them."""
    B, Tq, Tk, H, Hkv, D = case[:6]
    if Tq == Tk and H == Hkv:
        q, k, v = torch.randn(B, Tq, 3, H, D, device=device).to(dtype).unbind(2)
    else:
        q = torch.randn(B, Tq, H, D, device=device).to(dtype)
        k, v = torch.randn(B, Tk, 2, Hkv, D, device=device).to(dtype).unbind(2)
    return q * 2, k, v  # sharper than N(0, 1): the maximum matters


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Written out with a mask, independent of the package's own reference; computes in the dtype it is given."""
    Tq, H, D = q.shape[1:]
    Tk, Hkv = k.shape[1:3]
    k, v = (t.repeat_interleave(H // Hkv, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (D**-0.5 if scale is None else scale)
    hidden = torch.zeros(Tq, Tk, dtype=torch.bool, device=q.device)
    for i in range(Tq):
        for j in range(Tk):
            at = i + Tk - Tq
            hidden[i, j] = (causal and j > at) or (window is not None and j <= at - window)
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0) if Tk else scores
    return torch.einsum("bhij,bjhd->bihd", weights, v), torch.logsumexp(scores, -1)


# float16 takes the code of bfloat16: two cases of it are enough
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in CASES for d in DTYPES if d != torch.float16 or n.startswith(("gpt2", "grouped"))],
    ids=str,
)
def test_forward(path: torch.device, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    q, k, v = inputs(path, dtype, case)
    out, lse = ops.attention(q, k, v, causal=case.causal, window=case.window, return_lse=True)
    truth, true_lse = torch_attention(q.double(), k.double(), v.double(), case.causal, case.window)
    theirs, _ = torch_attention(q, k, v, case.causal, case.window)
    assert_accurate(out, theirs, truth)
    assert lse.dtype == torch.float32 and lse.shape == (case.B, case.H, case.Tq)
    # -inf where there is no key; PyTorch's CPU kernel takes a quick exponential for bfloat16
    tolerance = 1e-4 if dtype == torch.bfloat16 and path.type == "cpu" else 1e-5
    torch.testing.assert_close(lse.double(), true_lse, rtol=tolerance, atol=tolerance)


def test_scale(path: torch.device) -> None:
    q, k, v = inputs(path, torch.float32, Case(1, 30, 30, 1, 1, 16))
    for scale in (0.01, 1.0, 7.0):
        truth, _ = torch_attention(q.double(), k.double(), v.double(), True, None, scale)
        theirs, _ = torch_attention(q, k, v, True, None, scale)
        assert_accurate(ops.attention(q, k, v, scale=scale), theirs, truth, what=f"scale {scale}")


def test_large_scores_do_not_overflow(path: torch.device) -> None:
    q, k, v = inputs(path, torch.float32, Case(1, 70, 70, 1, 1, 16))
    q = q * 1e3
    truth, _ = torch_attention(q.double(), k.double(), v.double(), True, None)
    theirs, _ = torch_attention(q, k, v, True, None)
    assert_accurate(ops.attention(q, k, v), theirs, truth)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "last_axis_strided", "sliced"])
def test_layouts(path: torch.device, layout: str) -> None:
    base = torch.randn(3, 2, 40, 3, 32, device=path)  # three of (B, T, H, D)
    q, k, v = {
        "transposed": lambda: base.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda: base[:, :1, :, :1].expand(3, 2, 40, 3, 32),
        "last_axis_strided": lambda: base.transpose(3, 4).contiguous().transpose(3, 4),
        "sliced": lambda: base[:, :, 3:35, 1:, 8:24],
    }[layout]()
    truth, _ = torch_attention(q.double(), k.double(), v.double(), True, None)
    theirs, _ = torch_attention(q, k, v, True, None)
    assert_accurate(ops.attention(q, k, v), theirs, truth)


@pytest.mark.parametrize(
    ("T", "stride"), [(6, 2**29), (70, 2**25)], ids=["in one block of keys", "from block to block"]
)
def test_offsets_beyond_two_to_the_31(path: torch.device, T: int, stride: int) -> None:
    """Strides so large that an offset in int32 would wrap; the memory between is never touched."""
    if path.type == "cuda" and torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    D = 16
    storage = torch.empty(T * stride + D, dtype=torch.float16, device=path)
    q = torch.randn(1, T, 1, D, device=path).to(torch.float16)
    k = storage.as_strided((1, T, 1, D), (0, stride, D, 1))
    k.copy_(torch.randn(1, T, 1, D))
    assert (T - 1) * stride > 2**31
    truth, _ = torch_attention(q.double(), k.double(), k.double(), True, None)
    theirs, _ = torch_attention(q, k.contiguous(), k.contiguous(), True, None)
    assert_accurate(ops.attention(q, k, k), theirs, truth)


@pytest.mark.parametrize(
    "name", ["gpt2 head, two row tiles", "grouped heads", "first rows see no key", "window", "full"]
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


def test_batch_does_not_matter(path: torch.device) -> None:
    if ops.path_of("attention", path.type) == "PyTorch":
        pytest.skip("attention on a CPU is PyTorch's; the engine there takes paged_attention")
    q, k, v = inputs(path, torch.float32, Case(3, 70, 70, 2, 2, 32))
    together = ops.attention(q, k, v)
    for b in range(3):
        assert torch.equal(ops.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1])[0], together[b])


def test_opcheck(path: torch.device) -> None:
    q, k, v = inputs(path, torch.float32, Case(1, 20, 24, 2, 1, 16))
    opcheck(torch.ops.gpt2_kernels.attention.default, (q, k, v, True, 0.25, 0))


def test_compile(path: torch.device) -> None:
    leaves = [t.detach().requires_grad_() for t in inputs(path, torch.float32, Case(1, 20, 20, 2, 2, 16))]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q.sin(), k, v).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
        torch.testing.assert_close(a, b)


def test_bad_input(path: torch.device) -> None:
    q, k, v = inputs(path, torch.float32, Case(1, 8, 8, 4, 2, 16))
    for call, message in [
        (lambda: ops.attention(q[0], k, v), r"attention: q must be \(B, T, H, D\), got \(8, 4, 16\)"),
        (lambda: ops.attention(q, k[..., :8], v), r"attention: k must be \(B, Tk, Hkv, D\) = \(1, 8, 2, 16\), got"),
        (lambda: ops.attention(q, k, v[:, :7]), r"attention: v must be \(B, Tk, Hkv, D\) = \(1, 8, 2, 16\), got"),
        (lambda: ops.attention(q[:, :, :3], k, v), r"attention: query heads H must be a multiple .* got 3 and 2"),
        (lambda: ops.attention(q, k.half(), v), r"attention: k must have the dtype of q"),
        (lambda: ops.attention(q, k, v, window=0), r"attention: window must be None or at least 1, got 0"),
        (lambda: ops.attention(q, k, v, scale=-1.0), r"attention: scale must be positive and finite, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    wide_heads = torch.empty(1, 2, 1, 257, device=path)
    with pytest.raises(ValueError, match=r"attention: head dimension D must lie in 1..256, got 257"):
        ops.attention(wide_heads, wide_heads, wide_heads)
