"""cross_entropy and linear_cross_entropy against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS, in_layout
from tolerance import DTYPES, assert_accurate, wide
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import gpt2_kernels as ops
from gpt2_kernels import crossentropy

WIDTHS = [
    1,  # the loss is 0
    5,
    1024,  # a whole block
    1025,  # the next tile, one element past a power of two
    4097,  # one past its block
]


def inputs(device: torch.device, dtype: torch.dtype, R: int, V: int) -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(R, V, device=device)).to(dtype)
    targets = torch.randint(V, (R,), device=device)
    targets[R // 2] = -100
    return logits, targets


def torch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """In the dtype of the logits, as a user of PyTorch would write it; its loss is rounded to that dtype."""
    return F.cross_entropy(logits, targets)


def check_loss(loss: Tensor, logits: Tensor, targets: Tensor) -> None:
    assert loss.dtype == torch.float32 and loss.shape == ()
    theirs = F.cross_entropy(logits.float(), targets)
    assert_accurate(loss, theirs, F.cross_entropy(logits.double(), targets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", WIDTHS)
def test_loss_and_gradient(path: torch.device, V: int, dtype: torch.dtype) -> None:
    logits, targets = inputs(path, dtype, 5, V)
    logits.requires_grad_()
    loss = ops.cross_entropy(logits, targets)
    check_loss(loss, logits, targets)
    grad = torch.tensor(0.7, device=path)  # not 1: a gradient that forgets the incoming one shows
    (ours,) = torch.autograd.grad(loss, logits, grad)
    result = torch_loss(logits, targets)
    (theirs,) = torch.autograd.grad(result, logits, grad.to(result.dtype))
    (exact,) = wide(logits)
    (truth,) = torch.autograd.grad(torch_loss(exact, targets), exact, grad.double())
    assert_accurate(ours, theirs, truth, factor=3, what="gradient")
    assert not ours[2].any()  # the row that counts for nothing


def test_vocabulary_of_gpt2(path: torch.device) -> None:
    logits, targets = inputs(path, torch.bfloat16, 3, 50257)
    check_loss(ops.cross_entropy(logits, targets), logits, targets)


def test_large_logits_do_not_overflow(path: torch.device) -> None:
    logits, targets = inputs(path, torch.float32, 4, 100)
    check_loss(ops.cross_entropy(1e4 * logits, targets), 1e4 * logits, targets)
    logits[0, :50] = -torch.inf  # forbidden tokens
    targets[0] = 70
    check_loss(ops.cross_entropy(logits, targets), logits, targets)
    half = 3e4 * logits.clamp(-2, 2).half()
    check_loss(ops.cross_entropy(half, targets), half, targets)


def test_no_row_counts(path: torch.device) -> None:
    """NaN and gradients of 0, as PyTorch's."""
    x, weight = torch.randn(3, 8, device=path, requires_grad=True), torch.randn(7, 8, device=path, requires_grad=True)
    targets = torch.full((3,), 9, device=path)
    logits = (x @ weight.T).detach().requires_grad_()
    loss = ops.cross_entropy(logits, targets, ignore_index=9)
    assert loss.isnan() and F.cross_entropy(logits, targets, ignore_index=9).isnan()
    assert not torch.autograd.grad(loss, logits)[0].any()
    loss = ops.linear_cross_entropy(x, weight, targets, ignore_index=9)
    assert loss.isnan()
    assert not any(g.any() for g in torch.autograd.grad(loss, (x, weight)))


def test_no_rows(path: torch.device) -> None:
    targets = torch.empty(0, dtype=torch.int64, device=path)
    assert ops.cross_entropy(torch.randn(0, 7, device=path), targets).isnan()
    x, weight = torch.randn(0, 8, device=path, requires_grad=True), torch.randn(7, 8, device=path, requires_grad=True)
    loss = ops.linear_cross_entropy(x, weight, targets)
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert loss.isnan() and dx.shape == (0, 8) and not dweight.any()


def test_batch_axes_and_ignore_index(path: torch.device) -> None:
    logits, targets = inputs(path, torch.float32, 6, 50)
    targets[1] = 7
    expected = F.cross_entropy(logits, torch.where(targets == -100, 7, targets), ignore_index=7)
    targets[3] = 7
    got = ops.cross_entropy(logits.view(2, 3, 50), targets.view(2, 3), ignore_index=7)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(path: torch.device, layout: str) -> None:
    logits, targets = inputs(path, torch.float32, 6, 40)
    logits = in_layout(logits, layout).requires_grad_()
    loss = ops.cross_entropy(logits, targets)
    check_loss(loss, logits, targets)
    expected = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), expected)
    apart = targets.repeat_interleave(2)[::2]  # a flattened view keeps this stride
    assert torch.equal(ops.cross_entropy(logits, apart), loss)
    weight = torch.eye(40, device=path)
    assert torch.equal(
        ops.linear_cross_entropy(logits, weight, apart), ops.linear_cross_entropy(logits, weight, targets)
    )


def test_offsets_beyond_two_to_the_31(path: torch.device) -> None:
    if path.type == "cuda" and torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    R, V, stride = 5, 20, 2**29 + 2**27
    storage = torch.empty(R * stride, dtype=torch.float16, device=path)
    logits = storage.as_strided((R, V), (stride, 1))
    near, targets = inputs(path, torch.float16, R, V)
    logits.copy_(near)
    assert torch.equal(ops.cross_entropy(logits, targets), ops.cross_entropy(near, targets))
    leaves = [t.detach().requires_grad_() for t in (logits, near)]
    grads = [torch.autograd.grad(ops.cross_entropy(t, targets), t)[0] for t in leaves]
    assert torch.equal(*grads)


# --- fused with the product -----------------------------------------------------------------------------------------


def fused_inputs(device: torch.device, dtype: torch.dtype, R: int, C: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(R, C, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, C, device=device) / C**0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (R,), device=device)
    targets[R // 2] = -100
    return x, weight, targets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("R", "C", "V"),
    [
        (35, 24, 130),  # chunks of two rows, the last one short
        (5, 16, 70),  # fewer rows than chunks
        (64, 1, 1),
    ],
)
def test_fused(path: torch.device, R: int, C: int, V: int, dtype: torch.dtype) -> None:
    x, weight, targets = fused_inputs(path, dtype, R, C, V)
    grad = torch.tensor(0.7, device=path)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.T).to(torch.promote_types(x.dtype, torch.float32)), targets)

    loss = ops.linear_cross_entropy(x, weight, targets)
    exact = wide(x, weight)
    true_loss = plain(*exact)
    result = plain(x, weight)
    # the logits are rounded to the dtype of x in both, so PyTorch's own error is no measure of a mean over few rows
    floor = torch.finfo(dtype).eps * (x.detach().double() @ weight.detach().double().T).abs().max()
    assert loss.dtype == torch.float32
    assert (loss.double() - true_loss).abs() <= 2 * (result.double() - true_loss).abs() + floor
    ours = torch.autograd.grad(loss, (x, weight), grad)
    theirs = torch.autograd.grad(result, (x, weight), grad)
    truth = torch.autograd.grad(true_loss, exact, grad.double())
    for name, a, b, c in zip(("x", "weight"), ours, theirs, truth):
        assert_accurate(a, b, c, factor=3, what=f"gradient of {name}")
    with torch.no_grad():
        assert torch.equal(ops.linear_cross_entropy(x, weight, targets), loss)


def test_only_wanted_gradients_are_made(path: torch.device) -> None:
    x, weight, targets = fused_inputs(path, torch.float32, 20, 8, 30)
    both = torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets), (x, weight))
    (dx,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight.detach(), targets), x)
    (dweight,) = torch.autograd.grad(ops.linear_cross_entropy(x.detach(), weight, targets), weight)
    assert torch.equal(dx, both[0]) and torch.equal(dweight, both[1])
    _, _, dx, dweight = torch.ops.gpt2_kernels.linear_cross_entropy(
        x.detach(), weight.detach(), targets, -100, True, False
    )
    assert dx.shape == x.shape and dweight.numel() == 0


def test_tied_weights_gather_both_gradients(path: torch.device) -> None:
    """The output embedding is the input embedding."""
    _, weight, targets = fused_inputs(path, torch.float32, 20, 8, 30)
    tokens = torch.randint(30, (20,), device=path)
    (ours,) = torch.autograd.grad(ops.linear_cross_entropy(weight[tokens], weight, targets), weight)
    (theirs,) = torch.autograd.grad(F.cross_entropy(weight[tokens] @ weight.T, targets), weight)
    torch.testing.assert_close(ours, theirs)


class _Largest(TorchDispatchMode):
    """The largest matrix that any operation inside gives (the sanitizer's copies are vectors)."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor) and t.dim() == 2:
                self.elements = max(self.elements, t.numel())
        return result


def test_a_sixteenth_of_the_logits_at_a_time(path: torch.device) -> None:
    R, C, V = 256, 4, 1000
    x, weight, targets = (t.detach() for t in fused_inputs(path, torch.float32, R, C, V))
    cpu, triton = crossentropy._linear_cpu, crossentropy._linear_triton
    with _Largest() as mode:
        (triton if "Triton" in ops.path_of("cross_entropy", path.type) else cpu)(x, weight, targets, -100, True, True)
    padded = -(-V // crossentropy.ROW_MULTIPLE) * crossentropy.ROW_MULTIPLE
    assert R * V // 16 <= mode.elements <= R * padded // 16


def test_same_bits_twice(path: torch.device) -> None:
    x, weight, targets = fused_inputs(path, torch.bfloat16, 40, 16, 300)
    runs = []
    for _ in range(2):
        loss = ops.linear_cross_entropy(x, weight, targets)
        runs.append([loss, *torch.autograd.grad(loss, (x, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_gradients_are_those_of_finite_differences(path: torch.device) -> None:
    if path.type == "cuda" or not ops.path_of("cross_entropy", "cpu").startswith("Triton"):
        pytest.skip("float64 exists in the interpreter alone")
    logits, targets = inputs(path, torch.float64, 3, 11)
    assert torch.autograd.gradcheck(
        lambda z: crossentropy._CrossEntropy.apply(z, targets, -100), logits.requires_grad_()
    )
    x, weight, targets = fused_inputs(path, torch.float64, 5, 3, 6)
    assert torch.autograd.gradcheck(
        lambda x, w: crossentropy._LinearCrossEntropy.apply(x, w, targets, -100, True, True), (x, weight)
    )


def test_opcheck(path: torch.device) -> None:
    logits, targets = inputs(path, torch.float32, 4, 30)
    library = torch.ops.gpt2_kernels
    opcheck(library.cross_entropy.default, (logits, targets, -100))
    _, inverse, lse = library.cross_entropy(logits, targets, -100)
    opcheck(library.cross_entropy_backward.default, (inverse, logits, targets, lse, -100))
    x, weight, targets = (t.detach() for t in fused_inputs(path, torch.float32, 20, 8, 30))
    for wanted in ((True, True), (False, False)):
        opcheck(library.linear_cross_entropy.default, (x, weight, targets, -100, *wanted))


def test_compile(path: torch.device) -> None:
    x, weight, targets = fused_inputs(path, torch.float32, 20, 8, 30)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x.sin(), weight, targets) + ops.cross_entropy(x @ weight.T, targets)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(x, weight), (x, weight))
    for a, b in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected):
        torch.testing.assert_close(a, b)


def test_bad_input(path: torch.device) -> None:
    logits, targets = inputs(path, torch.float32, 4, 30)
    x, weight = torch.randn(4, 8, device=path), torch.randn(30, 8, device=path)
    for call, message in [
        (lambda: ops.cross_entropy(logits[:, :0], targets), r"cross_entropy: logits must be \(\.\.\., V\) with V at"),
        (lambda: ops.cross_entropy(logits.double(), targets), r"cross_entropy: dtype of logits must be float32"),
        (lambda: ops.cross_entropy(logits, targets[:3]), r"cross_entropy: targets must be \(\.\.\.\) = \(4,\), got"),
        (lambda: ops.cross_entropy(logits, targets.int()), r"cross_entropy: targets must be torch.int64"),
        (lambda: ops.cross_entropy(logits, targets, ignore_index=2**40), r"ignore_index must fit in 32 bits"),
        (
            lambda: ops.linear_cross_entropy(x[:, :7], weight, targets),
            r"linear_cross_entropy: last axis of x must be C",
        ),
        (lambda: ops.linear_cross_entropy(x, weight[0], targets), r"linear_cross_entropy: weight must be \(V, C\)"),
        (lambda: ops.linear_cross_entropy(x, weight[:0], targets), r"weight must have at least one row"),
        (lambda: ops.linear_cross_entropy(x, weight.half(), targets), r"weight must have the dtype of x"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_target_outside_the_vocabulary(path: torch.device) -> None:
    logits, targets = inputs(path, torch.float32, 4, 30)
    targets[1] = 30
    if path.type == "cuda":
        assert ops.cross_entropy(logits, targets).isnan()
    elif ops.path_of("cross_entropy", "cpu").startswith("Triton"):
        with pytest.raises(Exception, match="target outside the vocabulary"):  # the device assertion
            ops.cross_entropy(logits, targets)
    else:
        for call in (
            lambda: ops.cross_entropy(logits, targets),
            lambda: ops.linear_cross_entropy(torch.randn(4, 8), torch.randn(30, 8), targets),
        ):
            with pytest.raises(ValueError, match=r"cross_entropy: targets must lie in 0\.\.29 or be -100, got 30"):
                call()
