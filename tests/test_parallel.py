"""Processes over gloo compute what one does: data parallel, sharded, tensor parallel; they run parallel_child.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoints import random_checkpoint, tiny_config
from conftest import ROOT

from gpt2 import PRESETS, cli, parallel

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


@pytest.mark.parametrize("count", [2, 3])
def test_processes_compute_what_one_does(count: int, tmp_path: Path) -> None:
    """Two processes compare everything; three check what two could not show, the order in which they add."""
    folder = random_checkpoint(tmp_path, tiny_config(), tokenizer=True)
    (folder / "words.txt").write_text("a few words of no account " * 30)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join(str(ROOT / name) for name in ("kernels", ".", "tests"))
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    common = {**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "parallel_child.py"), str(folder)],
            env={**common, "WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [child.communicate(timeout=240)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * count, "\n\n".join(errors)
    assert f"{count} x cpu" in errors[0] and "gpt2 train" not in "".join(errors[1:])  # one process speaks for all


def test_processes_that_do_not_divide_the_batch_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they try to connect: here there are no others."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    (tmp_path / "words.txt").write_text("words")
    with pytest.raises(SystemExit) as e:
        cli.main(["train", "--data", str(tmp_path / "words.txt"), "--out", str(tmp_path / "run"), "--batch-size", "8"])
    assert e.value.code == 2
    assert capsys.readouterr().err == "gpt2 train: batch_size must be a multiple of the 3 processes, got 8\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("processes", "fits"), [(1, True), (2, True), (4, True), (5, True), (7, True), (8, False), (26, False)]
)
def test_how_25_heads_can_be_split(processes: int, fits: bool) -> None:
    """gpt2-xl's heads: over any number of processes that leaves none without one. DTensor splits by torch.chunk."""
    assert PRESETS["gpt2-xl"].n_head == 25
    assert (len(torch.arange(25).chunk(processes)) == processes) == fits
    if fits:
        parallel.check_heads(25, processes)
    else:
        with pytest.raises(
            ValueError, match=f"25 heads in parts of .*, got {processes} processes .*1, 2, 3, 4, 5, 7, 9"
        ):
            parallel.check_heads(25, processes)
