"""append_kv_: what was written, and that nothing else was."""

from __future__ import annotations

import pytest
import torch
from tolerance import DTYPES
from torch import Tensor
from torch.library import opcheck

import gpt2_kernels as ops


def empty_cache(device: torch.device, dtype: torch.dtype, blocks: int, size: int, H: int, D: int) -> Tensor:
    """As the engine lays it out: a head's rows of a block side by side in memory."""
    return torch.full((blocks, H, size, D), 7.0, dtype=dtype, device=device).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 8, 16, 33])
def test_writes_the_slots_and_nothing_else(path: torch.device, size: int, dtype: torch.dtype) -> None:
    blocks, H, D, N = 5, 3, 20, 4
    k_cache, v_cache = (empty_cache(path, dtype, blocks, size, H, D) for _ in range(2))
    k, v = torch.randn(N, 3, H, D, device=path).to(dtype).unbind(1)[1:]  # as GPT-2's projection gives them
    slots = torch.randperm(blocks * size)[:N].to(path)
    slots[1] = -1  # skipped
    ops.append_kv_(k, v, k_cache, v_cache, slots)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        flat = cache.reshape(blocks * size, H, D)
        for n, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert torch.equal(flat[slot], rows[n])
        others = torch.ones(blocks * size, dtype=torch.bool)
        others[[s for s in slots.tolist() if s >= 0]] = False
        assert (flat[others.to(path)] == 7.0).all()


def test_no_tokens(path: torch.device) -> None:
    cache = empty_cache(path, torch.float32, 2, 4, 1, 16)
    ops.append_kv_(cache[:0, 0], cache[:0, 0], cache, cache, torch.empty(0, dtype=torch.int64, device=path))


def test_opcheck(path: torch.device) -> None:
    cache = torch.zeros(3, 4, 2, 8, device=path)
    k = torch.randn(2, 2, 8, device=path)
    slots = torch.tensor([5, -1], device=path)
    opcheck(torch.ops.gpt2_kernels.append_kv_.default, (k, k.clone(), cache, cache.clone(), slots))


def test_bad_input(path: torch.device) -> None:
    cache = torch.zeros(3, 4, 2, 8, device=path)
    k = torch.randn(2, 2, 8, device=path)
    slots = torch.tensor([5, 6], device=path)
    for arguments, message in [
        ((k[0], k, cache, cache, slots), r"append_kv_: k must be \(N, Hkv, D\), got \(2, 8\)"),
        ((k, k[:1], cache, cache, slots), r"append_kv_: v must be \(N, Hkv, D\) = \(2, 2, 8\), got \(1, 2, 8\)"),
        ((k, k, cache[..., :4], cache, slots), r"append_kv_: k_cache must be"),
        ((k, k, cache, cache.half(), slots), r"append_kv_: v_cache must have the dtype of k"),
        ((k, k, cache, cache, slots.int()), r"append_kv_: slots must be torch.int64, got torch.int32"),
        ((k, k, cache, cache, slots[:1]), r"append_kv_: slots must be \(N,\) = \(2,\), got \(1,\)"),
        (
            (k, k, torch.zeros(3, 4, 8, 2, device=path).transpose(2, 3), cache, slots),
            r"append_kv_: last axis of k_cache must be dense",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.append_kv_(*arguments)


@pytest.mark.parametrize("slot", [12, -2])
def test_slot_outside_the_cache(path: torch.device, slot: int) -> None:
    if path.type == "cuda":
        pytest.skip("a device assertion would end the CUDA context")
    if slot < 0 and ops.path_of("append_kv_", "cpu").startswith("Triton"):
        pytest.skip("the kernel skips every negative slot")
    cache = torch.zeros(3, 4, 2, 8)
    k = torch.randn(1, 2, 8)
    with pytest.raises(Exception, match=r"append_kv_: slot"):
        ops.append_kv_(k, k, cache, cache.clone(), torch.tensor([slot]))
    assert not cache.any()
