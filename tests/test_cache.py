"""The parts of the cache that depend on a GPU, simulated without one: its size, dtypes, and where swapped blocks go.

Its contents are tested through the engine, in test_engine.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import tiny_config

from gpt2 import GPT2, Engine, cache

GPU = torch.device("cuda", 0)


def test_memory_that_pytorch_keeps_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the memory of an engine that is gone."""
    free = [2**20]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(2**30))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 2**31))
    assert cache._free_memory(GPU) == pytest.approx(0.85 * 2**30)


@pytest.mark.parametrize(
    ("most", "pins", "expected"), [(2**10, True, True), (2**10 - 1, True, False), (2**20, False, False)]
)
def test_swapped_blocks_without_pinned_memory(
    most: int, pins: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 bytes take 1 KiB of pinned memory; past the limit, or if the system refuses, they go to pageable memory."""
    pinned: list[bool] = []
    empty = torch.empty

    def allocate(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        if pin_memory and not pins:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **options)

    contents = torch.arange(600) % 251
    contents = contents.to(torch.uint8)
    monkeypatch.setattr(torch, "empty", allocate)
    kept = cache.to_host(contents, most)
    assert torch.equal(kept, contents)
    assert (kept is not contents) == expected  # a CPU tensor is its own copy in pageable memory
    assert pinned == [True] * (expected or not pins)


@pytest.mark.parametrize(
    ("dtype", "capability", "need"),
    [
        (torch.float8_e4m3fn, (8, 0), "a torch.float8_e4m3fn cache needs .* 8.9"),
        (torch.float8_e4m3fn, (8, 6), "a torch.float8_e4m3fn cache needs .* 8.9"),
        (None, (7, 5), "kernels need .* 8.0"),
    ],
)
def test_a_cache_on_an_older_gpu(
    dtype: torch.dtype | None, capability: tuple[int, int], need: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused when the engine is created, not by the operator in its first step."""
    monkeypatch.setattr(GPT2, "device", GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    got = ".".join(map(str, capability))
    with pytest.raises(ValueError, match=f"^Engine: {need} or later, got {got}$"):
        Engine(GPT2(tiny_config()), cache_dtype=dtype)
