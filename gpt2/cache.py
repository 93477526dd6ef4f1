"""The paged key-value cache: its size, its tensors, and moving blocks between them and host memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import gpt2_kernels as ops
from gpt2.model import GPT2, LayerCache, PagedBatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FLOAT8 = torch.float8_e4m3fn
CALIBRATION_TOKENS = 256
HEADROOM = 2.0  # largest value an fp8 cache can hold, relative to the largest one seen in calibration


class PagedCache:
    """Keys and values of all layers in num_blocks blocks of block_size tokens.

    dtype is the model's, or float8_e4m3fn with a scale for each head of each layer: half the bytes of bfloat16.
    num_blocks=None takes as many as fit in free memory, but no more than max_batch texts of full length fill. If
    processes share the model, the one with room for the fewest blocks decides.
    """

    def __init__(
        self, model: GPT2, *, num_blocks: int | None, block_size: int, max_batch: int, dtype: torch.dtype | None
    ) -> None:
        config = model.config
        dtype = dtype or model.dtype
        if dtype not in (model.dtype, FLOAT8):
            raise ValueError(f"Engine: cache_dtype must be {model.dtype} or {FLOAT8}, got {dtype}")
        on_gpu = model.device.type == "cuda"
        if on_gpu and (refusal := ops.gpu_refusal(model.device, dtype)):
            raise ValueError(f"Engine: {refusal}")
        bytes_a_block = block_bytes(model, block_size, dtype)
        if num_blocks is None:
            most = max_batch * -(-config.n_positions // block_size)
            room = int(_free_memory(model.device)) // bytes_a_block
            num_blocks = max(1, min(most, agree(model, room)))
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.bytes = num_blocks * bytes_a_block
        scales = _calibrate(model) if dtype == FLOAT8 else [(None, None)] * config.n_layer
        # A head's rows in a block are contiguous. Not initialised: a slot is written before it is read, and untouched
        # pages cost a CPU no memory.
        shape = (config.n_layer, 2, num_blocks, model.cache_heads, block_size, config.head_dim)
        storage = torch.empty(shape, dtype=dtype, device=model.device)
        self._bytes = storage.view(torch.uint8)  # for moving contents, whatever their type
        # Memory once pinned stays pinned, which leaves that much less for every program on the machine.
        self._most_pinned = int(_free_memory(torch.device("cpu"))) if on_gpu else 0
        self.layers = [
            LayerCache(kv[0].transpose(1, 2), kv[1].transpose(1, 2), *of_layer) for kv, of_layer in zip(storage, scales)
        ]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks: (from, to)."""
        source, target = self._indices([list(p) for p in zip(*pairs)])
        self._bytes.index_copy_(2, target, self._bytes.index_select(2, source))

    def save(self, blocks: list[int], held: Iterable[Tensor]) -> Tensor:
        """A copy of blocks in host memory, complete once the device gets there; `held`: earlier copies still kept.

        It is copied asynchronously to pinned memory as long as there is enough; beyond that, the host waits for a copy
        to pageable memory.
        """
        found = self._bytes.index_select(2, self._indices(blocks))
        if found.device.type == "cpu":
            return found
        pinned = sum(_pinned_bytes(contents) for contents in held if contents.is_pinned())
        return to_host(found, self._most_pinned - pinned)

    def restore(self, blocks: list[int], contents: Tensor, first: int) -> None:
        """Fill blocks with what `save` returned, from index `first` on."""
        blocks = blocks[first : contents.shape[2]]
        if blocks:
            there = contents.to(self._bytes.device, non_blocking=True)  # whole: only dense memory copies without a wait
            self._bytes.index_copy_(2, self._indices(blocks), there[:, :, first:])

    def _indices(self, values: list) -> Tensor:
        return upload(values, torch.int64, self._bytes.device)


def to_host(tensor: Tensor, most_pinned: int) -> Tensor:
    """A copy in pinned memory, complete once the device gets there, or in pageable memory, complete on return.

    Pageable if it would take more than most_pinned bytes, or if the system pins no more.
    """
    if _pinned_bytes(tensor) <= most_pinned:
        try:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError:
            pass
        else:
            return kept.copy_(tensor, non_blocking=True)
    return tensor.cpu()


def _pinned_bytes(tensor: Tensor) -> int:
    """Bytes of pinned memory that PyTorch takes for such a tensor: a power of two."""
    return 1 << (tensor.nbytes - 1).bit_length()


def agree(model: GPT2, value: int) -> int:
    """The least of the values given by the processes that share the model, the same in all of them."""
    if model.cache_heads == model.config.n_head:
        return value  # nobody shares it

    from gpt2 import parallel  # which imports all of torch.distributed

    return parallel.least(model, value)


def block_bytes(model: GPT2, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of a block: keys and values of all layers."""
    return 2 * model.config.n_layer * model.cache_heads * model.config.head_dim * block_size * dtype.itemsize


def upload(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on the device; on a GPU through pinned memory, so that the host does not wait."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def _calibrate(model: GPT2) -> list[tuple[Tensor, Tensor]]:
    """Scales (H,) float32 of each layer's keys and values, which depend on the weights alone.

    They come from the largest values over one text of random tokens, the same for every model with this vocabulary.
    """
    config = model.config
    length = min(CALIBRATION_TOKENS, config.n_positions)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (length,), generator=generator).to(model.device)
    places = torch.arange(length, device=model.device)
    shape = (1, length, model.cache_heads, config.head_dim)
    cache = [
        LayerCache(*torch.empty((2, *shape), dtype=model.dtype, device=model.device)) for _ in range(config.n_layer)
    ]
    lengths = torch.tensor([length], dtype=torch.int32, device=model.device)
    batch = PagedBatch(
        tokens=tokens,
        positions=places,
        slots=places,
        block_table=torch.zeros((1, 1), dtype=torch.int32, device=model.device),
        context_lens=lengths,
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32, device=model.device),
        max_seqlen=max(length, 2),
    )
    model.forward_paged(batch, cache)
    largest = torch.finfo(FLOAT8).max

    def scale(values: Tensor) -> Tensor:
        return (values.float().abs().amax(dim=(0, 1, 3)) * (HEADROOM / largest)).clamp_min(torch.finfo(FLOAT8).tiny)

    return [(scale(layer.keys), scale(layer.values)) for layer in cache]


def _free_memory(device: torch.device) -> float:
    """Bytes that the cache may take: most of what a GPU has free, or a third of what the host has."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch holds for freed tensors, an earlier engine's say, is free too
        return 0.85 * torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = (
            8 * 2**30 if not hasattr(os, "sysconf") else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        )
    return available / 3
