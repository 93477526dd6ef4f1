"""attention_map against float64 PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tolerance import DTYPES, assert_accurate
from torch import Tensor
from torch.library import opcheck

import gpt2_kernels as ops
from gpt2_kernels import attentionmap


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
    "gpt2 head, several tiles each way": Case(1, 140, 140, 2, 2, 64),
    "one token": Case(2, 1, 1, 2, 2, 64),
    "one past a tile each way": Case(1, 65, 65, 1, 1, 64),
    "one short of a tile each way": Case(1, 63, 63, 1, 1, 24),
    "grouped heads": Case(2, 40, 40, 6, 2, 32),
    "one new query over a past": Case(1, 1, 150, 2, 1, 64),
    "first rows see no key": Case(1, 80, 20, 1, 1, 16),
    "full, keys longer": Case(1, 30, 70, 2, 1, 80, causal=False),
    "full, queries longer": Case(1, 70, 30, 1, 1, 16, causal=False),
    "window": Case(1, 150, 150, 1, 1, 64, window=37),
    "window of one: itself": Case(1, 70, 70, 1, 1, 16, window=1),
    "window over a past": Case(1, 30, 200, 1, 1, 16, window=64),
    "window without causal": Case(1, 90, 90, 1, 1, 16, causal=False, window=20),
    "head dimension 1": Case(1, 20, 20, 1, 1, 1),
    "head dimension 256": Case(1, 40, 40, 1, 1, 256),
    "no keys": Case(1, 3, 0, 1, 1, 16),
    "no queries": Case(1, 0, 3, 1, 1, 16),
}


def inputs(device: torch.device, dtype: torch.dtype, case: Case) -> tuple[Tensor, Tensor]:
    """q and k, parts of one fused projection where the lengths allow it."""
    B, Tq, Tk, H, Hkv, D = case[:6]
    if Tq == Tk and H == Hkv:
        q, k, _ = torch.randn(B, Tq, 3, H, D, device=device).to(dtype).unbind(2)
    else:
        q = torch.randn(B, Tq, H, D, device=device).to(dtype)
        k = torch.randn(B, Tk, 2, Hkv, D, device=device).to(dtype)[:, :, 1]
    return q * 2, k  # sharper than N(0, 1)


def seen(case: Case, device: torch.device) -> Tensor:
    """The mask of visible keys, (Tq, Tk) bool, written out."""
    keep = torch.zeros(case.Tq, case.Tk, dtype=torch.bool)
    for i in range(case.Tq):
        for j in range(case.Tk):
            at = i + case.Tk - case.Tq
            keep[i, j] = not (case.causal and j > at) and (case.window is None or j > at - case.window)
    return keep.to(device)


def torch_exp(q: Tensor, k: Tensor, lse: Tensor, case: Case, scale: float | None = None) -> Tensor:
    """The map from a float32 logsumexp, whose rounding costs any implementation half a unit of |lse|."""
    k = k.repeat_interleave(case.H // case.Hkv, dim=2).float()
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k) * (case.D**-0.5 if scale is None else scale)
    return torch.exp(scores - lse.float()[..., None]).masked_fill(~seen(case, q.device), 0.0)


def torch_map(q: Tensor, k: Tensor, case: Case, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """softmax with a mask, and the logsumexp: independent of the package's own reference."""
    k = k.repeat_interleave(case.H // case.Hkv, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (case.D**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen(case, q.device), -torch.inf)
    return (torch.softmax(scores, -1).nan_to_num(0.0) if case.Tk else scores), torch.logsumexp(scores, -1)


# float16 shares bfloat16's code: one case is enough
@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n in CASES for d in DTYPES if d != torch.float16 or n == "grouped heads"], ids=str
)
def test_whole_rows(path: torch.device, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    q, k = inputs(path, dtype, case)
    truth, lse = torch_map(q.double(), k.double(), case)
    theirs = torch_exp(q, k, lse, case)
    p = ops.attention_map(q, k, lse.float(), causal=case.causal, window=case.window)
    assert p.shape == (case.B, case.H, case.Tq, case.Tk) and p.is_contiguous()
    # 256 products added in another order than PyTorch's: whose largest error is larger is a matter of chance
    assert_accurate(p, theirs, truth, factor=5.0 if case.D == 256 else 2.0)
    assert not p[..., ~seen(case, path)].any()  # what is hidden is 0, not small


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_what_attention_used(path: torch.device, dtype: torch.dtype) -> None:
    case = Case(2, 70, 90, 4, 2, 64, window=60)
    q, k = inputs(path, dtype, case)
    v = torch.randn(2, 90, 2, 64, device=path).to(dtype)
    out, lse = ops.attention(q, k, v, window=60, return_lse=True)
    p = ops.attention_map(q, k, lse, window=60)
    # PyTorch's CPU attention uses a fast exponential for bfloat16, but has no window: ours computed this lse
    torch.testing.assert_close(p.sum(-1), torch.ones_like(lse), rtol=0, atol=1e-5)
    expected = torch.einsum("bhij,bjhd->bihd", p.double(), v.double().repeat_interleave(2, dim=2))
    # float32: the logsumexp is off by 2e-6, and so is the whole row; else p and out are rounded, and out is below 4
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


def test_under_autocast_too(path: torch.device) -> None:
    case = Case(1, 20, 20, 2, 2, 16)
    q, k = inputs(path, torch.float32, case)
    with torch.autocast(path.type, torch.bfloat16):
        _, lse = ops.attention(q, k, k, return_lse=True)
        p = ops.attention_map(q, k, lse)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, ops.attention_map(q.bfloat16(), k.bfloat16(), lse))
    torch.testing.assert_close(p.sum(-1), torch.ones_like(lse), rtol=0, atol=1e-4)


def test_scale(path: torch.device) -> None:
    case = Case(1, 30, 30, 1, 1, 16)
    q, k = inputs(path, torch.float32, case)
    for scale in (0.01, 1.0, 7.0):
        truth, lse = torch_map(q.double(), k.double(), case, scale)
        theirs = torch_exp(q, k, lse, case, scale)
        assert_accurate(ops.attention_map(q, k, lse.float(), scale=scale), theirs, truth)


def test_a_row_with_logsumexp_minus_infinity_is_zero(path: torch.device) -> None:
    """Even where the mask leaves it keys: the forward pass's lse decides."""
    q, k = inputs(path, torch.float32, Case(1, 5, 5, 1, 1, 16))
    lse = torch.full((1, 1, 5), -torch.inf, device=path)
    lse[0, 0, 3] = 1.0
    p = ops.attention_map(q, k, lse, causal=False)
    assert not p[0, 0, [0, 1, 2, 4]].any() and (p[0, 0, 3] > 0).all()


CHOICES = {
    "an int": (1, -1),
    "ints, in any order, twice": ([2, 0, 2], (5, 69, -70)),
    "a range": (range(3), range(64, 70)),
    "none of them": ([], [3]),
    "tensors, negative too": (torch.tensor([-1, 0]), torch.tensor([3, -2], dtype=torch.int32)),
    "strided tensors": (torch.tensor([2, 9, 1, 9])[::2], torch.arange(70).flip(0)[::23]),
    "every row": (None, torch.arange(70)),
}


@pytest.mark.parametrize("name", CHOICES)
def test_chosen_heads_and_rows(path: torch.device, name: str) -> None:
    """A query row has the same bits alone as among all rows."""
    case = Case(2, 70, 75, 3, 1, 32)
    q, k = inputs(path, torch.float32, case)
    _, lse = torch_map(q, k, case)
    heads, rows = (c.to(path) if isinstance(c, Tensor) else c for c in CHOICES[name])
    whole = ops.attention_map(q, k, lse)
    expected = whole
    for axis, choice, size in ((1, heads, 3), (2, rows, 70)):
        if choice is not None:
            numbers = [choice] if isinstance(choice, int) else [int(c) for c in choice]
            positive = torch.tensor([n % size for n in numbers], dtype=torch.int64, device=path)
            expected = expected.index_select(axis, positive)
    ours = ops.attention_map(q, k, lse, heads=heads, rows=rows)
    if ops.path_of("attention_map", path.type) == "PyTorch":
        torch.testing.assert_close(ours, expected)  # its matrix products add in a different order for each shape
    else:
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "last_axis_strided", "sliced"])
def test_layouts(path: torch.device, layout: str) -> None:
    base = torch.randn(2, 2, 40, 3, 32, device=path)  # two tensors (B, T, H, D)
    q, k = {
        "transposed": lambda: base.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda: base[:, :1, :, :1].expand(2, 2, 40, 3, 32),
        "last_axis_strided": lambda: base.transpose(3, 4).contiguous().transpose(3, 4),
        "sliced": lambda: base[:, :, 3:35, 1:, 8:24],
    }[layout]()
    case = Case(2, q.shape[1], q.shape[1], q.shape[2], q.shape[2], q.shape[3])
    truth, lse = torch_map(q.double(), k.double(), case)
    theirs = torch_exp(q, k, lse, case)
    lse = lse.float().transpose(1, 2).contiguous().transpose(1, 2)  # the layout of lse is free too
    if layout == "expanded":
        lse = lse[:1, :1].expand(lse.shape)
    assert_accurate(ops.attention_map(q, k, lse), theirs, truth)


@pytest.mark.parametrize(("T", "stride"), [(6, 2**29), (70, 2**25)], ids=["within a tile", "from tile to tile"])
@pytest.mark.parametrize("far", ["queries", "keys"])
def test_offsets_beyond_two_to_the_31(path: torch.device, T: int, stride: int, far: str) -> None:
    """Strides so large that an int32 offset would wrap; the memory between is never touched."""
    if path.type == "cuda" and torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    case = Case(1, T, T, 1, 1, 16)
    near, k = inputs(path, torch.float16, case)
    storage = torch.empty(T * stride + 16, dtype=torch.float16, device=path)
    wide = storage.as_strided((1, T, 1, 16), (0, stride, 16, 1))
    wide.copy_(k if far == "keys" else near)
    assert (T - 1) * stride > 2**31
    truth, lse = torch_map(near.double(), k.double(), case)
    theirs = torch_exp(near, k, lse, case)
    q, k = (near, wide) if far == "keys" else (wide, k)
    assert_accurate(ops.attention_map(q, k, lse.float()), theirs, truth)


def test_same_bits_twice_and_alone(path: torch.device) -> None:
    if ops.path_of("attention_map", path.type) == "PyTorch":
        pytest.skip("PyTorch's matrix products add in an order of their own for each shape")
    case = Case(3, 70, 70, 2, 2, 32)
    q, k = inputs(path, torch.float32, case)
    _, lse = torch_map(q, k, case)
    together = ops.attention_map(q, k, lse)
    assert torch.equal(ops.attention_map(q, k, lse), together)
    for b in range(3):
        assert torch.equal(ops.attention_map(q[b : b + 1], k[b : b + 1], lse[b : b + 1])[0], together[b])


# --- the likeliest keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gpt2 head, several tiles each way", "grouped heads", "window", "full, keys longer"])
def test_top(path: torch.device, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    q, k = inputs(path, dtype, case)
    _, lse = torch_map(q.float(), k.float(), case)
    options = {"causal": case.causal, "window": case.window, "heads": [-1, 0], "rows": [7, -1, 0, 39 % case.Tq]}
    whole = ops.attention_map(q, k, lse, **options)
    expected, order = whole.sort(dim=-1, descending=True, stable=True)
    for m in (1, 5, case.Tk):
        keys, shares = ops.attention_map(q, k, lse, top_m=m, **options)
        assert keys.dtype == torch.int64 and shares.dtype == torch.float32
        assert torch.equal(shares, expected[..., :m])
        assert torch.equal(keys, order[..., :m])


def test_top_takes_the_lower_key_first_among_equals(path: torch.device) -> None:
    case = Case(1, 80, 80, 1, 1, 16)
    q, k = inputs(path, torch.float32, case)
    _, lse = torch_map(q * 0, k, case)
    keys, shares = ops.attention_map(q * 0, k, lse, top_m=4)
    assert torch.equal(keys, torch.arange(4, device=path).expand(1, 1, 80, 4))  # row 1 sees two keys: 2 and 3 have 0
    visible = torch.arange(1, 81, device=path)[:, None]
    expected = torch.where(torch.arange(4, device=path) < visible, 1.0 / visible, 0.0)
    torch.testing.assert_close(shares[0, 0], expected, rtol=1e-5, atol=0)


def test_top_holds_no_more_than_its_buffer(path: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 9, 12, 3, 3, 16)
    q, k = inputs(path, torch.float32, case)
    _, lse = torch_map(q, k, case)
    keys, shares = ops.attention_map(q, k, lse, top_m=3)
    made = []
    empty, reference_map = torch.empty, attentionmap.reference.attention_map

    def spy(*args: object, **options: object) -> Tensor:
        result = empty(*args, **options)
        made.append(result.shape)
        return result

    def reference_spy(*args: object, **options: object) -> Tensor:
        result = reference_map(*args, **options)
        made.append(result.shape)
        return result

    monkeypatch.setattr(torch, "empty", spy)
    monkeypatch.setattr(attentionmap.reference, "attention_map", reference_spy)
    for buffer, launches in [(1, 54), (12, 54), (60, 12), (9 * 12 * 2, 4), (9 * 12 * 3, 2), (10**6, 1)]:
        monkeypatch.setattr(attentionmap, "BUFFER", buffer)
        made.clear()
        again = ops.attention_map(q, k, lse, top_m=3)
        probabilities = [shape.numel() for shape in made if shape[-1:] == (12,)]
        assert len(probabilities) == launches
        assert max(probabilities) <= max(buffer, 12) and sum(probabilities) == 2 * 3 * 9 * 12
        assert torch.equal(again[0], keys)
        torch.testing.assert_close(again[1], shares, rtol=1e-5, atol=0)


def test_top_of_nothing(path: torch.device) -> None:
    q, k = inputs(path, torch.float32, Case(2, 6, 6, 2, 2, 16))
    lse = torch.zeros(2, 2, 6, device=path)
    keys, shares = ops.attention_map(q, k, lse, rows=[], top_m=2)
    assert keys.shape == shares.shape == (2, 2, 0, 2)


# --- contracts ------------------------------------------------------------------------------------------------------


def test_reference(path: torch.device) -> None:
    """The reference takes the same arguments and computes the same."""
    case = Case(2, 20, 24, 4, 2, 16, window=9)
    q, k = inputs(path, torch.float32, case)
    truth, lse = torch_map(q.double(), k.double(), case)
    options = {"heads": [3, 0], "rows": [19, 2, -3], "window": 9}
    p = ops.reference.attention_map(q.double(), k.double(), lse, **options)
    torch.testing.assert_close(p, truth[:, [3, 0]][:, :, [19, 2, 17]])
    keys, shares = ops.reference.attention_map(q, k, lse.float(), top_m=3, **options)
    ours = ops.attention_map(q, k, lse.float(), top_m=3, **options)
    assert torch.equal(keys, ours[0])
    torch.testing.assert_close(shares, ours[1])


def test_opcheck(path: torch.device) -> None:
    case = Case(1, 20, 24, 2, 1, 16)
    q, k = inputs(path, torch.float32, case)
    _, lse = torch_map(q, k, case)
    rows = torch.tensor([3, -1], device=path)
    opcheck(torch.ops.gpt2_kernels.attention_map.default, (q, k, lse, None, rows, True, 0.25, 0))
    opcheck(torch.ops.gpt2_kernels.attention_map_top.default, (q, k, lse, rows[:0], None, 3, True, 0.25, 5))


def test_compile(path: torch.device) -> None:
    case = Case(1, 20, 20, 2, 2, 16)
    q, k = inputs(path, torch.float32, case)
    _, lse = torch_map(q, k, case)

    def function(q: Tensor, k: Tensor, lse: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, shares = ops.attention_map(q, k, lse, heads=-1, rows=rows, top_m=4)
        return ops.attention_map(q, k, lse, heads=[1, 0]) * 2, keys, shares

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    rows = torch.tensor([5, -1], device=path)
    for ours, expected in zip(compiled(q, k, lse, rows), function(q, k, lse, rows)):
        torch.testing.assert_close(ours, expected)


def test_there_is_no_gradient(path: torch.device) -> None:
    q, k = inputs(path, torch.float32, Case(1, 8, 8, 1, 1, 16))
    lse = torch.zeros(1, 1, 8, device=path)
    with pytest.raises(ValueError, match="attention_map: k must not require a gradient"):
        ops.attention_map(q, k.requires_grad_(), lse)
    with torch.no_grad():
        ops.attention_map(q, k, lse)


def test_bad_input(path: torch.device) -> None:
    q, k = inputs(path, torch.float32, Case(1, 8, 9, 4, 2, 16))
    lse = torch.zeros(1, 4, 8, device=path)
    number = torch.tensor
    for call, message in [
        (lambda: ops.attention_map(q[0], k, lse), r"q must be \(B, T, H, D\), got \(8, 4, 16\)"),
        (lambda: ops.attention_map(q, k[..., :8], lse), r"k must be \(B, Tk, Hkv, D\) = \(1, 9, 2, 16\), got"),
        (lambda: ops.attention_map(q, k.half(), lse), r"k must have the dtype of q \(torch.float32\), got"),
        (lambda: ops.attention_map(q.double(), k.double(), lse), r"dtype of q must be float32, float16 or bfloat16"),
        (lambda: ops.attention_map(q[:, :, :3], k, lse[:, :3]), r"query heads H must be a multiple .* got 3 and 2"),
        (lambda: ops.attention_map(q, k, lse[:, :, :7]), r"lse must be \(B, H, Tq\) = \(1, 4, 8\), got \(1, 4, 7\)"),
        (lambda: ops.attention_map(q, k, lse.double()), r"lse must be torch.float32, got torch.float64"),
        (lambda: ops.attention_map(q, k, lse, window=0), r"window must be None or an int of at least 1, got 0"),
        (lambda: ops.attention_map(q, k, lse, scale=0.0), r"scale must be positive and finite, got 0.0"),
        (lambda: ops.attention_map(q, k, lse, top_m=0), r"top_m must lie in 1..9, got 0"),
        (lambda: ops.attention_map(q, k, lse, top_m=10), r"top_m must lie in 1..9, got 10"),
        (lambda: ops.attention_map(q, k, lse, heads=4), r"heads must lie in -4..3, got 4"),
        (lambda: ops.attention_map(q, k, lse, rows=[0, -9]), r"rows must lie in -8..7, got -9"),
        (
            lambda: ops.attention_map(q, k, lse, rows=[True]),
            r"rows must be an int, ints, or a tensor of them, got True",
        ),
        (lambda: ops.attention_map(q, k, lse, rows=slice(2)), r"rows must be an int, ints, or a tensor of them, got"),
        (lambda: ops.attention_map(q, k, lse, rows=number(3)), r"rows must be \(n,\) int32 or int64, got \(\)"),
        (lambda: ops.attention_map(q, k, lse, heads=number([1.0])), r"heads must be \(n,\) int32 or int64, got \(1,\)"),
    ]:
        with pytest.raises(ValueError, match=f"attention_map: {message}"):
            call()


@pytest.mark.parametrize("top_m", [None, 2])
def test_index_outside_the_tensor(path: torch.device, top_m: int | None) -> None:
    q, k = inputs(path, torch.float32, Case(1, 8, 8, 4, 4, 16))
    lse = torch.zeros(1, 4, 8, device=path)
    for name, index in [("heads", 4), ("rows", 8), ("rows", -9)]:
        chosen = {name: torch.tensor([0, index], device=path)}
        if path.type == "cpu":
            with pytest.raises(ValueError, match=rf"attention_map: {name} must lie in .*, got {index}"):
                ops.attention_map(q, k, lse, top_m=top_m, **chosen)
        elif top_m is None:
            for causal in (True, False):
                p = ops.attention_map(q, k, lse, causal=causal, **chosen)
                assert p.isnan().sum() == p.numel() / 2
