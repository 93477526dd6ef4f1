"""Several processes, with PyTorch's own machinery: data parallel, sharded data parallel, tensor parallel.

    torchrun --nproc-per-node 8 -m gpt2 train ...                     DDP: whole weights everywhere, gradients averaged
    torchrun --nproc-per-node 8 -m gpt2 train ... --parallel fsdp     FSDP2: each process keeps a shard of everything

`tensor_parallel` is for generation with a model too large or too slow for one GPU: each process keeps some heads and
some columns of each MLP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

import gpt2_kernels as ops
from gpt2.device import device_of
from gpt2.layer import MLP, PROMPT, Attend, Block, Products, SelfAttention
from gpt2.model import GPT2

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run, and which one this is."""

    rank: int
    size: int
    device: torch.device

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns in process 0, in all; a ValueError or OSError is raised in all, so that none hangs."""
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = work()
            except (ValueError, OSError) as e:
                answer[1] = (OSError if isinstance(e, OSError) else ValueError, str(e))
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            kind, message = answer[1]
            raise kind(message)
        return answer[0]

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def world(device: str | None) -> Iterator[World]:
    """The processes that torchrun started, or this one alone. NCCL between GPUs, gloo between CPUs."""
    size, rank = processes(), int(os.environ.get("RANK", "0"))
    found = device_of(device, "--device")
    if found.type == "cuda":
        if found.index is None:
            found = device_of(f"cuda:{os.environ.get('LOCAL_RANK', '0')}", "--device")
        torch.cuda.set_device(found)
    if size == 1:
        yield World(0, 1, found)
        return
    # Process 0 may tokenise for hours while the others wait.
    backend = "nccl" if found.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    try:
        yield World(rank, size, found)
    finally:
        dist.destroy_process_group()


def shard(model: GPT2, world: World, dtype: torch.dtype) -> None:
    """FSDP2 in place: a block's weights are gathered in `dtype` while it computes; gradients are summed in float32."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "loss")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, of which each process may hold a shard. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a full tensor, divided and placed like `like`."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def tensor_parallel(model: GPT2, mesh: DeviceMesh) -> GPT2:
    """Split the blocks of `model` over the processes of a mesh, in place; all of them must then call its methods.

    Each process keeps some whole heads and some columns of the MLP; the partial results are summed over the processes
    once for attention and once for the MLP. Embeddings and norms are replicated. If the number of heads (25 in gpt2-xl)
    is not a multiple of the processes, the last ones keep fewer: 13 and 12 on two. Each needs at least one.

    For generation only: the model has no gradients afterwards. Raises ValueError if a process would get no head.
    """
    check_heads(model.config.n_head, mesh.size())
    model.requires_grad_(False)
    parallelize_module(model, mesh, {"h.*.attn": _Heads(), "h.*.mlp": _Columns()})
    return model


def least(model: GPT2, value: int) -> int:
    """The least of the values that the processes of a split model give; each of them must call it."""
    block = model.h[0]
    assert isinstance(block, Block)
    weight = block.attn.c_attn.weight
    assert isinstance(weight, DTensor)
    smallest = torch.tensor(value, device=model.device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, weight.device_mesh.get_group())
    return int(smallest)


def check_heads(heads: int, parts: int) -> None:
    """Raises ValueError if some of `parts` processes would get none of `heads`."""
    largest = -(-heads // parts)  # torch.chunk's rule, which DTensor follows
    if -(-heads // largest) < parts:
        usable = sorted({-(-heads // n) for n in range(1, heads + 1)})
        raise ValueError(
            f"tensor_parallel: each process must get a head: {heads} heads in parts of {largest} are "
            f"{-(-heads // largest)} parts, got {parts} processes (it can be {', '.join(map(str, usable))})"
        )


class _Heads(ParallelStyle):
    """c_attn by its rows and c_proj by its columns, with the heads as a separate axis to split."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, SelfAttention)
        _, heads, width = module.heads
        attn, proj = module.c_attn, module.c_proj
        _split(attn, "weight", device_mesh, 1, (3, heads, width, attn.in_features))
        _split(attn, "bias", device_mesh, 1, (3, heads, width))
        _split(proj, "weight", device_mesh, 1, (proj.out_features, heads, width))
        module.heads = (3, _mine(attn.weight).shape[1], width)  # whose keys and values the engine keeps
        module.forward = functools.partial(_attend, module, device_mesh)  # type: ignore[method-assign]
        return module


class _Columns(ParallelStyle):
    """c_fc by its rows and c_proj by its columns."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, MLP)
        _split(module.c_fc, "weight", device_mesh, 0)
        _split(module.c_fc, "bias", device_mesh, 0)
        _split(module.c_proj, "weight", device_mesh, 1)
        module.forward = functools.partial(_feed, module, device_mesh)  # type: ignore[method-assign]
        return module


def _split(linear: nn.Module, name: str, mesh: DeviceMesh, axis: int, shape: tuple[int, ...] | None = None) -> None:
    tensor = getattr(linear, name).detach()
    tensor = tensor if shape is None else tensor.reshape(shape)
    parameter = nn.Parameter(distribute_tensor(tensor, mesh, [Shard(axis)]), requires_grad=False)
    linear.register_parameter(name, parameter)


def _attend(
    module: SelfAttention, mesh: DeviceMesh, x: Tensor, residual: Tensor, attend: Attend, products: Products = PROMPT
) -> Tensor:
    """`SelfAttention.forward` with this process's heads."""
    weight, bias = _mine(module.c_attn.weight), _mine(module.c_attn.bias)  # (3, h, D, C), (3, h, D)
    qkv = ops.linear(x, weight.flatten(0, 2), bias.flatten(), **products).unflatten(-1, weight.shape[:3])
    y = ops.linear(attend(qkv).flatten(-2), _mine(module.c_proj.weight).flatten(1), **products)
    return _added(y, mesh) + module.c_proj.bias + residual


def _feed(module: MLP, mesh: DeviceMesh, x: Tensor, residual: Tensor, products: Products = PROMPT) -> Tensor:
    """`MLP.forward` with this process's columns."""
    w1, b1, w2 = (_mine(p) for p in (module.c_fc.weight, module.c_fc.bias, module.c_proj.weight))
    hidden = ops.linear(x, w1, b1, activation="gelu_tanh" if module.approximate == "tanh" else "gelu", **products)
    return _added(ops.linear(hidden, w2, **products), mesh) + module.c_proj.bias + residual


def _mine(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _added(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over the processes, available in all of them, added in rank order.

    An all-reduce of three or more adds in an order that depends on where in the tensor an element lies, and so on the
    other rows of the batch.
    """
    first, *others = whole(DTensor.from_local(part.unsqueeze(0), mesh, [Shard(0)], run_check=False))
    total = first.float()  # rounded once, at the end
    for other in others:
        total = total + other
    return total.to(part.dtype)
