"""GPT-2 on fused kernels: the model, its reference in plain PyTorch, a batch engine and a command line.

The names below are imported at their first use, so that `gpt2 --help` need not wait seconds for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2.config import PRESETS, GPT2Config
    from gpt2.engine import Engine
    from gpt2.model import GPT2
    from gpt2.reference import ReferenceGPT2
    from gpt2.request import Completion, Output
    from gpt2.sampling import SamplingParams
    from gpt2.tokenizer import load_tokenizer

__all__ = [
    "GPT2",
    "PRESETS",
    "Completion",
    "Engine",
    "GPT2Config",
    "Output",
    "ReferenceGPT2",
    "SamplingParams",
    "load_tokenizer",
]

_HOME = {
    "GPT2": "model",
    "PRESETS": "config",
    "Completion": "request",
    "Engine": "engine",
    "GPT2Config": "config",
    "Output": "request",
    "ReferenceGPT2": "reference",
    "SamplingParams": "sampling",
    "load_tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gpt2' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gpt2.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
