"""scaled_dot_product_attention against torch's function of that name, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerance import DTYPES, assert_accurate, wide
from torch import Tensor

import gpt2_kernels as ops
from gpt2_kernels import sdpa

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

# name -> shapes of query, key and value, options
CASES: dict[str, tuple[Shapes, dict]] = {
    "gpt2": (((2, 3, 40, 64),) * 3, {"is_causal": True}),
    "full, other lengths": (((2, 3, 20, 16), (2, 3, 70, 16), (2, 3, 70, 16)), {}),
    "causal, fewer queries: aligned at the top left": (
        ((1, 2, 20, 16), (1, 2, 70, 16), (1, 2, 70, 16)),
        {"is_causal": True},
    ),
    "causal, more queries": (((1, 2, 70, 16), (1, 2, 20, 16), (1, 2, 20, 16)), {"is_causal": True}),
    "one query, many keys": (((1, 2, 1, 16), (1, 2, 70, 16), (1, 2, 70, 16)), {"is_causal": True}),
    "one key, many queries": (((1, 2, 30, 16), (1, 2, 1, 16), (1, 2, 1, 16)), {"is_causal": True}),
    "(B, T, D)": (((3, 20, 16), (3, 25, 16), (3, 25, 16)), {"is_causal": True}),
    "(T, D)": (((20, 16), (25, 16), (25, 16)), {}),
    "two batch axes": (((2, 3, 2, 10, 8),) * 3, {"is_causal": True}),
    "no batch": (((0, 2, 5, 8),) * 3, {"is_causal": True}),
    "no queries": (((2, 2, 0, 8), (2, 2, 5, 8), (2, 2, 5, 8)), {"is_causal": True}),
    "one head for all": (((2, 4, 12, 8), (2, 1, 12, 8), (2, 1, 12, 8)), {"is_causal": True}),
    "one key head, many values": (((2, 4, 12, 8), (2, 1, 12, 8), (2, 4, 12, 8)), {}),
    "one query head": (((2, 1, 12, 8), (2, 4, 12, 8), (2, 4, 12, 8)), {}),
    "batch axes broadcast": (((3, 1, 2, 12, 8), (5, 2, 12, 8), (1, 1, 12, 8)), {}),
    "a query without heads": (((12, 8), (2, 3, 12, 8), (3, 12, 8)), {"is_causal": True}),
    "grouped heads": (((2, 6, 12, 8), (2, 2, 12, 8), (2, 2, 12, 8)), {"is_causal": True, "enable_gqa": True}),
    "grouped, no batch axis": (((6, 12, 8), (2, 12, 8), (2, 12, 8)), {"enable_gqa": True}),
    "grouped, key and value apart": (((1, 12, 9, 8), (1, 2, 9, 8), (1, 3, 9, 8)), {"enable_gqa": True}),
    "narrow value": (((2, 3, 12, 16), (2, 3, 12, 16), (2, 3, 12, 5)), {"is_causal": True}),
    "wide value": (((2, 3, 12, 16), (2, 3, 12, 16), (2, 3, 12, 40)), {}),
    "scale": (((2, 3, 12, 16),) * 3, {"scale": 1.5}),
}


def inputs(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(path: torch.device, name: str) -> None:
    shapes, options = CASES[name]
    leaves = [t.requires_grad_() for t in inputs(path, torch.float32, shapes)]
    exact = wide(*leaves)
    out = ops.scaled_dot_product_attention(*leaves, **options)
    theirs, truth = (F.scaled_dot_product_attention(*tensors, **options) for tensors in (leaves, exact))
    assert_accurate(out, theirs, truth)
    one = torch.randn(out.shape[-1:], device=path)
    grad = one.expand(out.shape)  # stride 0, as the gradient of a sum has
    q, k, v = leaves
    # With one key its probability is always 1: the scores' gradient is 0, which some PyTorch backends give exactly.
    score = options.get("scale", q.shape[-1] ** -0.5) * largest(v @ one)
    for letter, terms, a, b, c in zip(
        "qkv",
        (score * largest(k), score * largest(q), 0.0),
        torch.autograd.grad(out, leaves, grad),
        torch.autograd.grad(theirs, leaves, grad),
        torch.autograd.grad(truth, exact, grad.double()),
    ):
        assert_accurate(a, b, c, factor=3, terms=terms, what=f"gradient of {letter}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "causal, more queries", "grouped heads"])
def test_dtypes(path: torch.device, name: str, dtype: torch.dtype) -> None:
    shapes, options = CASES[name]
    q, k, v = inputs(path, dtype, shapes)
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    theirs = F.scaled_dot_product_attention(q, k, v, **options)
    assert_accurate(ops.scaled_dot_product_attention(q, k, v, **options), theirs, truth)


def test_positional_arguments(path: torch.device) -> None:
    """attn_mask, dropout_p and is_causal have the positions that torch gives them."""
    q, k, v = inputs(path, torch.float32, CASES["gpt2"][0])
    ours = ops.scaled_dot_product_attention(q, k, v, None, 0.0, True)
    assert torch.equal(ours, ops.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True))
    assert not torch.equal(ours, ops.scaled_dot_product_attention(q, k, v, None, 0.0, False))


@pytest.mark.parametrize(
    "name", ["gpt2", "one head for all", "grouped heads", "causal, fewer queries: aligned at the top left"]
)
def test_nothing_is_copied(path: torch.device, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, options = CASES[name]
    q, k, v = (t.mT.contiguous().mT[..., ::2] for t in inputs(path, torch.float32, shapes))  # an unfavourable layout
    calls = []

    def spy(*tensors: Tensor, **options: object) -> Tensor:
        calls.append((tensors, ops.attention(*tensors, **options)))
        return calls[-1][1]

    monkeypatch.setattr(sdpa, "attention", spy)
    out = ops.scaled_dot_product_attention(q, k, v, **options)
    [(tensors, result)] = calls
    for given, passed in zip((q, k, v), tensors):
        assert passed.data_ptr() == given.data_ptr()
        expected = given.transpose(1, 2)
        assert all(a == b for a, b, n in zip(passed.stride(), expected.stride(), passed.shape) if n > 1)
    assert out.data_ptr() == result.data_ptr() and out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "last_axis_strided", "sliced"])
def test_layouts(path: torch.device, layout: str) -> None:
    base = torch.randn(3, 2, 3, 20, 24, device=path)
    leaves = {
        "transposed": lambda: base.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda: base[:, :1, :1].expand(3, 2, 3, 20, 24),
        "last_axis_strided": lambda: base.transpose(3, 4).contiguous().transpose(3, 4),
        "sliced": lambda: base[:, :, 1:, 3:15, 8:24],
    }[layout]()
    q, k, v = (t.detach().requires_grad_() for t in leaves)
    exact = wide(q, k, v)
    out = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    truth = F.scaled_dot_product_attention(*exact, is_causal=True)
    assert_accurate(out, theirs, truth)
    grad = torch.randn(out.shape[:2] + out.shape[:1:-1], device=path).transpose(2, 3)
    ours, other = (torch.autograd.grad(o, (q, k, v), grad) for o in (out, theirs))
    for letter, a, b, c in zip("qkv", ours, other, torch.autograd.grad(truth, exact, grad.double())):
        assert_accurate(a, b, c, factor=3, what=f"gradient of {letter}")


@pytest.mark.parametrize("shape", [(2, 3, 12, 16), (2, 3, 4, 16)], ids=["square", "more queries than keys"])
def test_dropout(path: torch.device, shape: tuple[int, ...]) -> None:
    """It drops whenever asked to, with torch's generator on the query's device."""
    q, k, v = inputs(path, torch.float32, ((2, 3, 12, 16), shape, shape))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(ops.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=True))
    assert torch.equal(results[0], results[1])
    plain = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert not torch.equal(results[0], results[2]) and not torch.equal(results[0], plain)
    first = results[0][:, :, 0] / plain[:, :, 0]  # the first query sees one key: it is kept, and weighs more, or is not
    kept = first.abs() > 0.5
    torch.testing.assert_close(first, kept / 0.6, rtol=1e-5, atol=1e-6)


def test_compile(path: torch.device) -> None:
    leaves = [t.requires_grad_() for t in inputs(path, torch.float32, ((2, 3, 9, 16), (1, 1, 6, 16), (1, 1, 6, 8)))]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.scaled_dot_product_attention(q.sin(), k, v, is_causal=True).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("heads", [(6, 2, 2), (12, 2, 3), (12, 4, 2), (2, 2, 2)])
def test_compiles_whole_with_sizes_that_change(production: torch.device, heads: tuple[int, int, int]) -> None:
    """The least common multiple of the heads used to come from math.lcm, which does not take symbolic sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(ops.scaled_dot_product_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 12):
        q, k, v = (torch.randn(2, H, length, 16, device=production) for H in heads)
        expected = ops.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(compiled(q, k, v, is_causal=True, enable_gqa=True), expected)


def test_equal_shapes_cost_the_host_neither_a_broadcast_nor_a_copy(production: torch.device) -> None:
    """Each call of PyTorch costs the host 1 to 25 us, next to a kernel of about 10 us at decode sizes."""
    q, k, v = inputs(production, torch.float32, ((2, 3, 8, 16),) * 3)
    counted: list[str] = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            counted.append(func.__name__)
            return func(*args, **kwargs or {})

    with torch.no_grad(), Counting(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "attention", lambda q, *_, **__: q)
        ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert [name for name in counted if name not in ("__get__", "dim")] == ["transpose"] * 4


def test_bad_input(path: torch.device) -> None:
    q, k, v = inputs(path, torch.float32, ((2, 4, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16)))
    attend = ops.scaled_dot_product_attention
    mask = torch.zeros(5, 7, device=path)
    for call, message in [
        (lambda: attend(q, k, v, mask), r"attn_mask must be None \(.*attention_varlen.*\), got a mask \(5, 7\)"),
        (lambda: attend(q, k, v, mask > 0, is_causal=True), r"attn_mask must be None"),
        (lambda: attend(q[0, 0, 0], k, v), r"query must be \(..., T, D\), got \(16,\)"),
        (lambda: attend(q, k[..., :8], v), r"key must be \(..., S, D\) = \(..., 7, 16\), .* got \(2, 4, 7, 8\)"),
        (lambda: attend(q, k[:, :, :6], v), r"key must be \(..., S, D\) = \(..., 7, 16\), .* got \(2, 4, 6, 16\)"),
        (lambda: attend(q, k, v.half()), r"value must have the dtype of query \(torch.float32\), got torch.float16"),
        (lambda: attend(q.double(), k.double(), v.double()), r"dtype of query must be float32, float16 or bfloat16"),
        (lambda: attend(q, k[:, :2], v[:, :2]), r"axes before the last two must broadcast, got \(4,\), \(2,\), \(2,\)"),
        (lambda: attend(q[:, :1], k, v[:, :3]), r"axes before the last two must broadcast, got \(1,\), \(4,\), \(3,\)"),
        (lambda: attend(torch.cat([q, q[:1]]), k, v), r"axes before the last two must broadcast, got \(3,\), \(2,\)"),
        (
            lambda: attend(q, k[:, :3], v[:, :3], enable_gqa=True),
            r"heads of query must be a multiple .* got \(4, 3, 3\)",
        ),
        (
            lambda: attend(q, k[:, :0], v[:, :0], enable_gqa=True),
            r"heads of query must be a multiple .* got \(4, 0, 0\)",
        ),
        (
            lambda: attend(q[0, 0], k, v, enable_gqa=True),
            r"with enable_gqa query, key and value must be \(..., H, T, D\)",
        ),
        (lambda: attend(q, k, v[..., :0]), r"last axis of value must lie in 1..256, got 0"),
        (lambda: attend(q, k, v, dropout_p=1.0), r"dropout_p must lie in \[0, 1\), got 1.0"),
        (lambda: attend(q, k, v, scale=-1.0), r"scale must be positive and finite, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=f"scaled_dot_product_attention: {message}"):
            call()
    wide_heads = torch.empty(1, 2, 1, 257, device=path)
    with pytest.raises(ValueError, match="last axis of query must lie in 1..256, got 257"):
        attend(wide_heads, wide_heads, wide_heads)
    with pytest.raises(TypeError):
        attend(q, k, v, window=3)
