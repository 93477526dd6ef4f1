"""append_kv_: what was written, and that nothing else was."""

from __future__ import annotations

import pytest
import torch
from tolerance import DTYPES
from torch import Tensor
from torch.library import opcheck

import gpt2_kernels as ops


def empty_cache(device: torch.device, dtype: torch.dtype, blocks: int, size: int, H: int, D: int) -> Tensor:
    """As the engine lays it out: a head's rows in a block are adjacent in memory."""
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8(path: torch.device, dtype: torch.dtype) -> None:
    """x / scale rounds to the nearest float8, ties to even; it saturates at +-448; NaN stays NaN."""
    scale = torch.tensor([1.0, 0.125, 3.0], device=path)
    edges = [
        0.0,
        448.0,
        449.0,
        1e4,
        -1e4,
        torch.inf,
        torch.nan,
        2.0**-9,
        2.0**-10,
        3 * 2.0**-11,
        17.0,
        19.0,
        18.0,
        -21.0,
    ]
    k = torch.tensor(edges, device=path).to(dtype).expand(2, 3, -1)
    v = 3 * torch.randn(2, 3, len(edges), device=path).to(dtype)
    k_cache, v_cache = (torch.zeros(2, 4, 3, len(edges), device=path).to(torch.float8_e4m3fn) for _ in range(2))
    ops.append_kv_(k, v, k_cache, v_cache, torch.tensor([6, -1], device=path), k_scale=scale, v_scale=scale)
    assert k_cache[1, 2, 0].float().tolist()[:6] == [0, 448, 448, 448, -448, 448]
    assert k_cache[1, 2, 0, 6].isnan() and k_cache[1, 2, 0, 10:].float().tolist() == [16, 20, 18, -20]
    assert k_cache[1, 2, 0, 7:10].float().tolist() == [2.0**-9, 0, 2.0**-9], "subnormal: 1/2 goes to even, 3/4 up"
    numbers = torch.arange(-128, 128, device=path).to(torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()]
    exact = (v[0].double() / scale.double()[:, None])[..., None]
    nearest = (numbers - exact).abs().amin(-1)
    assert torch.equal(
        (v_cache[1, 2].double() - exact[..., 0]).abs() <= nearest * (1 + 1e-6),
        torch.ones_like(nearest, dtype=torch.bool),
    )
    assert k_cache.float().nan_to_num().count_nonzero() == k_cache[1, 2].float().nan_to_num().count_nonzero()


def test_a_block_beyond_two_to_the_31_elements(path: torch.device) -> None:
    """Blocks of a pool of 139 GiB; the memory between is not touched."""
    if path.type == "cuda" and torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    stride = 2**31 + 16
    caches = [
        torch.empty(2 * stride + 8 * 16, dtype=torch.float16, device=path).as_strided(
            (3, 8, 1, 16), (stride, 16, 16, 1)
        )
        for _ in range(2)
    ]
    k, v = torch.randn(2, 3, 1, 16, device=path).to(torch.float16)
    for cache in caches:
        cache.zero_()
    ops.append_kv_(k, v, *caches, torch.tensor([3, 15, 16], device=path))
    for cache, rows in zip(caches, (k, v)):
        assert torch.equal(torch.stack([cache[0, 3], cache[1, 7], cache[2, 0]]), rows)
        assert cache.count_nonzero() == rows.count_nonzero()


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
