"""`python -m gpt2_kernels.env_report`: what a report of a bug should begin with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

import gpt2_kernels
from gpt2_kernels import _native, _operator, _runtime

OTHERS = ("transformers", "flash-attn", "tiktoken", "safetensors", "numpy")


def report() -> str:
    """Versions, devices, cache folders, and what computes each operator here, as text."""
    lines = [
        f"gpt2-kernels   {gpt2_kernels.__version__} in {Path(gpt2_kernels.__file__).parent}",
        f"Python         {platform.python_version()} ({sys.executable}), {platform.platform()}",
        f"torch          {torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        f"triton         {_runtime.triton.__version__ if _runtime.HAS_TRITON else 'not installed'}"
        + (", in interpreter mode: kernels run on the CPU" if _runtime.interpreting() else ""),
    ]
    for name in OTHERS:
        try:
            lines.append(f"{name:14} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name:14} not installed")
    threads, kind = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    lines.append(f"CPU            {os.cpu_count()} logical, {threads} threads in torch, {kind}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            capability = f"sm_{properties.major}{properties.minor}"
            lines.append(
                f"cuda:{index}         {properties.name}, {capability}, {memory:.0f} GiB, "
                f"{properties.multi_processor_count} multiprocessors"
            )
            if refusal := gpt2_kernels.gpu_refusal(torch.device("cuda", index)):
                lines.append(f"               refused: {refusal}")
    else:
        lines.append("GPU            none that CUDA offers: everything runs on the CPU")
    lines.append(f"C++ operators  {_native.status()}")
    if _runtime.HAS_TRITON:
        lines.append(f"Triton's cache {_runtime.triton.knobs.cache.dir}")
    settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("TRITON_", "TORCHINDUCTOR_", "CUDA_"))}
    lines.append(f"environment    {', '.join(f'{k}={v}' for k, v in settings.items()) or 'nothing set'}")
    width = max(map(len, _operator.OPS))
    for op in sorted(_operator.OPS):
        paths = ", ".join(f"{device}: {_operator.path_of(op, device)}" for device in devices)
        lines.append(f"  {op:{width}}  {paths}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
