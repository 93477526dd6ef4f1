"""The operators inside other libraries. Each of those is imported when its integration is first asked for."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

OLDEST_TRANSFORMERS = (5, 4)  # before it GPT-2 hands its attention function no scale, and masks have other functions


def __getattr__(name: str) -> Any:
    if name == "transformers":
        version = importlib.metadata.version(name)
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRANSFORMERS:
            oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
            raise ImportError(f"gpt2_kernels: transformers must be {oldest} or later, got {version}")
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
