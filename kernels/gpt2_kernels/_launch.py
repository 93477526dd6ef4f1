"""How kernels are launched: `launch`, Triton's own launch in half the host time, and the counters of `tickets`."""

from __future__ import annotations

from typing import Any

import torch

from gpt2_kernels._runtime import HAS_TRITON, triton

if HAS_TRITON:
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    _triton_run = JITFunction.run  # replaced by tools that watch launches or turn them into compilations

# All that a launch depends on -> the kernel, and its compiled variant's launcher. Kernels are keyed by id, since
# Triton's own hash rehashes the source each time, and kept in the value, so that no other object can take that id.
_variants: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_GRID_REST = ((), (1, 1), (1,), ())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)` in half the host time: run-time arguments by position, constexprs by name.

    The first time, Triton itself chooses and compiles a variant; later launches equal in all that Triton looks at go
    directly to that compiled kernel, with the arguments themselves, so that Triton's launcher still checks them.
    Everything unusual goes through Triton every time: the interpreter, autotuned kernels, launch hooks (profilers),
    tools that replace JITFunction.run, a pointer that is not 16-byte aligned, an integer past 32 bits, and arguments of
    types other than Tensor, int, float and None.
    """
    if type(kernel) is not JITFunction or JITFunction.run is not _triton_run:
        kernel[grid](*args, **meta)
        return
    knobs, active = triton.knobs, driver.active
    runtime, device = knobs.runtime, active.get_current_device()
    plain = not (
        getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
        or kernel.pre_run_hooks
        or runtime.add_stages_inspection_hook
    )
    # One entry per argument, at least as fine-grained as Triton's own specialization (tests/test_launch.py compares).
    key: list[Any] = [id(kernel), active, device, runtime.debug, knobs.compilation.instrumentation_mode]
    addresses = 0
    for a in args:
        kind = type(a)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            addresses |= a.data_ptr()
            key.append(a.dtype)
        elif a is None or kind is float:
            key.append(kind)
        elif kind is int and -0x80000000 <= a <= 0x7FFFFFFF:
            key.append(2 if a == 1 else not a & 15)  # never a string: strings in the key begin with meta's names
        else:
            plain = False
    if not plain or addresses & 15:
        kernel[grid](*args, **meta)
        return
    variant = _variants.get(found := (*key, *meta, *meta.values()))
    if variant is None:
        compiled = kernel[grid](*args, **meta)
        rest = kernel.params[len(args) :]
        if (
            isinstance(compiled, CompiledKernel)
            and compiled.metadata.target.backend == "cuda"
            and not kernel.used_global_vals  # Triton compares these at every launch
            and all(p.is_constexpr and p.name in meta for p in rest)
        ):
            constants = tuple(meta[p.name] for p in rest)  # Triton's launcher counts them as arguments
            _variants[found] = kernel, compiled.run, compiled.function, compiled.packed_metadata, constants
        return
    _, run, function, packed, constants = variant
    stream = active.get_current_stream(device)
    run(*grid, *_GRID_REST[len(grid)], stream, function, packed, None, None, None, *args, *constants)


_tickets: dict[tuple[int, int, int], torch.Tensor] = {}


def tickets(number: int, device: torch.device) -> torch.Tensor:
    """At least `number` int32 zeros, as counters between a kernel's programs; the kernel leaves them zero for the next.

    Launches on one stream run in order and share them. A CUDA graph captures their address, so they are never freed,
    and two graphs captured on one stream must not be replayed concurrently. Counters that a stream first uses during
    capture are zeroed in the graph, at each replay: warm up on the capturing stream to save those launches.
    """
    if device.type != "cuda":
        return torch.zeros(number, dtype=torch.int32, device=device)  # fresh: a failed kernel may leave nonzeros
    size = max(4096, 1 << (number - 1).bit_length())  # graphs' buffers stay when a larger one is needed
    key = device.index, driver.active.get_current_stream(device.index), size
    found = _tickets.get(key)
    if found is None:
        found = torch.zeros(size, dtype=torch.int32, device=device)
        if not torch.cuda.is_current_stream_capturing() and not _in_private_pool(found):
            _tickets[key] = found
    return found


def _in_private_pool(tensor: torch.Tensor) -> bool:
    """Whether its memory is in the private pool of a CUDA graph, freed with that graph, or of torch.compile.

    Allocators other than PyTorch's own, such as cudaMallocAsync, raise when asked: then it is assumed to be.
    """
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:
        return True
    address = tensor.data_ptr()
    return any(
        segment["segment_pool_id"] != (0, 0) and 0 <= address - segment["address"] < segment["total_size"]
        for segment in segments
    )
