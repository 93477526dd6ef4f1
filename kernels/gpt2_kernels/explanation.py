"""`explain`: which implementation computes an operator or a model here, and why not a faster one.

A model is explained module by module, as `apply` would treat them; given arguments, it is run once, without gradients,
and the operators it calls are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_kernels import _check, _operator, gemm
from gpt2_kernels._fused import Fused
from gpt2_kernels.dropin import recognise

# What PyTorch calls where one of our operators could have been: the part of its name, and ours.
_OURS_INSTEAD = {
    "scaled_dot_product": "attention",
    "native_layer_norm": "layer_norm",
    "gelu": "gelu_mlp or linear",
    "nll_loss_forward": "cross_entropy",
}


def explain(model_or_op: nn.Module | Callable[..., Any] | str, *args: Any, **kwargs: Any) -> str:
    """What computes `model_or_op` on this machine, a line for each module or operator. Print it.

    model_or_op is a torch.nn.Module, a function of gpt2_kernels, or an operator's name. With arguments it is called on
    them once, and the operators that ran are listed with the number of calls; a call that an operator refuses is
    reported with its message. Raises ValueError for a name or function that is no operator.
    """
    if isinstance(model_or_op, nn.Module):
        lines = _of_model(model_or_op)
        return "\n".join(lines + (_of_calls(model_or_op, args, kwargs) if args or kwargs else []))
    name = model_or_op if isinstance(model_or_op, str) else getattr(model_or_op, "__name__", repr(model_or_op))
    if name in _WRAPPERS:
        head = [f"{name}: {_WRAPPERS[name]} under another signature"]
    elif name not in _operator.OPS:
        _check.fail("explain", f"an operator must be one of {sorted({*_operator.OPS, *_WRAPPERS})}", repr(name))
    else:
        devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
        head = [f"{name} on {device}: {_path(name, device)}" for device in devices]
    if not args and not kwargs:
        return "\n".join(head)
    import gpt2_kernels

    function = getattr(gpt2_kernels, name) if isinstance(model_or_op, str) else model_or_op
    return "\n".join(head + _of_calls(function, args, kwargs))


_WRAPPERS = dict.fromkeys(("scaled_dot_product_attention", "attention_varlen", "attention_qkvpacked"), "attention")


def _path(op: str, device: str) -> str:
    path = _operator.path_of(op, device)
    if op in ("linear", "linear_backward", "gelu_mlp") and path == "Triton kernel":
        plain = [f"{8 * size} bits" for (size, what), who in gemm.FASTER.items() if what == "plain" and who == "torch"]
        fused = [f"{8 * size} bits" for (size, what), who in gemm.FASTER.items() if what == "fused" and who == "torch"]
        path += f"; with batch_invariant=False cuBLAS for plain products of {' and '.join(plain)}"
        path += f" and fused ones of {' and '.join(fused)}"
    if op == "linear" and device == "cpu" and path == "compiled C++":
        path += "; with batch_invariant=False PyTorch from 128 rows on where no activation is fused"
    return path


def _of_model(model: nn.Module) -> list[str]:
    parameter = next(model.parameters(), None)
    device = "cpu" if parameter is None else parameter.device.type
    proofs: dict[Any, type[Fused] | str] = {}
    rows: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            ops = [op for op in sorted(_operator.OPS, key=len, reverse=True) if op in module.by]
            rows.append((name, f"{module.by}: {_path(ops[0], device)}" if ops else module.by))
            continue
        found = recognise(module, model, proofs)
        if isinstance(found, str):
            rows.append((name, f"PyTorch: {found}"))
        elif found is not None:
            rows.append((name, f"PyTorch: not replaced yet, gpt2_kernels.apply would take {found.by}"))
    if not rows:
        return ["PyTorch: no module that apply knows"]
    width = max(len(name) for name, _ in rows)
    return [f"{name or '(the model)':{width}}  {text}" for name, text in rows]


class _Calls(TorchDispatchMode):
    """Counts our operators that run, and PyTorch's operators that one of ours could replace."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Counter[tuple[str, str]] = Counter()
        self.theirs: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
        name = func.overloadpacket.__name__
        if func.namespace == "gpt2_kernels":
            self.ours[name, device] += 1
        else:
            for part, instead in _OURS_INSTEAD.items():
                if part in name:
                    self.theirs[name, instead] += 1
        return func(*args, **(kwargs or {}))


def _of_calls(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    with torch.no_grad(), _Calls() as calls:
        try:
            function(*args, **kwargs)
        except ValueError as e:
            return [f"this call is refused: {e}"]
    lines = [f"called {n}x  {op}: {_path(op, device)}" for (op, device), n in sorted(calls.ours.items())]
    lines += [f"called {n}x  PyTorch's {op}: not {instead}" for (op, instead), n in sorted(calls.theirs.items())]
    return lines or ["this call ran no operator of gpt2_kernels"]
