"""How the suite runs, which the header of a run reports.

With a GPU, kernel tests run on it. Without one they run in Triton's interpreter, repaired (interpreter.py) and
watched by a memory and race sanitizer (sanitizer.py). Each kernel test also runs on the CPU path: the compiled C++
operators and PyTorch. Tests of the model and the engine take the machine's production path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # data too large for the repository; tests that need it skip without it

if not GPU:
    if "triton" in sys.modules:
        raise RuntimeError(
            "triton was imported before TRITON_INTERPRET=1 could be set: its functions stay compiled ones"
        )
    os.environ["TRITON_INTERPRET"] = "1"
if (SHARED / "tiktoken-cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken-cache"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may access the network

from gpt2_kernels import _native, _runtime  # noqa: E402

if not GPU and _runtime.HAS_TRITON:
    import interpreter
    import sanitizer

    interpreter.install()
    _runtime.interpreter_has_bfloat16 = True

torch.set_num_threads(1)  # tensors are tiny here: more threads would only wait for each other


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="FOLDER", help="where test_explorer.py keeps its pictures of the page")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The workers of `-n auto`; each takes half a gigabyte, and on a GPU compiles its own kernels."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def pytest_report_header() -> list[str]:
    import triton

    import gpt2
    import gpt2_kernels

    if GPU:
        tier = f"kernels on {torch.cuda.get_device_name()}"
    else:
        tier = (
            "no GPU: kernels in Triton's interpreter, repaired and sanitized; compiled offline for sm_80, sm_90, sm_100"
        )
    return [
        f"tier: {tier}",
        f"torch {torch.__version__}, triton {triton.__version__}",
        f"gpt2_kernels: {Path(gpt2_kernels.__file__).parent}",
        f"gpt2: {Path(gpt2.__file__).parent}",
        f"C++ operators: {'loaded' if _native.load() else 'NOT LOADED'} ({_native.status()})",
    ]


@pytest.fixture(params=["triton", "cpu"])
def path(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Runs a kernel test twice: on the Triton kernel and on the CPU path. Yields the device for its tensors."""
    torch.manual_seed(0)
    if request.param == "cpu":
        with _runtime.force("native" if _native.load() else "torch"):
            yield torch.device("cpu")
    elif GPU:
        yield torch.device("cuda")
    else:
        with sanitizer.sanitize(), _runtime.force("triton"):
            yield torch.device("cpu")


@pytest.fixture
def production() -> Iterator[torch.device]:
    """What a user of this machine gets: the GPU, or the CPU path without the interpreter."""
    torch.manual_seed(0)
    if GPU:
        yield torch.device("cuda")
    else:
        with _runtime.force("native" if _native.load() else "torch"):
            yield torch.device("cpu")


@pytest.fixture
def ops() -> Iterator[Any]:
    """The compiled operators themselves; instruction set and thread count are restored afterwards."""
    if not _native.load():
        pytest.skip(_native.status())
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield _native.ops()
    torch.set_num_threads(threads)
    _native.ops().simd_level(_runtime.ALL_INSTRUCTIONS)
