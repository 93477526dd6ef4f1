"""Whether a module modelled on nanoGPT computes what its replacement does: first what it calls, then its numbers.

Numbers alone prove little: a clamp or a window may show only at a scale or length that nobody tried. So `strange` first
traces the module's forward, on the meta device, at lengths beyond the windows in use: every function it calls must be
one that nanoGPT calls, with the same arguments at every length. What can still differ (constants, order, which GELU)
are smooth functions, which `agrees` compares at random points and many scales.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_kernels import _runtime

_LENGTHS = (2, 33, 64, 129, 257, 512, 1025, 2048, 4097, 8192, 2**15 + 1, 2**17)  # longer than windows, powers and not
_BATCH = 2
_SHAPES = "view reshape transpose permute unflatten flatten split chunk unbind contiguous size dim shape".split()


@functools.cache
def _functions(*names: str) -> frozenset[Any]:
    """Everything that PyTorch has under these names; for an attribute, its getter."""
    found = (getattr(space, name) for name in names for space in (torch, Tensor, F) if hasattr(space, name))
    return frozenset(each if callable(each) else each.__get__ for each in found)


class _Listener(TorchFunctionMode):
    """Records what a module calls on inputs of one length, and the first call that is not allowed."""

    def __init__(
        self, allowed: tuple[str, ...], length: int, mask: Tensor | None, heads: tuple[int, int, int, int] | None
    ):
        super().__init__()
        self.allowed, self.length, self.heads = _functions(*allowed, *_SHAPES), length, heads
        self.masks: list[Tensor] = [] if mask is None else [mask]  # the buffer, and what is made of it
        self.calls: list[tuple[Any, ...]] = []
        self.complaint: str | None = None
        self.inside = False

    def complain(self, text: str | None) -> None:
        self.complaint = self.complaint or text

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        of_mask = func in _functions("__getitem__", "__eq__") and any(args[0] is mask for mask in self.masks)
        if func not in self.allowed and not of_mask:
            name = getattr(func, "__name__", str(func))
            self.complain(f"its forward {f'reads {func.__self__.__name__}' if name == '__get__' else f'calls {name}'}")
        before, self.inside = self.inside, True
        out = func(*args, **kwargs)
        self.inside = before
        if self.heads:
            self._attention(func, args, kwargs, out)
        if of_mask:
            self.masks.append(out)
        told = {**dict(enumerate(args)), **kwargs}
        if func in _functions(*_SHAPES, "__getitem__"):  # sizes differ with the length
            told = {}
        self.calls.append((func, *(f"{key}={value}" for key, value in told.items() if not isinstance(value, Tensor))))
        return out

    def _attention(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Each head of each text attends to all of its own keys, under PyTorch's causal mask or the buffer's."""
        assert self.heads is not None
        B, H, T, _ = self.heads
        if func in _functions("scaled_dot_product_attention"):
            given = dict(zip(("query", "key", "value", "attn_mask"), args)) | kwargs
            if given.get("attn_mask") is not None:
                self.complain("its forward hands scaled_dot_product_attention a mask")
            for name in ("query", "key", "value"):
                if tuple(given[name].shape) != self.heads:
                    self.complain(f"it attends with a {name} {tuple(given[name].shape)} at length {T}")
        elif func in _functions("softmax") and tuple(args[0].shape) != (B, H, T, T):
            self.complain(f"it takes the softmax of {tuple(args[0].shape)} at length {T}")
        elif func in _functions("masked_fill"):
            mask, value = (*args, *kwargs.values())[1:3]
            if not any(mask is each for each in self.masks) or value != -torch.inf:
                self.complain("it masks scores by something else than its causal mask and -inf")
        elif func in _functions("__getitem__"):
            same = out.storage_offset() == 0 and out.stride()[-2:] == args[0].stride()[-2:]
            if not same or out.shape[-2:] != (T, T):
                self.complain("it takes another part of its mask than the first rows and columns")


class _Unheard(TorchDispatchMode):
    """Catches what the listener cannot see: scripted functions, operators called from C++."""

    def __init__(self, listener: _Listener) -> None:
        super().__init__()
        self.listener = listener

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.listener.inside:
            self.listener.complain(f"its forward calls {func}")
        return func(*args, **(kwargs or {}))


@torch.inference_mode(False)
@torch.enable_grad()
def strange(module: Any, allowed: tuple[str, ...], heads: int | None = None) -> str | None:
    """What a module of nanoGPT's shape does that nanoGPT's does not, or None. `allowed` names PyTorch functions, in
    addition to those that only change shapes; `heads` is given for attention."""
    meta = _alone(module).to("meta")
    mask, weight = meta._buffers.get("bias"), next(meta.parameters())
    width = weight.shape[-1]
    longest = _LENGTHS[-1] if mask is None else mask.shape[-1]
    attributes = set(vars(meta))
    for training in (False, True):
        meta.train(training)
        usual = None
        for length in sorted({min(length, longest) for length in _LENGTHS}):
            shape = None if heads is None else (_BATCH, heads, length, width // heads)
            listener = _Listener(allowed, length, mask, shape)
            x = torch.empty(_BATCH, length, width, dtype=weight.dtype, device="meta", requires_grad=True)
            try:
                with _Unheard(listener), listener:
                    out = meta(x)
                listener.complain(_not_pytorchs(out))
            except Exception as problem:  # theirs may fail in any way on an input that it was not written for
                listener.complain(f"its forward fails at length {length} ({type(problem).__name__})")
            if listener.complaint:
                return listener.complaint
            if listener.calls != (usual := usual or listener.calls):
                return f"its forward does something else at length {length}"
    if new := set(vars(meta)) - attributes:
        return f"its forward sets {', '.join(sorted(new))}"
    return None


def _not_pytorchs(out: Any) -> str | None:
    """What in the autograd graph from `out` to its input is not PyTorch's own."""
    if not isinstance(out, Tensor) or out.grad_fn is None:
        return "its result is no tensor with a gradient"
    nodes: list[Any] = [out.grad_fn]
    for node in nodes:  # a few, so that none is worth remembering
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return f"it has a backward of its own, {type(node).__name__}"
        nodes += (following for following, _ in node.next_functions if following is not None)
    return None


def _alone(module: Any) -> Any:
    """A copy without hooks: a trial must not look like a call to whoever listens."""
    duplicate = copy.deepcopy(module)
    for part in duplicate.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return duplicate


# --- its numbers ----------------------------------------------------------------------------------------------------


class _Marked(nn.Dropout):
    """Stands in for a dropout of activations and shows where it is applied, since it commutes with nothing."""

    def forward(self, input: Tensor) -> Tensor:
        return input.sin() if self.training else input


def agrees(module: Any, candidate: Any, scales: Sequence[float]) -> bool:
    """Whether `candidate` computes what the module does: on a float32 copy on the CPU, with random weights (its own may
    be zeros, and prove nothing), in eval and training mode. Dropouts of activations are marked, and attention's is set
    to 0; whether it drops is tested separately."""
    original = _alone(module).float().cpu()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _runtime.force("torch"), torch.random.fork_rng([]):
        for parameter in original.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5 + (fan_in == 1))
        for name, child in original.named_children():
            if isinstance(child, nn.Dropout) and child.p > 0 and name != "attn_dropout":
                setattr(original, name, _Marked(0.0))
        drops = _drop(original, 0.0)
        mask, width = original._buffers.get("bias"), next(original.parameters()).shape[-1]
        length = 33 if mask is None else min(33, mask.shape[-1])
        fused = copy.deepcopy(original)
        candidate.install(fused, fused)
        try:
            for training in (False, True):
                original.train(training), fused.train(training)
                noise = torch.randn(len(scales), 2, length, width, dtype=torch.float32, generator=generator)
                inputs = [scale * x for scale, x in zip(scales, noise)]
                for x in (*inputs, inputs[0][:1, :1]):
                    theirs = original(x)
                    torch.testing.assert_close(fused(x), theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
                if drops:
                    _drop(original, 0.5), _drop(fused, 0.5)
                    x = inputs[0]
                    if torch.equal(original(x), original(x)) != torch.equal(fused(x), fused(x)):
                        return False
                    _drop(original, 0.0), _drop(fused, 0.0)
        except Exception:  # theirs may fail in any way on an input that it was not written for
            return False
    return True


def _drop(attention: Any, rate: float) -> bool:
    """Set the dropout rate of nanoGPT's attention, in both places that hold it; returns whether it was above 0."""
    layer, number = attention._modules.get("attn_dropout"), vars(attention).get("dropout")
    before = 0.0
    if isinstance(layer, nn.Dropout):
        before, layer.p = layer.p, rate
    if isinstance(number, float):
        before, attention.dropout = max(before, number), rate
    return before > 0
