"""Where the time of a command goes: `with profile(path):` writes a Chrome trace of what runs inside.

Every operator of `gpt2_kernels` appears as a range of its own name (`gpt2_kernels::linear`): it is called through
PyTorch's dispatcher, which the profiler watches while it runs, so nothing is paid when nothing is profiled. On a GPU
the kernels that it launched appear below it. A decoding step replayed as a CUDA graph bypasses the dispatcher: it is
one launch, with all its kernels below; `Engine(model, cuda_graphs=False)` shows the ranges. A CPU that computes a layer
in one call shows one range for it, `gpt2_kernels_cpu::paged_layer_`. Open the file at https://ui.perfetto.dev or
chrome://tracing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def profile(path: str | os.PathLike[str] | None) -> contextlib.AbstractContextManager[None]:
    """A context that profiles its block and writes `path` (.json, or .json.gz, compressed); None does nothing.

    The trace is written however the block ends, Ctrl-C included. It holds every call: profile a short job. Raises
    ValueError at once, not when the block ends, if the file could not be written.
    """
    if path is None:
        return contextlib.nullcontext()
    target = Path(path)
    if not target.name.endswith((".json", ".json.gz")):
        raise ValueError(f"profile: the file must end in .json or .json.gz, got {str(path)!r}")
    if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ValueError(f"profile: the file must be one that can be written, got {str(path)!r}")
    return _record(target)


@contextlib.contextmanager
def _record(target: Path) -> Iterator[None]:
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    profiler.start()
    try:
        yield
    finally:
        _wait_for_gpus()  # what was launched inside belongs in the trace
        profiler.stop()
        profiler.export_chrome_trace(str(target))


def _wait_for_gpus() -> None:
    """Wait for every GPU on which this process holds memory; the current one need not be among them."""
    import torch

    for index in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(index):
            torch.cuda.synchronize(index)
