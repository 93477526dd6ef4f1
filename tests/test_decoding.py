"""advance_: each sequence's state after a token, against a Python loop over sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

import gpt2_kernels as ops

BLOCK_SIZE = 4
WIDTH = 5  # blocks per sequence
NAMES = (
    "drawn", "tokens", "positions", "slots", "context_lens", "limits", "ends", "block_table", "record", "count",
)  # fmt: skip


def state(S: int, device: torch.device, idle: float = 0.3) -> dict[str, Any]:
    """Sequences in the middle, at block boundaries, about to end in each of the two ways, and idle ones."""
    positions = torch.randint(0, WIDTH * BLOCK_SIZE - 2, (S,))
    arguments = {
        "drawn": torch.randint(0, 6, (S,)),
        "tokens": torch.randint(100, 200, (S,)),
        "positions": positions,
        "slots": torch.randint(0, 50, (S,)),
        "context_lens": torch.where(torch.rand(S) < idle, 0, positions + 1).int(),
        "limits": (positions + torch.randint(2, 6, (S,))).clamp_max(WIDTH * BLOCK_SIZE),
        "ends": torch.randint(-1, 6, (S,)),
        "block_table": torch.randint(0, 1000, (S, WIDTH + 2), dtype=torch.int32)[:, 1:-1],  # rows of a wider table
        "record": torch.full((3, S + 2), 77)[:, 1:-1],
        "count": torch.tensor([1]),
    }
    found = {name: tensor.to(device) for name, tensor in arguments.items()}
    for name in ("block_table", "record"):  # `to` makes copies dense
        wide = torch.full((found[name].shape[0], found[name].shape[1] + 2), 77, dtype=found[name].dtype, device=device)
        wide[:, 1:-1] = found[name]
        found[name] = wide[:, 1:-1]
    return {**found, "block_size": BLOCK_SIZE}


def expected(arguments: dict[str, Any]) -> dict[str, list]:
    after = {name: arguments[name].tolist() for name in NAMES}
    row = after["count"][0]
    for s in range(len(after["drawn"])):
        after["record"][row][s] = -1
        if after["context_lens"][s] == 0:
            after["slots"][s] = -1
            continue
        token = after["drawn"][s]
        after["record"][row][s] = after["tokens"][s] = token
        after["positions"][s] += 1
        length = after["positions"][s] + 1
        if token == after["ends"][s] or length >= after["limits"][s]:
            after["slots"][s], after["context_lens"][s] = -1, 0
        else:
            block, offset = divmod(after["positions"][s], BLOCK_SIZE)
            after["slots"][s] = after["block_table"][s][block] * BLOCK_SIZE + offset
            after["context_lens"][s] = length
    after["count"][0] += 1
    return after


@pytest.mark.parametrize("S", [1, 7, 256, 300])  # one; not a power of two; a full pass of the kernel; two passes
def test_state_moves_on_by_a_token(path: torch.device, S: int) -> None:
    arguments = state(S, path)
    truth = expected(arguments)
    ops.advance_(**arguments)
    for name in NAMES:
        assert arguments[name].tolist() == truth[name], name


def test_steps_follow_each_other_until_every_text_has_ended(path: torch.device) -> None:
    arguments = state(40, path, idle=0.0)
    arguments["count"].zero_()
    arguments["record"] = torch.zeros((8, 40), dtype=torch.int64, device=path)
    for _ in range(6):
        truth = expected(arguments)
        ops.advance_(**arguments)
        for name in NAMES:
            assert arguments[name].tolist() == truth[name], name
    assert not arguments["context_lens"].any() and (arguments["record"][5] == -1).all()


def test_opcheck(path: torch.device) -> None:
    opcheck(torch.ops.gpt2_kernels.advance_.default, tuple(state(5, path).values()))


@pytest.mark.parametrize(("name", "change", "message"), [
    ("tokens", lambda t: t[1:], r"advance_: tokens must be \(S,\) = \(6,\), got \(5,\)"),
    ("context_lens", lambda t: t.long(), "advance_: context_lens must be torch.int32, got torch.int64"),
    ("ends", lambda t: t.int(), "advance_: ends must be torch.int64, got torch.int32"),
    ("block_table", lambda t: t[0], r"advance_: block_table must be \(S, max_blocks\)"),
    ("block_table", lambda t: t[1:], r"advance_: block_table must be \(S, max_blocks\) = \(6, 5\), got \(5, 5\)"),
    ("record", lambda t: t[:, 1:], r"advance_: record must be \(steps, S\) = \(3, 6\), got \(3, 5\)"),
    ("count", lambda t: t[0], r"advance_: count must be \(1,\)"),
    ("positions", lambda t: t.repeat_interleave(2)[::2], "advance_: positions must be dense along the texts"),
    ("block_size", lambda n: 0, "advance_: block_size must be at least 1, got 0"),
])  # fmt: skip
def test_bad_input(path: torch.device, name: str, change: Any, message: str) -> None:
    arguments = state(6, path)
    before = {n: arguments[n].clone() for n in NAMES}
    with pytest.raises(ValueError, match=message):
        ops.advance_(**{**arguments, name: change(arguments[name])})
    assert all(torch.equal(arguments[n], before[n]) for n in NAMES)
