"""The benchmark script runs, on tiny shapes, and says what it should; what it measures here means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_structure import run

from benchmarks import gpu, kernels, tune
from gpt2_kernels import _check, fused_attention


def test_smoke(tmp_path: Path) -> None:
    """In a process of its own: CPU tensors take the production path there, not the interpreter."""
    out = tmp_path / "results.json"
    parts = ["attention", "layer_norm", "linear", "cross_entropy", "generation", "tables"]
    command = f"import sys; sys.argv = ['gpu', '--smoke', '--out', {str(out)!r}, '--only', *{parts!r}]"
    done = run(f"{command}; from benchmarks import gpu; gpu.main()", PYTHONPATH=f"{ROOT / 'kernels'}:{ROOT}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(out.read_text())["parts"]
    assert list(results) == ["environment", "ceilings", *parts]
    for part in parts[:-1]:
        for row in results[part]:
            assert row["microseconds"]["ours"]["median"] > 0 and "gates" in row, row
            assert "disagrees" not in row, row
    assert all(len(row["microseconds"]) == 2 and not row["not_run"] for row in results["tables"])


def test_a_wrong_result_is_found() -> None:
    x = torch.randn(100)
    run_ = kernels.Run(torch.device("cpu"), True, {"copy": 1.0, "matmul": 1.0})
    row = kernels.compare(run_, "wrong", {"ours": lambda: x * 0, "torch": lambda: x.sin()}, gates={"torch": 1.0})
    assert "torch" in row["disagrees"] and row["gates"] == {"torch x 1.0": None}


def test_the_sanitizer_meets_every_kernel() -> None:
    """Each test that it names exists, and each file with a kernel has one; a private file, of its operator."""
    operator = {"_paged_decode.py": "paged.py"}
    files = {test.partition("::")[0] for test in gpu.SANITIZED}
    for test in gpu.SANITIZED:
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), test
    for path in (ROOT / "kernels" / "gpt2_kernels").glob("*.py"):
        if "_kernel(" in path.read_text():
            assert f"test_{operator.get(path.name, path.name)}" in files | {"test_fused_attention.py"}, path.name


def test_no_gpu_is_said(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU is visible" in done.stderr


def test_a_candidate_takes_the_place_of_the_row_that_would_serve() -> None:
    before = dict(fused_attention.TILES)
    with tune.row_instead(fused_attention.TILES, (16, 16, 4, 1)):
        q = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
        assert _check.tile_for(fused_attention.TILES, q) == (16, 16, 4, 1)
        assert _check.tile_for(fused_attention.TILES, q.float()) == before[0, 4, 64]
    assert fused_attention.TILES == before
