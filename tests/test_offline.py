"""Every kernel compiles for sm_80, sm_90 and sm_100 through the real host code, within limits, with no GPU.

The interpreter accepts constructs that the compiler refuses, and knows nothing of registers: this is the other half of
the proof.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# Kernels that must run on tensor cores: float32 is multiplied in full precision, on the CUDA cores.
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_report", "--json"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_is_there(rows: list[dict]) -> None:
    names = {r["name"] for r in rows}
    assert names == {
        "attention_kernel",
        "paged_attention_kernel",
        "append_kv_kernel",
        "layer_norm_kernel",
        "linear_kernel",
    }
    assert {r["cc"] for r in rows} == {80, 90, 100}


def test_nothing_spills(rows: list[dict]) -> None:
    assert not [(r["case"], r["cc"], r["spills"]) for r in rows if r["spills"]]


def test_everything_can_be_launched(rows: list[dict]) -> None:
    assert not [(r["case"], r["cc"], r["shared_bytes"]) for r in rows if r["over_limit"] or r["blocks_per_sm"] < 1]
    # two blocks hide each other's latency in the kernels that GPT-2 spends its time in
    for case in ("attention D=64 bf16", "linear 768x3072 gelu_tanh bf16"):
        assert [r["blocks_per_sm"] for r in rows if r["case"] == case and r["cc"] == 90] == [2]


def test_half_precision_runs_on_tensor_cores(rows: list[dict]) -> None:
    for r in rows:
        if r["case"].endswith(("fp32", "norm")) or "norm" in r["case"] or "append" in r["case"]:
            continue
        instruction = "HMMA" if r["cc"] == 90 and r["threads"] and "paged" in r["case"] else TENSOR_CORES[r["cc"]]
        counts = r["instructions"]
        assert counts.get(instruction, 0) or counts.get("HMMA", 0) or counts.get("HGMMA", 0), (r["case"], r["cc"])
    attention = [r for r in rows if r["case"] in ("attention D=64 bf16", "linear 768x3072 plain bf16")]
    assert all(r["instructions"].get(TENSOR_CORES[r["cc"]], 0) for r in attention)


def test_float32_is_not_rounded_to_tf32(rows: list[dict]) -> None:
    for r in rows:
        if r["case"].endswith("fp32"):
            assert not any(r["instructions"].get(name, 0) for name in TENSOR_CORES.values()), (r["case"], r["cc"])


def test_rows_are_read_128_bits_at_a_time(rows: list[dict]) -> None:
    for r in rows:
        if "layer_norm" in r["case"]:
            assert r["instructions"]["LDG.128"] == r["instructions"]["LDG"], (r["case"], r["cc"])
