"""The base class of modules replaced by `apply`, and what their forwards share.

Used by `dropin`, for torch's and nanoGPT's modules, and by `integrations.transformers`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_kernels.gemm import gelu_mlp, linear


class Fused(nn.Module):
    """First base of a replaced module's class: its forward, on our operators, overrides the one the module had."""

    by: str  # what computes it, for the report

    @classmethod
    def install(cls, module: nn.Module, model: nn.Module) -> None:
        """Replace `module`, a part of `model`; nothing outside `model` may be touched."""
        combined: Any = _combined  # the cache hashes classes, which mypy takes for modules
        module.__class__ = combined(cls, type(module))

    def uninstall(self, model: nn.Module) -> None:
        self.__class__ = _before(type(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the two bases, since the combined class has no importable name."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_rebuild, type(self).__bases__, *reduced[2:])


@functools.cache
def _combined(fused: Any, base: Any) -> Any:
    return type(f"Fused{base.__name__}", (fused, base), {"__module__": fused.__module__, "before": base})


def _before(kind: Any) -> Any:
    """The class before `install`, keeping what others have built on it since (parametrizations, FSDP)."""
    if "before" in vars(kind):
        return kind.before
    bases = tuple(_before(base) if issubclass(base, Fused) else base for base in kind.__bases__)
    return type(kind.__name__, bases, {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")})


def _rebuild(fused: Any, base: Any) -> nn.Module:
    combined = _combined(fused, base)
    return combined.__new__(combined)


def plain(module: Any, kind: type) -> bool:
    """Whether a layer has exactly this type and no hooks: then its weights may be used without calling it.

    Adapters, quantized layers and parametrizations have another type; pruning and old weight norm are hooks; others set
    a forward on the instance.
    """
    listeners = module._forward_hooks or module._forward_pre_hooks
    listeners = listeners or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not listeners and "forward" not in vars(module)


def gelu_product(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str) -> Tensor:
    """gelu(x w1^T + b1) w2^T + b2 with the fastest products available; either bias may be None."""
    if b1 is not None and b2 is not None:
        return gelu_mlp(x, w1, b1, w2, b2, approximate=approximate, batch_invariant=False)
    hidden = linear(x, w1, b1, activation="gelu_tanh" if approximate == "tanh" else "gelu", batch_invariant=False)
    return F.linear(hidden, w2, b2)
