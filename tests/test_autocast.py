"""The functions under torch.autocast and forward-mode derivatives, and the operators called without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import gpt2_kernels as ops
from gpt2_kernels import _operator
from gpt2_kernels.modules import CausalSelfAttention, GeluMLP, LayerNorm

Call = Callable[..., Tensor]


def _tensors(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device) for shape in shapes]


def _cases(device: torch.device) -> dict[str, tuple[Call, list[Tensor], bool]]:
    """Name -> (function, float32 arguments, whether autocast lowers its precision)."""
    x, w, w1, b1, w2, b2 = _tensors(device, (5, 16), (16,), (24, 16), (24,), (16, 24), (16,))
    q, k, v = _tensors(device, (2, 6, 2, 16), (2, 6, 2, 16), (2, 6, 2, 16))
    cu = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention_varlen(*(t.flatten(0, 1)[:6] for t in (q, k, v)), cu, cu, 4, 4)

    return {
        "linear": (lambda x, w, b: ops.linear(x, w, bias=b, activation="gelu"), [x, w1, b1], True),
        "gelu_mlp": (ops.gelu_mlp, [x, w1, b1, w2, b2], True),
        "attention": (ops.attention, [q, k, v], True),
        "attention_varlen": (varlen, [q, k, v], True),
        "attention_qkvpacked": (ops.attention_qkvpacked, [torch.stack((q, k, v), 2)], True),
        "scaled_dot_product_attention": (ops.scaled_dot_product_attention, [q, k, v], True),
        "layer_norm": (ops.layer_norm, [x, w, b2], False),
        "add_layer_norm": (lambda x, r, w, b: ops.add_layer_norm(x, r, w, b)[0], [x, x + 1, w, b2], False),
    }


CASES = tuple(_cases(torch.device("cpu")))


@pytest.mark.parametrize("name", CASES)
def test_the_dtype_is_the_one_that_pytorch_takes_on_a_gpu(path: torch.device, name: str) -> None:
    """Whatever the mix of input dtypes; gradients have the dtype of the parameters."""
    function, tensors, lowered = _cases(path)[name]
    dtype = torch.bfloat16 if lowered else torch.float32
    mixed = [t.bfloat16() if i == 0 else t for i, t in enumerate(tensors)]  # an activation, and float32 parameters
    leaves = [t.clone().requires_grad_() for t in mixed]
    with torch.autocast(path.type, torch.bfloat16):
        out = function(*leaves)
    expected = function(*(t.to(dtype) for t in mixed))
    assert out.dtype == dtype and torch.equal(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    again = [t.to(dtype).requires_grad_() for t in mixed]
    function(*again).backward(grad)
    for ours, theirs in zip(leaves, again):
        assert ours.grad is not None and ours.grad.dtype == ours.dtype
        assert theirs.grad is not None and torch.equal(ours.grad, theirs.grad.to(ours.dtype))


@pytest.mark.parametrize("name", [name for name in CASES if name != "attention_qkvpacked"])  # one tensor is no mix
def test_without_autocast_a_mix_is_refused(path: torch.device, name: str) -> None:
    function, tensors, _ = _cases(path)[name]
    for enabled in (None, False):  # never entered; entered and switched off
        with torch.autocast(path.type, torch.bfloat16, enabled=bool(enabled)):
            with pytest.raises(ValueError, match="dtype"):
                function(tensors[0].bfloat16(), *tensors[1:])


def test_float64_is_refused_under_autocast_too(path: torch.device) -> None:
    x, w = (t.double() for t in _tensors(path, (3, 16), (16,)))
    with torch.autocast(path.type, torch.bfloat16), pytest.raises(ValueError, match="layer_norm: dtype of x must be"):
        ops.layer_norm(x, w)


def test_a_block_of_modules_trains_under_autocast(path: torch.device) -> None:
    """float32 parameters and bfloat16 activations, as in mixed-precision training; close to the plain modules."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention, self.mlp = LayerNorm(32), CausalSelfAttention(32, 2), GeluMLP(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm(x))
            return x + self.mlp(self.norm(x))

    block = Block().to(path)
    x = torch.randn(2, 7, 32, device=path)
    exact = block(x)
    with torch.autocast(path.type, torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.float32  # the residual stream stays float32
    torch.testing.assert_close(out, exact, rtol=0.05, atol=0.05)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in block.parameters())


def test_autocast_is_traced(production: torch.device) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(production.type, torch.bfloat16):
            return ops.linear(ops.layer_norm(x, w[0]), w)

    x, w = _tensors(production, (3, 16), (8, 16))
    w.requires_grad_()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w), f(x, w)) and compiled(x, w).dtype == torch.bfloat16
    compiled(x, w).sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32


def test_cache_operators_keep_the_dtype_of_the_cache(path: torch.device) -> None:
    cache = torch.zeros(2, 4, 1, 16, device=path)
    k = torch.randn(1, 1, 16, device=path)
    slot = torch.tensor([5], device=path)
    with torch.autocast(path.type, torch.bfloat16):
        ops.append_kv_(k, k, cache, cache.clone(), slot)
        with pytest.raises(ValueError, match="k_cache must have the dtype of k"):
            ops.append_kv_(k.bfloat16(), k.bfloat16(), cache, cache, slot)
    assert torch.equal(cache[1, 1], k[0])


@pytest.mark.parametrize("name", CASES)
def test_a_forward_mode_derivative_is_refused(production: torch.device, name: str) -> None:
    """It used to be zero. Whichever argument has the tangent, with torch.func's transforms and without."""
    function, tensors, _ = _cases(production)[name]
    for i, tensor in enumerate(tensors):

        def alone(x: Tensor, i: int = i) -> Tensor:
            return function(*tensors[:i], x, *tensors[i + 1 :])

        pattern = "[a-z_]+: has no forward-mode derivative"
        with pytest.raises(ValueError, match=pattern):
            torch.func.jvp(alone, (tensor,), (tensor,))
        with pytest.raises(ValueError, match=pattern):
            torch.func.jvp(torch.func.vmap(alone), (tensor[None],), (tensor[None],))
        with forward_ad.dual_level():
            assert torch.equal(alone(tensor), function(*tensors))  # no tangent
            with pytest.raises(ValueError, match=pattern):
                alone(forward_ad.make_dual(tensor, tensor))


def test_losses_and_what_has_no_gradient_refuse_it_too(production: torch.device) -> None:
    x, w = _tensors(production, (3, 16), (8, 16))
    targets, lse = torch.tensor([1, 2, 3], device=production), torch.zeros(1, 1, 3, device=production)
    functions: dict[str, Callable[[Tensor], object]] = {
        "cross_entropy": lambda x: ops.cross_entropy(x, targets),
        "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x, w, targets),
        "layer_norm": lambda x: ops.layer_norm(x, weight=w[0], bias=w[1], prenorm=True),
        "attention_map": lambda x: ops.attention_map(q=x[None, :, None], k=w[None, :3, None], lse=lse),
    }
    for name, function in functions.items():
        with pytest.raises(ValueError, match=f"{name}: has no forward-mode derivative"):
            torch.func.jacfwd(function)(x)


def test_an_operator_called_directly_refuses_to_lose_a_gradient(path: torch.device) -> None:
    """torch.ops.gpt2_kernels.linear and the like used to return results without a gradient."""
    x, w = _tensors(path, (3, 16), (8, 16))
    arguments = (x, w.requires_grad_(), None, None, "", False, True)
    with pytest.raises(ValueError, match="linear: torch.ops.gpt2_kernels.linear records no gradient"):
        torch.ops.gpt2_kernels.linear(*arguments)
    with torch.no_grad():
        direct = torch.ops.gpt2_kernels.linear(*arguments)[0]
    through = ops.linear(x, w)
    assert through.requires_grad and torch.equal(direct, through)


def test_a_wrong_use_of_the_decorator() -> None:
    with pytest.raises(ValueError, match="autocast: to must be 'lower' or 'float32', got 'half'"):
        _operator.autocast("half")
