"""attention against float64 PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tolerance import DTYPES, assert_accurate, wide
from torch import Tensor
from torch.library import opcheck

import gpt2_kernels as ops
from gpt2_kernels import fused_attention


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
    "window of all 32 bits": Case(1, 70, 20, 1, 1, 16, window=2**31 - 1),
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
    """Written out with a mask, independent of the package's own reference; computes in the inputs' dtype."""
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


# float16 shares bfloat16's code: two cases are enough
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
    # -inf where there is no key; PyTorch's CPU kernel uses a fast exponential for bfloat16
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


FAR = pytest.mark.parametrize(("T", "stride"), [(6, 2**29), (70, 2**25)], ids=["in one block", "from block to block"])


@FAR
def test_offsets_beyond_two_to_the_31(path: torch.device, T: int, stride: int) -> None:
    """Strides so large that an int32 offset would wrap; the memory between is never touched."""
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


def test_batch_does_not_matter(path: torch.device) -> None:
    if ops.path_of("attention", path.type) == "PyTorch":
        pytest.skip("attention on a CPU is PyTorch's; the engine there takes paged_attention")
    q, k, v = inputs(path, torch.float32, Case(3, 70, 70, 2, 2, 32))
    together = ops.attention(q, k, v)
    for b in range(3):
        assert torch.equal(ops.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1])[0], together[b])


def call(leaves: list, case: Case, dropout_p: float = 0.0, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The autograd function itself, with a chosen seed, and in float64, which the public function refuses."""
    scale = case.D**-0.5
    options = (None, None, case.Tq, case.Tk, case.causal, scale, case.window or 0, dropout_p, seed)
    return fused_attention._Attention.apply(*leaves, *options)


# --- dropout --------------------------------------------------------------------------------------------------------


def dropped_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, p: float) -> Tensor:
    """Causal attention written out, with a given dropout mask (B, H, T, T)."""
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) * keep / (1 - p)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [Case(1, 140, 140, 2, 2, 64), Case(2, 37, 37, 4, 2, 16)], ids=str)
def test_dropout(path: torch.device, case: Case, dtype: torch.dtype) -> None:
    """Forward and backward use the reference's mask, whatever their tiles."""
    p, seed = 0.3, torch.tensor([2**40 + 7], device=path)
    leaves = [t.detach().requires_grad_() for t in inputs(path, dtype, case)]
    keep = ops.reference.dropout_keep(seed, case.B, case.H, case.Tq, case.Tk, p)
    grad = torch.randn(case.B, case.Tq, case.H, case.D, device=path).to(dtype)
    out, lse = call(leaves, case, p, seed)
    result, exact = dropped_attention(*leaves, keep, p), wide(*leaves)
    true_result = dropped_attention(*exact, keep, p)
    assert_accurate(out, result, true_result)
    undropped = ops.attention(*leaves, return_lse=True)[1]
    torch.testing.assert_close(lse, undropped, rtol=1e-4, atol=1e-4)  # of the scores, before dropout
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(result, leaves, grad)
    truth = torch.autograd.grad(true_result, exact, grad.double())
    for letter, a, b, c in zip("qkv", ours, theirs, truth):
        assert_accurate(a, b, c, factor=3, what=f"gradient of {letter}")


def test_dropout_follows_torchs_generator(path: torch.device) -> None:
    q, k, v = inputs(path, torch.float32, Case(1, 30, 30, 2, 2, 16))
    torch.manual_seed(1)
    first, second = ops.attention(q, k, v, dropout_p=0.5), ops.attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(first, ops.attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(first, second)
    assert torch.equal(ops.attention(q, k, v, dropout_p=0.0), ops.attention(q, k, v))
    assert ops.attention(q[:, :0], k, v, dropout_p=0.5).shape == (1, 0, 2, 16)


# --- packed sequences -----------------------------------------------------------------------------------------------

PACKED = {
    "self-attention": ((130, 1, 17), None),
    "over pasts": ((1, 20, 3), (70, 20, 66)),
    "empty sequences": ((5, 0, 0, 9), (5, 0, 4, 0)),
}


def offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("name", PACKED)
def test_packed(path: torch.device, name: str, window: int | None, dtype: torch.dtype) -> None:
    """Each packed sequence gives the same as alone; rows after the last one give 0."""
    q_lengths, k_lengths = PACKED[name]
    k_lengths = k_lengths or q_lengths
    H, Hkv, D, spare = 4, 2, 16, 3
    q = (2 * torch.randn(sum(q_lengths) + spare, H, D, device=path)).to(dtype)
    k, v = torch.randn(sum(k_lengths) + spare, 2, Hkv, D, device=path).to(dtype).unbind(1)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    cu_q, cu_k = offsets(q_lengths, path), offsets(k_lengths, path)
    grad = torch.randn_like(q)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        for a, b, c, d in zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]):
            skip = min(max(0, (b - a) - (d - c)), b - a)  # rows that see no key: PyTorch's softmax gives NaN there
            if b - a > skip:
                queries, keys, values = q[None, a + skip : b], k[None, c:d], v[None, c:d]
                out[a + skip : b] = torch_attention(queries, keys, values, True, window)[0][0]
        return out

    options = (cu_q, cu_k, max(q_lengths), max(k_lengths))
    out = ops.attention_varlen(*leaves, *options, window=window)
    result, exact = one_by_one(*leaves), wide(*leaves)
    true_result = one_by_one(*exact)
    assert_accurate(out, result, true_result)
    assert not out[sum(q_lengths) :].any()
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(result, leaves, grad)
    truth = torch.autograd.grad(true_result, exact, grad.double())
    for letter, a, b, c in zip("qkv", ours, theirs, truth):
        assert_accurate(a, b, c, factor=3, what=f"gradient of {letter}")


def test_packed_bits_are_those_of_the_sequence_alone(path: torch.device) -> None:
    if ops.path_of("attention", path.type) == "PyTorch":
        pytest.skip("attention on a CPU is PyTorch's")
    lengths = (40, 70, 3)
    q, k, v = torch.randn(sum(lengths), 3, 2, 32, device=path).unbind(1)
    cu = offsets(lengths, path)
    packed = ops.attention_varlen(q, k, v, cu, cu, 70, 70)
    for a, b in zip(cu.tolist(), cu.tolist()[1:]):
        assert torch.equal(packed[a:b], ops.attention(q[None, a:b], k[None, a:b], v[None, a:b])[0])


def test_packed_dropout_and_logsumexp(path: torch.device) -> None:
    """Sequence s drops what row s of a padded batch drops, forward and backward; rows after the last have lse -inf."""
    lengths, p, longest = (37, 1, 20), 0.3, 37
    leaves = [t.detach().requires_grad_() for t in torch.randn(3, sum(lengths) + 2, 2, 16, device=path)]
    cu, grad = offsets(lengths, path), torch.randn_like(leaves[0])
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device=path)
    keep = ops.reference.dropout_keep(seed, len(lengths), 2, longest, longest, p)

    def one_by_one(*tensors: Tensor) -> Tensor:
        parts = [
            dropped_attention(*(t[None, a:b] for t in tensors), keep[s : s + 1, :, : b - a, : b - a], p)[0]
            for s, (a, b) in enumerate(zip(cu.tolist(), cu.tolist()[1:]))
        ]
        return torch.cat([*parts, torch.zeros_like(tensors[0][:2])])

    torch.manual_seed(3)
    dropped = ops.attention_varlen(*leaves, cu, cu, longest, longest, dropout_p=p)
    expected, exact = one_by_one(*leaves), wide(*leaves)
    true_result = one_by_one(*exact)
    assert_accurate(dropped, expected, true_result)
    ours, theirs = torch.autograd.grad(dropped, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    for letter, a, b, c in zip("qkv", ours, theirs, torch.autograd.grad(true_result, exact, grad.double())):
        assert_accurate(a, b, c, factor=3, what=f"gradient of {letter}")

    out, lse = ops.attention_varlen(*leaves, cu, cu, longest, longest, return_lse=True)
    assert torch.equal(out, ops.attention_varlen(*leaves, cu, cu, longest, longest)) and lse.shape == (2, len(out))
    alone = ops.attention(*(t[None, 38:58] for t in leaves), return_lse=True)[1]
    torch.testing.assert_close(lse[:, 38:58], alone[0])
    assert (lse[:, sum(lengths) :] == -torch.inf).all()


def test_packed_without_sequences(path: torch.device) -> None:
    q, k, v = torch.randn(2, 3, 2, 16, device=path).unbind(1)
    cu = torch.zeros(1, dtype=torch.int32, device=path)
    assert not ops.attention_varlen(q, k, v, cu, cu, 0, 0).any()


def test_opcheck(path: torch.device) -> None:
    q, k, v = inputs(path, torch.float32, Case(1, 20, 24, 2, 1, 16))
    seed = torch.tensor([3], device=path)
    options = (None, None, 20, 24, True, 0.25, 0, 0.0, None)
    opcheck(torch.ops.gpt2_kernels.attention.default, (q, k, v, *options))
    opcheck(torch.ops.gpt2_kernels.attention.default, (q, k, v, *options[:-2], 0.1, seed))
    out, lse = torch.ops.gpt2_kernels.attention(q, k, v, *options)
    backward = torch.ops.gpt2_kernels.attention_backward.default
    opcheck(backward, (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *options))
    qkv = torch.randn(1, 20, 3, 2, 16, device=path)
    out, lse = torch.ops.gpt2_kernels.attention(*qkv.unbind(2), None, None, 20, 20, True, 0.25, 0, 0.0, None)
    options = (True, 0.25, 0, 0.0, None)
    packed = torch.ops.gpt2_kernels.attention_qkvpacked_backward.default
    opcheck(packed, (torch.randn_like(out), torch.randn_like(lse), qkv, out, lse, *options))
    cu = (
        torch.tensor([0, 4, 20], dtype=torch.int32, device=path),
        torch.tensor([0, 9, 24], dtype=torch.int32, device=path),
    )
    opcheck(torch.ops.gpt2_kernels.attention.default, (q, k, v, *cu, 16, 15, True, 0.25, 7, 0.0, None))


@pytest.mark.parametrize("variant", ["dense", "dropout", "packed", "one projection", "one tensor for all"])
def test_compile(path: torch.device, variant: str) -> None:
    leaves = [t.detach().requires_grad_() for t in inputs(path, torch.float32, Case(1, 20, 20, 2, 2, 16))]
    cu = offsets((4, 16), path)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if variant == "packed":
            out = ops.attention_varlen(q[0].sin(), k[0], v[0], cu, cu, 16, 16)
        elif variant == "one projection":
            out = ops.attention_qkvpacked(torch.stack((q.sin(), k, v), 2))
        elif variant == "one tensor for all":
            out = ops.attention(q, q, q) + k + v
        else:
            out = ops.attention(q.sin(), k, v, dropout_p=0.2 if variant == "dropout" else 0.0)
        return out.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    expected = torch.autograd.grad(function(*leaves), leaves)
    torch.manual_seed(4)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # the compiler adds in another order


def test_bad_input(path: torch.device) -> None:
    q, k, v = inputs(path, torch.float32, Case(1, 8, 8, 4, 2, 16))
    for call, message in [
        (lambda: ops.attention(q[0], k, v), r"attention: q must be \(B, T, H, D\), got \(8, 4, 16\)"),
        (lambda: ops.attention(q, k[..., :8], v), r"attention: k must be \(B, Tk, Hkv, D\) = \(1, 8, 2, 16\), got"),
        (lambda: ops.attention(q, k, v[:, :7]), r"attention: v must be \(B, Tk, Hkv, D\) = \(1, 8, 2, 16\), got"),
        (lambda: ops.attention(q[:, :, :3], k, v), r"attention: query heads H must be a multiple .* got 3 and 2"),
        (lambda: ops.attention(q, k.half(), v), r"attention: k must have the dtype of q"),
        (lambda: ops.attention(q, k, v, window=0), r"attention: window must be None or an int of at least 1, got 0"),
        (
            lambda: ops.attention(q, k, v, window=2.5),
            r"attention: window must be None or an int of at least 1, got 2.5",
        ),
        (lambda: ops.attention(q, k, v, scale=-1.0), r"attention: scale must be positive and finite, got -1.0"),
        (
            lambda: ops.attention_qkvpacked(q),
            r"attention_qkvpacked: qkv must be \(B, T, 3, H, D\), got \(1, 8, 4, 16\)",
        ),
        (
            lambda: ops.attention_qkvpacked(q.new_empty(1, 8, 2, 4, 16)),
            r"attention_qkvpacked: qkv must be \(B, T, 3, H, D\) = \(1, 8, 3, 4, 16\), got \(1, 8, 2, 4, 16\)",
        ),
        (lambda: ops.attention(q, k, v, dropout_p=1.0), r"attention: dropout_p must lie in \[0, 1\), got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    wide_heads = torch.empty(1, 2, 1, 257, device=path)
    with pytest.raises(ValueError, match=r"attention: head dimension D must lie in 1..256, got 257"):
        ops.attention(wide_heads, wide_heads, wide_heads)


def test_bad_packing(path: torch.device) -> None:
    q, k, v = (torch.randn(8, heads, 16, device=path) for heads in (4, 2, 2))
    cu, op = offsets((3, 5), path), "attention_varlen: "
    for call_, message in [
        (lambda: ops.attention_varlen(q[None], k, v, cu, cu, 5, 5), r"q must be \(N, H, D\), got"),
        (lambda: ops.attention_varlen(q, k, v[:, :1], cu, cu, 5, 5), r"v must be \(Nk, Hkv, D\) ="),
        (
            lambda: ops.attention_varlen(q, k, v, cu.long(), cu, 5, 5),
            r"cu_seqlens_q must be torch.int32",
        ),
        (
            lambda: ops.attention_varlen(q, k, v, cu, cu[:2], 5, 5),
            r"cu_seqlens_k must be \(S \+ 1,\)",
        ),
        (lambda: ops.attention_varlen(q, k, v, cu[:0], cu[:0], 5, 5), r"cu_seqlens_q must have at least one element"),
        (
            lambda: ops.attention_varlen(q, k, v, cu, cu, -1, 5),
            r"max_seqlen_q must be at least 0, got -1",
        ),
    ]:
        with pytest.raises(ValueError, match=op + message):
            call_()


def test_contents_of_the_packing_are_checked_on_a_cpu(path: torch.device) -> None:
    if ops.path_of("attention", path.type) != "PyTorch":
        pytest.skip("read where reading them costs nothing")
    q, k, v = (torch.randn(8, heads, 16) for heads in (4, 2, 2))
    cu, op = offsets((3, 5), path), "attention_varlen: "
    with pytest.raises(ValueError, match=op + r"cu_seqlens_q must rise from 0 to at most 8, got \[0, 9, 3\]"):
        ops.attention_varlen(q, k, v, torch.tensor([0, 9, 3], dtype=torch.int32), cu, 9, 5)
    with pytest.raises(ValueError, match=op + r"sequences of cu_seqlens_k must not be longer than 4, got 5"):
        ops.attention_varlen(q, k, v, cu, cu, 5, 4)
