"""Checkpoints: written atomically, the newest good one is found, old ones are deleted and the best stays."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2 import checkpoint


def make(folder: Path, step: int, loss: float | None = None) -> Path:
    def write(path: Path) -> None:
        (path / "a.bin").write_bytes(bytes([step]) * 1000)
        (path / "b.bin").write_bytes(b"b" * 10)

    return checkpoint.save(folder, step, write, {"val_loss": loss, "recipe": {}, "config": {}, "processes": 1})


def test_the_newest_is_found_with_its_state(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none", pytest.fail) is None
    make(tmp_path, 9)
    path = make(tmp_path, 10, 1.5)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None and found[0] == path
    assert found[1]["step"] == 10 and found[1]["val_loss"] == 1.5


# Complete JSON, or no JSON at all.
STATES: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "a state that is a list": lambda state: b"[]",
    "a state of nothing but a step": lambda state: b'{"step": 2, "sha256": {}}',
    "a state without digests": lambda state: json.dumps({**state, "sha256": {}}).encode(),
    "a state with a list of digests": lambda state: json.dumps({**state, "sha256": []}).encode(),
    "a state whose loss is a text": lambda state: json.dumps({**state, "val_loss": "low"}).encode(),
    "a state that is too deep": lambda state: b"[" * 100_000,
    "a state that is not UTF-8": lambda state: b"\xff",
}


@pytest.mark.parametrize("damage", ["cut short", "a changed byte", "missing", "no state", "half a state", *STATES])
def test_a_damaged_one_is_named_and_the_one_before_it_used(tmp_path: Path, damage: str) -> None:
    good, bad = make(tmp_path, 1, 2.0), make(tmp_path, 2, 1.0)
    content = (bad / "a.bin").read_bytes()
    if damage == "cut short":
        (bad / "a.bin").write_bytes(content[:-1])
    elif damage == "a changed byte":
        (bad / "a.bin").write_bytes(content[:500] + b"x" + content[501:])
    elif damage == "missing":
        (bad / "a.bin").unlink()
    elif damage == "no state":
        (bad / "state.json").unlink()
    elif damage == "half a state":
        (bad / "state.json").write_text((bad / "state.json").read_text()[:20])
    else:
        (bad / "state.json").write_bytes(STATES[damage](json.loads((bad / "state.json").read_text())))
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found[0] == good
    assert checkpoint.best_step(tmp_path) == ((good.name, 2.0) if "state" in damage else (bad.name, 1.0))
    assert len(said) == 1 and str(bad) in said[0] and said[0].endswith("the checkpoint before it is used")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("failed writing file")])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, error: Exception) -> None:
    good = make(tmp_path, 1)

    def write(path: Path) -> None:
        (path / "a.bin").write_bytes(b"half")
        raise error

    with pytest.raises(OSError, match=f"the checkpoint of step 2 could not be written .*; the last good .* is {good}"):
        checkpoint.save(tmp_path, 2, write, {})
    assert [p.name for p in tmp_path.iterdir()] == [good.name]


def test_a_write_that_was_killed_leaves_no_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 1)
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        checkpoint.save(tmp_path, 2, lambda path: ((path / "a.bin").write_bytes(b"half"), os.kill(os.getpid(), 9)), {})
    assert checkpoint.steps(tmp_path) == ["step-00000001"]
    make(tmp_path, 2)  # over what was left
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None and found[1]["step"] == 2


def test_old_ones_go_and_the_best_stays(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        make(tmp_path, step, loss)
    (tmp_path / ".draft-00000006").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert checkpoint.steps(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    assert checkpoint.best_step(tmp_path) == ("step-00000002", 1.0)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_checkpoint_is_made_again_in_its_place(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    (path / "a.bin").write_bytes(b"damaged")
    make(tmp_path, 1)
    assert checkpoint.newest(tmp_path, pytest.fail) is not None


def test_torch_reports_a_full_disk_as_a_runtime_error(tmp_path: Path) -> None:
    """Why `checkpoint.save` treats a RuntimeError as a full disk."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises((RuntimeError, OSError)):
        torch.save({"x": torch.zeros(1000)}, "/dev/full")
