"""Checkpoints that are either complete or absent.

    RUN/checkpoints/step-00000100/   a Hugging Face folder: config.json, model.safetensors (float32), tokenizer
        optimizer.pt                 optimizer and random state
        state.json                   step, validation loss, what the run was, SHA-256 of every other file

A folder is written beside its final place, synced to disk and renamed into it: a process or machine that dies leaves
the earlier checkpoints intact. Later damage by a file system is found by the digests, and the checkpoint before the
damaged one is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_STATE = "state.json"
_FORM: dict[str, type | tuple[type, ...]] = {  # of state.json, which no digest covers
    "step": int,
    "val_loss": (float, type(None)),
    "recipe": dict,
    "config": dict,
    "processes": int,
    "sha256": dict,
}


def save(folder: Path, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Make the checkpoint of `step`: `write` puts files into an empty folder, `state` goes beside them.

    Raises OSError, naming the newest checkpoint that is there, if they could not be written.
    """
    target, draft = folder / f"step-{step:08d}", folder / f".draft-{step:08d}"
    try:
        shutil.rmtree(draft, ignore_errors=True)  # what a killed process left
        draft.mkdir(parents=True)
        write(draft)
        files = sorted(path for path in draft.iterdir())
        digests = {path.name: _digest(path) for path in files}
        state = {"step": step, **state, "sha256": digests}
        (draft / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for path in (*files, draft / _STATE, draft):
            _sync(path)
        if target.exists():  # damaged, or from before the run began anew
            shutil.rmtree(target)
        draft.rename(target)
        _sync(folder)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as e:  # torch and safetensors raise their own errors for a full disk
        shutil.rmtree(draft, ignore_errors=True)
        why = f"the checkpoint of step {step} could not be written to {target} ({e})"
        raise OSError(f"{why}; {last_good(folder)}") from e
    return target


def steps(folder: Path) -> list[str]:
    """Names of the checkpoints in `folder`, oldest first."""
    return sorted(p.name for p in folder.glob("step-*") if p.is_dir()) if folder.is_dir() else []


def last_good(folder: Path) -> str:
    """A clause for error messages: where a run can resume from."""
    last = steps(folder)
    return f"the last good checkpoint is {folder / last[-1]}" if last else "there is no checkpoint yet"


def newest(folder: Path, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint, and its state; `report` is told of each damaged one."""
    for name in reversed(steps(folder)):
        try:
            return folder / name, _verified(folder / name)
        except ValueError as e:
            report(f"{e}: the checkpoint before it is used")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` newest and the best, and the drafts of interrupted writes."""
    names = steps(folder)
    best = best_step(folder)
    for name in names[:-keep]:
        if best is None or name != best[0]:
            shutil.rmtree(folder / name)
    for draft in folder.glob(".draft-*"):
        shutil.rmtree(draft)


def best_step(folder: Path) -> tuple[str, float] | None:
    """Name and validation loss of the checkpoint with the lowest loss; None if none was validated."""
    losses = []
    for name in steps(folder):
        with contextlib.suppress(ValueError):
            loss = _state(folder / name)["val_loss"]
            if loss is not None:
                losses.append((loss, name))
    return (min(losses)[1], min(losses)[0]) if losses else None


def _state(path: Path) -> dict[str, Any]:
    """The state that `save` wrote beside the files of a checkpoint. Raises ValueError if it is damaged."""
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if all(isinstance(state[key], kind) for key, kind in _FORM.items()) and state["sha256"]:
            return state
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged ({_STATE} cannot be read)")


def _verified(path: Path) -> dict[str, Any]:
    state = _state(path)
    for name, digest in state["sha256"].items():
        if not (path / name).is_file():
            raise ValueError(f"{path} is damaged ({name} is missing)")
        if _digest(path / name) != digest:
            raise ValueError(f"{path} is damaged ({name} is cut short or changed)")
    return state


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
