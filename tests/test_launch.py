"""_launch.launch and benchmarks.host_time, in a child process that does not interpret (launch_child.py).

There Triton compiles for sm_90 and launches, through its own launcher, into a CUDA driver that does nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GPU, ROOT

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def output() -> dict:
    if GPU:
        pytest.skip("a real CUDA driver is loaded already")
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    command = [sys.executable, str(Path(__file__).with_name("launch_child.py"))]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_launch_runs_the_variant_that_triton_would_choose(output: dict) -> None:
    """dtypes, alignment, None, integers on each side of what Triton specializes on, options, in a mixed order."""
    assert output["different"] == []
    assert output["direct"] > output["calls"] // 3  # the others are unaligned, too wide, or seen for the first time


def test_the_short_way_is_for_plain_launches(output: dict) -> None:
    assert output["again"] and output["after the hook"]
    for case in ("unaligned", "with a hook", "debug", "with a pre-run hook", "with run replaced"):
        assert not output[case], case


def test_tools_see_every_launch(output: dict) -> None:
    assert output["hook saw"] == ["kernel", "pre", "run"]
    assert output["offline saw"] == [["kernel", [5]]]


def test_grids_of_one_two_and_three_dimensions(output: dict) -> None:
    assert output["grids"] == [[2, 1, 1], [2, 3, 1], [2, 3, 4]]


def test_host_time_measures_forward_and_backward(output: dict) -> None:
    for name in ("layer_norm, no gradient", "launch", "layer_norm, forward and backward", "F.layer_norm, no gradient"):
        assert name in output["measured"]
    # no gradient, operator, implementation, launch, kernel[grid], with gradient: one each; backward 2; both 3
    assert output["launches"] == 11
