"""gpt2.profiling: a Chrome trace with a range for each operator, and nothing when it is off."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from checkpoints import random_checkpoint, tiny_config
from test_cli import process

import gpt2_kernels as kernels
from gpt2.profiling import profile

pytestmark = pytest.mark.usefixtures("production")


def names(path: Path) -> set[str]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return {event["name"] for event in json.loads(content)["traceEvents"]}


def test_operators_are_ranges_of_their_own_name(tmp_path: Path) -> None:
    """In the command, whose text is the same with profiling and without."""
    folder = random_checkpoint(tmp_path / "model", tiny_config(), tokenizer=True)
    command = ("generate", "a story", "--model", str(folder), "--seed", "3", "--max-tokens", "4")
    done = process(*command, "--profile", str(tmp_path / "trace.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == process(*command).stdout
    layer = {"gpt2_kernels_cpu::paged_layer_"}
    if not kernels.has_paged_layer(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")):
        layer = {f"gpt2_kernels::{op}" for op in ("append_kv_", "paged_attention")}
    wanted = {f"gpt2_kernels::{op}" for op in ("layer_norm", "linear", "sample")}
    assert wanted | layer <= names(tmp_path / "trace.json")


def test_the_trace_is_written_when_the_block_fails(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json.gz"
    with pytest.raises(KeyboardInterrupt), profile(trace):
        kernels.layer_norm(torch.randn(2, 8), torch.ones(8))
        raise KeyboardInterrupt
    assert "gpt2_kernels::layer_norm" in names(trace)


def test_the_gpus_in_use_are_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--device cuda:1` leaves cuda:0 the current one."""
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 2**20 * (index == 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: waited.extend(device or [0]))
    with profile(tmp_path / "trace.json"):
        pass
    assert 1 in waited and 2 not in waited  # PyTorch's profiler may wait for the current one too


@pytest.mark.parametrize("name", ["trace.txt", "missing/trace.json", "folder.json"])
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match="profile: the file must .*, got "):
        profile(tmp_path / name)


def test_none_profiles_nothing() -> None:
    with profile(None):
        assert not torch.autograd.profiler._is_profiler_enabled
