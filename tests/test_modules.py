"""The modules against the plain PyTorch modules that they replace, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerance import DTYPES, assert_accurate
from torch import Tensor, nn

import gpt2_kernels as ops
from gpt2_kernels import modules
from gpt2_kernels.modules import CausalSelfAttention, GeluMLP, LayerNorm

# --- plain modules, with the names of GPT-2's checkpoints -------------------------------------------------------------


class PlainMLP(nn.Module):
    def __init__(self, width: int, hidden: int, approximate: str = "tanh", bias: bool = True) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, hidden, bias), nn.Linear(hidden, width, bias)
        self.approximate = approximate

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))
        return y if residual is None else y + residual


class PlainAttention(nn.Module):
    def __init__(
        self, width: int, heads: int, kv_heads: int | None = None, window: int | None = None, scale: float | None = None
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.window, self.scale = heads, kv_heads or heads, window, scale
        self.c_attn = nn.Linear(width, width // heads * (heads + 2 * self.kv_heads))
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        D = C // self.heads
        q, k, v = self.c_attn(x).split([C, D * self.kv_heads, D * self.kv_heads], dim=2)
        q, k, v = (t.view(B, T, -1, D).transpose(1, 2) for t in (q, k, v))
        i, j = torch.arange(T, device=x.device)[:, None], torch.arange(T, device=x.device)
        mask = (j <= i) & (j > i - (self.window or T))
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=True)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return y if residual is None else y + residual


Pair = Callable[[], tuple[nn.Module, nn.Module]]  # ours and the plain one

PAIRS: dict[str, tuple[Pair, int]] = {  # the int is the width
    "LayerNorm": (lambda: (LayerNorm(48), nn.LayerNorm(48)), 48),
    "LayerNorm, no bias, eps": (lambda: (LayerNorm([33], 0.1, bias=False), nn.LayerNorm([33], 0.1, bias=False)), 33),
    "LayerNorm, no weights": (lambda: (LayerNorm(40, 1e-3, False), nn.LayerNorm(40, 1e-3, False)), 40),
    "GeluMLP": (lambda: (GeluMLP(40, 70), PlainMLP(40, 70)), 40),
    "GeluMLP, erf": (lambda: (GeluMLP(40, 70, approximate="none"), PlainMLP(40, 70, "none")), 40),
    "GeluMLP, no bias": (lambda: (GeluMLP(40, 70, bias=False), PlainMLP(40, 70, bias=False)), 40),
    "CausalSelfAttention": (lambda: (CausalSelfAttention(48, 3), PlainAttention(48, 3)), 48),
    "CausalSelfAttention, grouped, window, scale": (
        lambda: (
            CausalSelfAttention(48, 4, kv_heads=2, window=5, scale=0.7),
            PlainAttention(48, 4, kv_heads=2, window=5, scale=0.7),
        ),
        48,
    ),
}
WITH_RESIDUAL = [name for name in PAIRS if not name.startswith("LayerNorm")]


def pair(device: torch.device, dtype: torch.dtype, name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Ours, PyTorch's in the same dtype, and PyTorch's in float64, with the same random weights, none 1 or 0."""
    ours, theirs = PAIRS[name][0]()
    for p in theirs.parameters():
        nn.init.normal_(p, 0.5 if p.dim() == 1 else 0.0, 0.3)
    theirs = theirs.to(device, dtype)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return ours.to(device, dtype), theirs, copy.deepcopy(theirs).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_forward_and_gradients(path: torch.device, name: str, dtype: torch.dtype) -> None:
    ours, theirs, exact = pair(path, dtype, name)
    x = torch.randn(2, 11, PAIRS[name][1], device=path).to(dtype)
    results = []
    grad = torch.randn(2, 11, 1, device=path).to(dtype).expand(x.shape)  # stride 0, as the gradient of a sum has
    for module in (ours, theirs, exact):
        double = module is exact
        leaf = (x.double() if double else x.clone()).requires_grad_()
        y = module(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], grad.double() if double else grad)])
    names = ["result", "gradient of x", *(f"gradient of {n}" for n, _ in ours.named_parameters())]
    for what, a, b, c in zip(names, *results, strict=True):
        assert_accurate(a, b, c, factor=2 if what == "result" else 3, what=what)


@pytest.mark.parametrize("name", WITH_RESIDUAL)
def test_residual(path: torch.device, name: str) -> None:
    ours, theirs, exact = pair(path, torch.float32, name)
    x, residual = torch.randn(2, 2, 11, PAIRS[name][1], device=path)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    results = []
    for module, tensors in ((ours, (x, residual)), (theirs, (x, residual)), (exact, (x.double(), residual.double()))):
        y = module(*tensors)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, residual))])
    for what, a, b, c in zip(("result", "gradient of x", "gradient of residual"), *results):
        if module is exact and c.dtype != torch.float64:
            c = c.double()  # gradients of float32 leaves come back in float32
        assert_accurate(a, b, c, factor=3, what=what)


@pytest.mark.parametrize("name", ["GeluMLP", "GeluMLP, no bias", "CausalSelfAttention"])
def test_a_residual_stream_stays_float32_under_autocast(path: torch.device, name: str) -> None:
    ours, theirs, exact = pair(path, torch.float32, name)
    x, residual = torch.randn(2, 2, 11, PAIRS[name][1], device=path)
    residual = residual * 100  # so that rounding it would show
    with torch.autocast(path.type, torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        y, other = ours(x, residual), theirs(x, residual)
    assert_accurate(y - residual, other - residual, exact(x.double()))


@pytest.mark.parametrize("name", PAIRS)
def test_compile(path: torch.device, name: str) -> None:
    ours, _, _ = pair(path, torch.float32, name)
    x = torch.randn(2, 11, PAIRS[name][1], device=path, requires_grad=True)
    leaves = [x, *ours.parameters()]
    expected = torch.autograd.grad(ours(x.sin()).square().sum(), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ours(x.sin()).square().sum(), fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x), leaves), expected):
        # on a CPU the traced backward gives PyTorch's matrix products other strides, so they add in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_dropout_in_training_alone(path: torch.device) -> None:
    attention = CausalSelfAttention(48, 3, dropout=0.5).to(path)
    x = torch.randn(2, 11, 48, device=path)

    def run() -> Tensor:
        torch.manual_seed(3)
        return attention(x)

    noisy = run()
    assert torch.equal(noisy, run())
    attention.eval()
    still = run()
    assert not torch.equal(noisy, still)
    attention.dropout = 0.0
    assert torch.equal(still, run()) and torch.equal(still, attention.train()(x))


@pytest.mark.parametrize(
    "build",
    [
        lambda **kw: GeluMLP(16, 32, **kw),
        lambda **kw: GeluMLP(16, 32, bias=False, **kw),
        lambda **kw: CausalSelfAttention(16, 2, **kw),
    ],
    ids=["GeluMLP", "GeluMLP, no bias", "CausalSelfAttention"],
)
def test_batch_invariance_reaches_every_product(
    path: torch.device, build: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for name in ("linear", "gelu_mlp"):
        function = getattr(modules, name)

        def spy(*args: Tensor, function: Callable = function, **options: object) -> Tensor:
            asked.append(options["batch_invariant"])
            return function(*args, **options)

        monkeypatch.setattr(modules, name, spy)
    x = torch.randn(1, 5, 16, device=path)
    for invariant in (True, False):
        module = build(batch_invariant=invariant).to(path)
        asked.clear()
        module(x, x)
        assert asked and set(asked) == {invariant}


def test_they_pass_for_torchs_own() -> None:
    """Code that looks for layer norms by type (weight decay groups, precision wrappers) finds ours."""
    norm = LayerNorm(8, 1e-6)
    assert isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (8,)
    assert repr(norm) == "LayerNorm((8,), eps=1e-06, elementwise_affine=True)" or "eps=1e-06" in repr(norm)
    assert torch.equal(norm.weight, torch.ones(8)) and torch.equal(norm.bias, torch.zeros(8))


def test_initial_weights_are_torchs() -> None:
    torch.manual_seed(0)
    ours = GeluMLP(12, 20)
    torch.manual_seed(0)
    theirs = PlainMLP(12, 20)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "build",
    [
        lambda **kw: LayerNorm(16, **kw),
        lambda **kw: GeluMLP(16, 32, **kw),
        lambda **kw: CausalSelfAttention(16, 2, **kw),
    ],
    ids=["LayerNorm", "GeluMLP", "CausalSelfAttention"],
)
def test_device_and_dtype(build: Callable[..., nn.Module]) -> None:
    for p in build(device="meta", dtype=torch.bfloat16).parameters():
        assert p.device.type == "meta" and p.dtype == torch.bfloat16


def test_repr_says_what_the_parts_do_not() -> None:
    assert "approximate='none'" in repr(GeluMLP(4, 8, approximate="none"))
    assert GeluMLP(4, 8, batch_invariant=False).extra_repr() == "approximate='tanh', batch_invariant=False"
    assert CausalSelfAttention(8, 2, batch_invariant=False).extra_repr() == "heads=2, batch_invariant=False"
    plain = CausalSelfAttention(8, 2)
    assert plain.extra_repr() == "heads=2"
    full = CausalSelfAttention(8, 4, kv_heads=2, dropout=0.1, window=3, scale=0.5)
    assert full.extra_repr() == "heads=4, kv_heads=2, dropout=0.1, window=3, scale=0.5"


def test_gpt2_block_loads_as_it_is(path: torch.device) -> None:
    """The parts of `gpt2.GPT2` and these modules hold the same names, shapes and order of rows."""
    import gpt2

    config = gpt2.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=1, n_head=2, eos_token_id=49)
    block = gpt2.GPT2(config).h[0].to(path)
    x = torch.randn(1, 6, 32, device=path)
    mlp, attention = GeluMLP(32, 128).to(path), CausalSelfAttention(32, 2).to(path)
    mlp.load_state_dict(block.mlp.state_dict())
    attention.load_state_dict(block.attn.state_dict())
    torch.testing.assert_close(mlp(x, x), block.mlp(x, x))
    torch.testing.assert_close(attention(x, x), block.attn(x, x, ops.attention_qkvpacked))


def test_bad_arguments(path: torch.device) -> None:
    for call, message in [
        (lambda: LayerNorm((4, 8)), r"LayerNorm: normalized_shape must be one axis in 1..16384, got \(4, 8\)"),
        (lambda: LayerNorm(16385), r"LayerNorm: normalized_shape must be one axis in 1..16384, got \(16385,\)"),
        (lambda: LayerNorm(8, eps=-1.0), r"LayerNorm: eps must be at least 0, got -1.0"),
        (lambda: GeluMLP(0, 8), r"GeluMLP: width must be at least 1, got 0"),
        (lambda: GeluMLP(8, -1), r"GeluMLP: hidden must be at least 1, got -1"),
        (lambda: GeluMLP(8, 8, approximate="erf"), r"GeluMLP: approximate must be 'tanh' or 'none', got 'erf'"),
        (lambda: CausalSelfAttention(8, 3), r"CausalSelfAttention: width must be a multiple of heads = 3, got 8"),
        (lambda: CausalSelfAttention(8, 0), r"CausalSelfAttention: heads must be at least 1, got 0"),
        (lambda: CausalSelfAttention(8, 4, kv_heads=3), r"CausalSelfAttention: query heads H must be .* got 4 and 3"),
        (lambda: CausalSelfAttention(8, 4, kv_heads=0), r"CausalSelfAttention: kv_heads must be at least 1, got 0"),
        (lambda: CausalSelfAttention(514, 2), r"CausalSelfAttention: head dimension D must lie in 1..256, got 257"),
        (
            lambda: CausalSelfAttention(8, 2, window=0),
            r"CausalSelfAttention: window must be None or an int of at least 1, got 0",
        ),
        (lambda: CausalSelfAttention(8, 2, scale=0.0), r"CausalSelfAttention: scale must be positive .* got 0.0"),
        (lambda: CausalSelfAttention(8, 2, dropout=1.0), r"CausalSelfAttention: dropout must lie in \[0, 1\), got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    attention = CausalSelfAttention(8, 2).to(path)
    with pytest.raises(ValueError, match=r"CausalSelfAttention: x must be \(B, T, width\), got \(5, 8\)"):
        attention(torch.zeros(5, 8, device=path))
    with pytest.raises(ValueError, match=r"linear: last axis of x must be K = 8, got \(1, 5, 7\)"):
        attention(torch.zeros(1, 5, 7, device=path))
    with pytest.raises(ValueError, match=r"layer_norm: weight must be \(C,\) = \(7,\), got \(8,\)"):
        LayerNorm(8).to(path)(torch.zeros(3, 7, device=path))
    with pytest.raises(ValueError, match=r"layer_norm: weight must be .*, got \(8,\)"):
        LayerNorm(8, elementwise_affine=False)(torch.zeros(3, 7, device=path))


def test_hooks_run_once_beside_a_float32_stream() -> None:
    """The residual, which autocast must not round, is added separately, but within the same call of the module."""
    calls: list[int] = []
    mlp = modules.GeluMLP(16, 32)
    mlp.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert mlp(x, x).dtype == torch.float32
    assert len(calls) == 1
    on_meta = modules.GeluMLP(16, 32, device="meta")
    assert on_meta(x.to("meta"), x.to("meta")).shape == (3, 16)
