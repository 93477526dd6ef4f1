"""cross_entropy and linear_cross_entropy against float64 PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerance import DTYPES, assert_accurate, wide
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import gpt2_kernels as ops
from gpt2_kernels import _check, _crossentropy_cpu, crossentropy


@pytest.fixture(autouse=True)
def chunks_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that shapes small enough for the interpreter are split into several chunks."""
    monkeypatch.setattr(_crossentropy_cpu, "FEWEST_ROWS", 1)


VOCABULARIES = [
    1,  # the loss is 0, and so is its gradient
    5,  # shorter than one 16-byte piece in half precision
    1000,  # less than a block
    1025,  # one past the small block: the large one, mostly empty; rows start at odd addresses
    4097,  # one past the large block
    8200,  # two blocks and a remainder
]


def inputs(device: torch.device, dtype: torch.dtype, R: int, V: int) -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(R, V, device=device)).to(dtype)
    targets = torch.randint(V, (R,), device=device)
    if R > 2:
        targets[R // 2] = -100  # in the middle: rows after it must not shift
    return logits, targets


def linear_inputs(device: torch.device, dtype: torch.dtype, R: int, C: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(R, C, device=device).to(dtype)
    weight = (2 * torch.randn(V, C, device=device) / C**0.5).to(dtype)
    return x, weight, inputs(device, dtype, R, V)[1]


def torch_loss(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """PyTorch's loss of logits in their own dtype; the loss itself is float32 or float64, like ours."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=ignore_index)


def torch_linear_loss(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    return torch_loss(F.linear(x, weight), targets, ignore_index)


def compare(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    tensors: list[Tensor],
    targets: Tensor,
    grad: float = -1.7,
    **options: int,
) -> None:
    """Loss and gradients, with an incoming gradient that is not 1."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    exact = wide(*leaves)
    losses = [ours(*leaves, targets, **options)] + [theirs(*t, targets, **options) for t in (leaves, exact)]
    assert losses[0].shape == () and losses[0].dtype == torch.float32
    assert_accurate(*losses, what="loss")
    results = [
        torch.autograd.grad(loss, t, torch.tensor(grad, dtype=loss.dtype, device=loss.device))
        for loss, t in zip(losses, (leaves, leaves, exact))
    ]
    for i, (a, b, c) in enumerate(zip(*results)):
        assert_accurate(a, b, c, factor=3, what=f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_cross_entropy(path: torch.device, V: int, dtype: torch.dtype) -> None:
    logits, targets = inputs(path, dtype, 5, V)
    compare(ops.cross_entropy, torch_loss, [logits], targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpt2_vocabulary(path: torch.device, dtype: torch.dtype) -> None:
    logits, targets = inputs(path, dtype, 3, 50257)
    targets[0] = 50256  # the last column, in the unaligned end of its row
    compare(ops.cross_entropy, torch_loss, [logits], targets)


def test_more_rows_than_the_cpu_takes_at_a_time(path: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_crossentropy_cpu, "CHUNK", 100)  # 3 of these rows; the kernel has no such chunks
    logits, targets = inputs(path, torch.float32, 8, 33)
    compare(ops.cross_entropy, torch_loss, [logits], targets)


@pytest.mark.parametrize("target", [0, 5, 6, 7, 8, 4102, 4103, 4109], ids=str)
def test_every_part_of_a_row_knows_its_columns(path: torch.device, target: int) -> None:
    """Row 1 of 4110 float16 starts 4 bytes before a 16-byte boundary: it has a start, blocks and an end."""
    logits, targets = inputs(path, torch.float16, 2, 4110)
    targets[:] = target
    compare(ops.cross_entropy, torch_loss, [logits], targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy(path: torch.device, dtype: torch.dtype) -> None:
    """Chunks of 2 rows with one left over, and a vocabulary that is not a multiple of anything."""
    x, weight, targets = linear_inputs(path, dtype, 47, 24, 333)
    compare(ops.linear_cross_entropy, torch_linear_loss, [x, weight], targets)


def test_linear_gpt2_vocabulary(path: torch.device) -> None:
    x, weight, targets = linear_inputs(path, torch.bfloat16, 3, 16, 50257)
    compare(ops.linear_cross_entropy, torch_linear_loss, [x, weight], targets)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 7), (3, 5, 1)], ids=str)
def test_linear_of_width_one(path: torch.device, shape: tuple[int, int, int]) -> None:
    """One row, one channel, one token."""
    x, weight, targets = linear_inputs(path, torch.float32, *shape)
    compare(ops.linear_cross_entropy, torch_linear_loss, [x, weight], targets)


@pytest.mark.parametrize("scale", [1.0, 2.0**16], ids=["plain", "loss scale"])
def test_float16_gradients_do_not_underflow(path: torch.device, scale: float) -> None:
    """Divided by the number of rows before the products, d logits would lose precision in float16 and then vanish."""
    R = 300
    x, weight, targets = linear_inputs(path, torch.float16, R, 16, 500)
    weight = weight * 2.0**-6
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    exact = wide(*leaves)
    loss = ops.linear_cross_entropy(*leaves, targets)
    ours = torch.autograd.grad(loss, leaves, torch.tensor(scale, device=path))
    truth = torch.autograd.grad(torch_linear_loss(*exact, targets), exact, torch.tensor(scale).double().to(path))
    for a, b in zip(ours, truth):
        smallest = 2.0**-24  # of float16: one rounding may cost half of it
        assert (a.double() - b).abs().max() <= 2e-3 * b.abs().max() + smallest


def test_several_leading_axes(path: torch.device) -> None:
    logits, targets = inputs(path, torch.float32, 6, 40)
    together = ops.cross_entropy(logits.view(2, 3, 40), targets.view(2, 3))
    assert torch.equal(together, ops.cross_entropy(logits, targets))
    assert torch.equal(ops.cross_entropy(logits[0], targets[0]), ops.cross_entropy(logits[:1], targets[:1]))
    x, weight, targets = linear_inputs(path, torch.float32, 6, 8, 40)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    compare(ops.linear_cross_entropy, torch_linear_loss, [x.view(2, 3, 8), weight], targets.view(2, 3))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # (6, 4, 96) -> (.., .., V)
    "rows": lambda t: t[::2],
    "columns": lambda t: t[..., 3:36],  # rows as far apart as before, but with another alignment
    "columns, odd width": lambda t: t[..., 8:41],  # read and written rows are aligned differently
    "transposed": lambda t: t.transpose(0, 1),
    "last_axis_strided": lambda t: t[..., ::2],
    "last_axis_first": lambda t: t.permute(2, 1, 0),
    "expanded": lambda t: t[:1, :1].expand(3, 2, 96),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_logits(path: torch.device, layout: str, dtype: torch.dtype) -> None:
    base = (3 * torch.randn(6, 4, 96, device=path)).to(dtype).requires_grad_()
    exact = base.detach().double().requires_grad_()
    targets = torch.randint(4, LAYOUTS[layout](base).shape[:-1][::-1], device=path).mT  # not contiguous either
    losses = [f(LAYOUTS[layout](t), targets) for f, t in ((ops.cross_entropy, base), (torch_loss, base))]
    losses.append(torch_loss(LAYOUTS[layout](exact), targets))
    assert_accurate(*losses, what="loss")
    gradients = [torch.autograd.grad(2.5 * loss, t)[0] for loss, t in zip(losses, (base, base, exact))]
    assert_accurate(*gradients, factor=3, what="gradient")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_and_weight(path: torch.device, layout: str) -> None:
    base, other = torch.randn(2, 6, 4, 96, device=path).unbind(0)
    x = LAYOUTS[layout](base)
    weight = LAYOUTS[layout](other).flatten(0, 1)
    if layout == "last_axis_strided":
        weight = weight.T.contiguous().T
    if layout == "expanded":
        weight = other.flatten(0, 1)[:, :1].expand(24, 96)
    targets = torch.randint(weight.shape[0], x.shape[:-1], device=path)
    compare(ops.linear_cross_entropy, torch_linear_loss, [x, weight], targets)


def test_expanded_incoming_gradient(path: torch.device) -> None:
    """Losses of several calls summed: each gets one element of an expanded tensor."""
    logits, targets = inputs(path, torch.float32, 4, 20)
    logits.requires_grad_()
    stacked = torch.stack([ops.cross_entropy(logits, targets), ops.cross_entropy(logits, targets.flip(0))])
    ours = torch.autograd.grad(stacked.sum(), logits)[0]
    theirs = torch.stack([torch_loss(logits, targets), torch_loss(logits, targets.flip(0))])
    torch.testing.assert_close(ours, torch.autograd.grad(theirs.sum(), logits)[0])


def test_offsets_beyond_two_to_the_31(path: torch.device) -> None:
    """Rows so far apart that an int32 offset would wrap; the memory between is never touched."""
    if path.type == "cuda" and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    stride, V = 2**30 + 3, 40
    storage = torch.empty(3 * stride + V, dtype=torch.float16, device=path)
    logits = storage.as_strided((4, V), (stride, 1))
    logits.copy_(torch.randn(4, V))
    targets = torch.randint(V, (4,), device=path)
    loss, scale, maxima, totals = torch.ops.gpt2_kernels.cross_entropy(logits, targets, -100)
    dense = logits.contiguous()
    assert torch.equal(loss, ops.cross_entropy(dense, targets))
    arguments = (targets, maxima, totals, scale, -100)
    far, near = (
        torch.ops.gpt2_kernels.cross_entropy_backward(torch.ones((), device=path), t, *arguments)
        for t in (logits, dense)
    )
    assert torch.equal(far, near)


@pytest.mark.parametrize("factor", [1e2, 1e4, 1e37], ids=str)
def test_huge_logits(path: torch.device, factor: float) -> None:
    """Their exp overflows, and a float32 logsumexp has no digits left for the sum of exponentials."""
    logits, targets = inputs(path, torch.float32, 4, 300)
    logits = (logits / logits.abs().max() * factor).requires_grad_()
    with torch.no_grad():
        logits[:, 1] = logits.amax(1) - 0.5  # two tokens share the probability
    targets[0] = 1
    compare(ops.cross_entropy, torch_loss, [logits], targets)


def test_forbidden_tokens(path: torch.device) -> None:
    """Logits of -inf, whole blocks of them too: probability 0, not NaN."""
    logits, targets = inputs(path, torch.float32, 3, 9000)
    targets[:] = torch.tensor([8500, 8191, 8999])
    logits[:, :8190] = -torch.inf
    compare(ops.cross_entropy, torch_loss, [logits], targets)
    logits.requires_grad_()
    assert ops.cross_entropy(logits, torch.zeros_like(targets)) == torch.inf  # as torch


def test_nan_is_not_hidden(path: torch.device) -> None:
    logits, targets = inputs(path, torch.float32, 3, 50)
    for value in (torch.nan, torch.inf):
        spoilt = logits.clone()
        spoilt[0, 7] = value
        assert ops.cross_entropy(spoilt, targets).isnan()
    spoilt = logits.clone()
    spoilt[1] = torch.nan  # the ignored row, which is not read
    assert torch.equal(ops.cross_entropy(spoilt, targets), ops.cross_entropy(logits, targets))
    spoilt.requires_grad_()
    ops.cross_entropy(spoilt, targets).backward()
    assert spoilt.grad is not None and not spoilt.grad[1].any() and spoilt.grad.isfinite().all()


@pytest.mark.parametrize("ignore_index", [-1, 0, 3, 2**40], ids=str)
def test_ignore_index(path: torch.device, ignore_index: int) -> None:
    """Including one inside the vocabulary, and one past 32 bits."""
    logits, targets = inputs(path, torch.float32, 40, 7)
    targets[20] = ignore_index
    assert (targets == ignore_index).any()
    compare(ops.cross_entropy, torch_loss, [logits], targets, ignore_index=ignore_index)
    x, weight, _ = linear_inputs(path, torch.float32, 40, 6, 7)
    compare(ops.linear_cross_entropy, torch_linear_loss, [x, weight], targets, ignore_index=ignore_index)


@pytest.mark.parametrize("R", [0, 3])
def test_no_row_left(path: torch.device, R: int) -> None:
    """As in torch, the loss is NaN and the gradients are 0."""
    x, weight, _ = (
        t.requires_grad_() if t.is_floating_point() else t for t in linear_inputs(path, torch.float32, R, 4, 9)
    )
    targets = torch.full((R,), -100, device=path)
    logits = torch.randn(R, 9, device=path, requires_grad=True)
    for loss, leaves in (
        (ops.cross_entropy(logits, targets), [logits]),
        (ops.linear_cross_entropy(x, weight, targets), [x, weight]),
    ):
        assert loss.isnan()
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves)):
            assert gradient.shape == leaf.shape and not gradient.any()


def test_mean_of_many_rows(path: torch.device) -> None:
    """More rows than mean_kernel takes at a time."""
    losses = torch.rand(2 * crossentropy.BLOCK_MEAN + 5, device=path)
    targets = torch.randint(-1, 2, losses.shape, device=path)
    mean = (
        crossentropy._mean if ops.path_of("cross_entropy", path.type).startswith("Triton") else _crossentropy_cpu.mean
    )
    loss, scale = mean(losses * (targets != -1), targets, -1)
    kept = losses[targets != -1].double()
    torch.testing.assert_close(loss.double(), kept.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(scale.double(), torch.tensor(1 / kept.numel(), device=path).double(), rtol=1e-6, atol=0)


def test_gradient_only_where_it_is_wanted(path: torch.device) -> None:
    x, weight, targets = linear_inputs(path, torch.float32, 20, 6, 30)
    both = [t.detach().requires_grad_() for t in (x, weight)]
    dx, dweight = torch.autograd.grad(ops.linear_cross_entropy(*both, targets), both)
    assert torch.equal(torch.autograd.grad(ops.linear_cross_entropy(both[0], weight, targets), both[0])[0], dx)
    assert torch.equal(torch.autograd.grad(ops.linear_cross_entropy(x, both[1], targets), both[1])[0], dweight)
    with torch.no_grad():
        assert not ops.linear_cross_entropy(*both, targets).requires_grad
    loss = ops.linear_cross_entropy(x, weight, targets)
    assert not loss.requires_grad and torch.equal(loss, ops.linear_cross_entropy(*both, targets).detach())


def test_tied_embedding(path: torch.device) -> None:
    """weight gets one gradient as the embedding and one as the head."""
    _, weight, targets = linear_inputs(path, torch.float32, 20, 6, 30)
    tokens = torch.randint(30, (20,), device=path)

    def tied(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda weight, targets: loss(F.embedding(tokens, weight).sin(), weight, targets)

    compare(tied(ops.linear_cross_entropy), tied(torch_linear_loss), [weight], targets)


def test_backward_twice_leaves_what_was_saved(path: torch.device) -> None:
    x, weight, targets = linear_inputs(path, torch.float32, 20, 6, 30)
    leaves = [t.requires_grad_() for t in (x, weight)]
    loss = ops.linear_cross_entropy(*leaves, targets)
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    kept = [t.clone() for t in first]
    for t in first:
        t.zero_()  # what backward returns belongs to the caller
    for factor in (3, 6):
        again = torch.autograd.grad(factor * loss, leaves, retain_graph=True)
        for a, b in zip(again, kept):
            torch.testing.assert_close(a, factor / 3 * b, rtol=1e-6, atol=0)
    for _ in range(3):  # adds to .grad in place from the second time on
        (3 * loss).backward(retain_graph=True)
    for t, b in zip(leaves, kept):
        torch.testing.assert_close(t.grad, 3 * b)
    logits, targets = inputs(path, torch.float32, 5, 30)
    before = logits.clone()
    logits.requires_grad_()
    ops.cross_entropy(logits, targets).backward()
    assert torch.equal(logits, before)


def test_same_bits_twice_and_in_any_batch(path: torch.device) -> None:
    """Every row's statistics and gradient depend on that row alone; the result is the same each time."""
    logits, targets = inputs(path, torch.float32, 7, 1500)
    operator = torch.ops.gpt2_kernels.cross_entropy
    together = operator(logits, targets, -100)
    assert all(torch.equal(a, b) for a, b in zip(together, operator(logits, targets, -100)))
    for r in range(7):
        alone = operator(logits[r : r + 1], targets[r : r + 1], -100)
        assert torch.equal(alone[2], together[2][r : r + 1]) and torch.equal(alone[3], together[3][r : r + 1])
    x, weight, targets = linear_inputs(path, torch.bfloat16, 40, 16, 100)
    arguments = (x, weight, targets, -100, True, True)
    operator = torch.ops.gpt2_kernels.linear_cross_entropy
    assert all(torch.equal(a, b) for a, b in zip(operator(*arguments), operator(*arguments)))


class Largest(TorchDispatchMode):
    """The largest storage, in bytes, that any operation returns, including those inside our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_most_a_sixteenth_of_the_logits_is_alive(
    path: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    R, C, V = 512, 2, 1000
    x, weight, targets = linear_inputs(path, dtype, R, C, V)
    run = _crossentropy_cpu.linear_cross_entropy
    if ops.path_of("linear_cross_entropy", path.type).startswith("Triton"):
        run = crossentropy._linear_cross_entropy_triton
        if path.type == "cpu":
            if dtype != torch.float32:
                pytest.skip("the interpreter's path widens a chunk: PyTorch has no float32 product of halves on a CPU")
            for kernel in ("cross_entropy_kernel", "mean_kernel"):  # the sanitizer's red zones would be counted
                monkeypatch.setattr(crossentropy, kernel, Nothing())
    logits = R * V * x.element_size()
    with Largest() as largest:
        run(x, weight, targets, -100, True, True)
    assert logits / 20 < largest.bytes <= logits / 16, (largest.bytes, logits)
    if path.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(x, weight, targets, -100, True, True)
        assert torch.cuda.max_memory_allocated() - before <= logits / 16 + 4 * (R + V) * C + 2**16


class Nothing:
    """A kernel that is never launched."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize(
    ("R", "row", "alive", "expected"),
    [
        (65536, 50257, 50304, 3968),  # 17 chunks of whole tiles: the padding leaves no room for 4096 rows
        (65536, 50304, 50304, 4096),
        (8192, 50257, 50304, 512),  # a sixteenth would be 511 rows
        (600, 100, 128, 384),  # two chunks, as equal as tiles allow
        (16, 100, 128, 128),
        (0, 100, 128, 128),
    ],
)
def test_rows_of_a_chunk(monkeypatch: pytest.MonkeyPatch, R: int, row: int, alive: int, expected: int) -> None:
    monkeypatch.undo()  # the package's own fewest rows
    assert _crossentropy_cpu.chunk_rows(R, row, alive) == expected


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_gradcheck(path: torch.device, name: str) -> None:
    if not ops.path_of(name, path.type).endswith("interpreted"):
        pytest.skip("float64 in kernels is for the interpreter")
    if name == "cross_entropy":
        logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
        targets = torch.tensor([6, -100, 2])
        assert torch.autograd.gradcheck(lambda t: crossentropy._CrossEntropy.apply(t, targets, -100), logits)
    else:
        leaves = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5)]
        targets = torch.tensor([4, 0, -100, 2])
        function = crossentropy._LinearCrossEntropy.apply
        assert torch.autograd.gradcheck(lambda *t: function(*t, targets, -100, True, True), leaves)


def test_opcheck(path: torch.device) -> None:
    logits, targets = inputs(path, torch.float32, 4, 32)
    opcheck(torch.ops.gpt2_kernels.cross_entropy.default, (logits, targets, -100))
    _, scale, maxima, totals = torch.ops.gpt2_kernels.cross_entropy(logits, targets, -100)
    arguments = (torch.tensor(2.0, device=path), logits, targets, maxima, totals, scale, -100)
    opcheck(torch.ops.gpt2_kernels.cross_entropy_backward.default, arguments)
    x, weight, targets = linear_inputs(path, torch.float32, 20, 6, 30)
    opcheck(torch.ops.gpt2_kernels.linear_cross_entropy.default, (x, weight, targets, -100, True, False))


def test_compile(path: torch.device) -> None:
    x, weight, targets = linear_inputs(path, torch.float32, 20, 6, 30)
    leaves = [t.requires_grad_() for t in (x, weight)]

    def function(x: Tensor, weight: Tensor) -> Tensor:
        hidden = x.sin()
        both = ops.linear_cross_entropy(hidden, weight, targets) + ops.cross_entropy(hidden @ weight.T, targets)
        return 3 * both

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("target", [-1, 30, 2**40])
def test_a_target_outside_the_vocabulary(path: torch.device, target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error where checking is free; otherwise the kernel reads nothing out of bounds and returns NaN."""
    logits, targets = inputs(path, torch.float32, 4, 30)
    targets[1] = target
    x, weight, _ = linear_inputs(path, torch.float32, 4, 6, 30)
    if path.type == "cpu":
        rule = rf"targets must lie in 0..29 or be ignore_index \(-100\), got {target}"
        with pytest.raises(ValueError, match=rf"^cross_entropy: {rule}"):
            ops.cross_entropy(logits, targets)
        with pytest.raises(ValueError, match=rf"^linear_cross_entropy: {rule}"):
            ops.linear_cross_entropy(x, weight, targets)
        if not ops.path_of("cross_entropy", "cpu").startswith("Triton"):
            return
        import interpreter

        monkeypatch.setattr(_check, "targets", lambda *_: None)
        with pytest.raises(Exception, match="a target lies outside the vocabulary"):
            ops.cross_entropy(logits, targets)
        interpreter.install(debug_asserts=False)
    try:
        logits.requires_grad_()
        loss = ops.cross_entropy(logits, targets)
        loss.backward()
        assert logits.grad is not None
        spoilt = logits.grad.isnan().all(1).tolist()
        assert loss.isnan() and spoilt == [False, True, False, False] and not logits.grad[2].any()
        assert ops.linear_cross_entropy(x, weight, targets).isnan()
    finally:
        if path.type == "cpu":
            interpreter.install()


def test_bad_input(path: torch.device) -> None:
    logits, targets = inputs(path, torch.float32, 4, 30)
    x, weight, _ = linear_inputs(path, torch.float32, 4, 6, 30)
    whole = torch.zeros((), dtype=torch.float32, device=path).expand(2, crossentropy.MAX_VOCABULARY + 1)
    loss, linear = ops.cross_entropy, ops.linear_cross_entropy
    for call, message in [
        (lambda: loss(logits[0, 0], targets), r"cross_entropy: logits must be \(..., V\), got \(\)"),
        (
            lambda: loss(logits.double(), targets),
            r"cross_entropy: dtype of logits must be float32, float16 or bfloat16",
        ),
        (lambda: loss(logits, targets[:3]), r"cross_entropy: targets must be .* = \(4,\), got \(3,\)"),
        (lambda: loss(logits, targets.int()), r"cross_entropy: targets must be torch.int64, got torch.int32"),
        (lambda: loss(logits, targets.to("meta")), r"cross_entropy: targets must be on the device"),
        (lambda: loss(logits[:, :0], targets), r"cross_entropy: the vocabulary must have 1..1073741824 entries, got 0"),
        (lambda: loss(whole, targets[:2]), r"cross_entropy: the vocabulary must have 1..1073741824 entries, got 10737"),
        (lambda: loss(logits, targets, ignore_index=0.5), r"cross_entropy: ignore_index must be .* got 0.5"),
        (lambda: loss(logits, targets, ignore_index=2**63), r"cross_entropy: ignore_index must be an integer of 64"),
        (lambda: linear(x, weight[0], targets), r"linear_cross_entropy: weight must be \(V, C\), got \(6,\)"),
        (lambda: linear(x[:, :5], weight, targets), r"linear_cross_entropy: last axis of x must be C = 6, at least 1"),
        (lambda: linear(x, weight.half(), targets), r"linear_cross_entropy: weight must have the dtype of x"),
        (lambda: linear(x, weight[:0], targets), r"linear_cross_entropy: the vocabulary must have"),
        (lambda: linear(x[:, :0], weight[:, :0], targets), r"linear_cross_entropy: last axis of x must be C = 0"),
        (lambda: linear(x, weight, targets[:, None]), r"linear_cross_entropy: targets must be the leading axes"),
    ]:
        with pytest.raises(ValueError, match="^" + message):
            call()
