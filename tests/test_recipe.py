"""The choices of a training run: their limits, the learning rate, the division of a batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from gpt2.recipe import Recipe, check_out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(steps=0), "steps must be an integer of at least 1, got 0"),
        (dict(steps=1.5), "steps must be an integer of at least 1, got 1.5"),
        (dict(batch_size=True), "batch_size must be an integer of at least 1, got True"),
        (dict(warmup=-1), "warmup must be an integer of at least 0, got -1"),
        (dict(steps=None), "steps must be an integer of at least 1, got None"),
        (dict(seed=2**63), r"seed must be below 2\^63"),
        (dict(lr=math.nan), "lr must be a number of at least 0, got nan"),
        (dict(lr=1e-3, min_lr=2e-3), r"min_lr must be at most lr \(0.001\), got 0.002"),
        (dict(optimizer="sgd"), "optimizer must be one of adamw, muon, got 'sgd'"),
        (dict(dtype="float16"), "dtype must be one of float32, bfloat16, got 'float16'"),
        (dict(optimizer="muon", parallel="fsdp"), "muon needs whole matrices"),
        (dict(model="nope"), "--model: 'nope' must be a preset"),
        (dict(init="./nope"), "--init: './nope' is not a folder"),
        (dict(data="./nope.txt"), "data must exist, got './nope.txt'"),
        (dict(val_data="./nope.txt"), "val_data must exist, got './nope.txt'"),
    ],
    ids=str,
)
def test_what_a_recipe_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**{"data": ".", **values})


def test_the_rate_rises_to_the_highest_and_falls_to_the_last() -> None:
    """Against the cosine in numbers: 10 steps of warmup, then half a period over the other 90."""
    recipe = Recipe(data=".", steps=100, lr=2.0, min_lr=0.5, warmup=10)
    assert [recipe.rate(step) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert recipe.rate(55) == pytest.approx(1.25)  # half way
    assert recipe.rate(99) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert Recipe(data=".", steps=100, warmup=0).rate(0) == 6e-4


def test_a_trapezoid_is_flat_until_its_last_part() -> None:
    recipe = Recipe(data=".", steps=100, lr=1.0, warmup=5, schedule="trapezoid")
    assert [recipe.rate(step) for step in (4, 5, 64, 65)] == [1.0] * 4
    assert recipe.rate(99) == pytest.approx(1 / 35) and recipe.rate(82) == pytest.approx(18 / 35)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"), [(8, None, 1, 8), (512, None, 8, 8), (14, None, 2, 7), (12, 3, 2, 3)]
)
def test_a_batch_is_divided(batch: int, micro: int | None, processes: int, expected: int) -> None:
    assert Recipe(data=".", batch_size=batch, micro_batch=micro).sequences_at_a_time(processes) == expected


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 8"):
        Recipe(data=".", batch_size=8).sequences_at_a_time(3)
    with pytest.raises(ValueError, match="micro_batch must divide the 4 sequences of each process, got 3"):
        Recipe(data=".", batch_size=8, micro_batch=3).sequences_at_a_time(2)


def test_a_folder_that_holds_something_is_refused_unless_it_is_resumed(tmp_path: Path) -> None:
    assert check_out(tmp_path / "new", False) == tmp_path / "new"
    assert check_out(tmp_path, False) == tmp_path  # empty
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tokens").touch()
    assert check_out(tmp_path, False) == tmp_path  # left by a run whose data were refused
    (tmp_path / "data" / "mine.tokens").touch()
    with pytest.raises(ValueError, match="--out must be empty or new"):
        check_out(tmp_path, False)
    (tmp_path / "data" / "mine.tokens").unlink()
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="--out must be empty or new"):
        check_out(tmp_path, False)
    assert check_out(tmp_path, True) == tmp_path
    with pytest.raises(ValueError, match="--out must be a folder, got the file"):
        check_out(tmp_path / "note.txt", True)
