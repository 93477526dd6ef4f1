"""benchmarks.offline: host code compiled with no GPU, in a child process that does not interpret (offline_child.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from benchmarks import offline as tool  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, str(Path(__file__).with_name("offline_child.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("cc, tensor_core", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCMMA")])
def test_report_of_a_matrix_product(output, cc, tensor_core):
    report = output["reports"][f"matmul {cc}"]
    assert (report["name"], report["cc"], report["grid"], report["threads"]) == ("matmul", cc, [1], 128)
    assert 32 <= report["registers"] <= 128
    assert report["spills"] == report["stack_bytes"] == 0
    # 64 x 64 tiles of two operands in bfloat16, as many as the pipeline keeps in flight
    assert 2 * 64 * 64 * 2 <= report["shared_bytes"] <= 3 * 2 * 64 * 64 * 2 + 1024
    assert not report["over_limit"]
    assert report["occupancy"] == report["blocks_per_sm"] * 128 / 2048 > 0
    assert report["seconds"] > 0
    instructions = report["instructions"]
    assert [name for name in ("HMMA", "HGMMA", "UTCMMA") if instructions[name]] == [tensor_core]
    assert instructions["LDGSTS"] > 0, "operands are copied asynchronously"
    assert instructions["STG.128"] == instructions["STG"] > 0
    assert instructions["total"] > 100


def test_too_much_shared_memory_is_over_the_limit(output):
    report = output["reports"]["too much shared memory"]
    assert report["shared_bytes"] > 227 * 1024
    assert report["over_limit"]
    assert report["blocks_per_sm"] == report["occupancy"] == 0


def test_spills_are_counted(output):
    plain, spilling = output["reports"]["plain"], output["reports"]["spilling"]
    assert plain["grid"] == spilling["grid"] == [2]
    assert plain["spills"] == plain["stack_bytes"] == 0
    assert plain["instructions"]["LDG.128"] == plain["instructions"]["LDG"] == 8  # 32 floats of each thread
    assert plain["registers"] > 32 >= spilling["registers"]
    assert spilling["spills"] > 0 and spilling["stack_bytes"] > 0


def test_autotune_compiles_every_configuration_and_then_the_chosen_one(output):
    assert output["tuned grids"] == [[4], [2], [4]]


def test_fingerprints_tell_variants_apart_without_compiling(output):
    first, again, other_option, other_argument, compiled = output["fingerprints"]
    assert first == again == compiled
    assert len({first, other_option, other_argument}) == 3
    assert output["compiled"] == [False, False, False, False, True]


@pytest.mark.parametrize(
    "cc, registers, threads, shared_kib, blocks",
    [
        (90, 120, 256, 64, 2),  # registers: 4 warps in each partition
        (90, 168, 384, 64, 1),
        (90, 32, 128, 0, 16),  # threads
        (90, 16, 32, 0, 32),  # blocks
        (90, 32, 128, 112, 2),  # shared memory, of which the system reserves 1 KiB per block
        (90, 32, 128, 113, 2),
        (90, 32, 128, 114, 1),
        (90, 32, 128, 227, 1),
        (90, 32, 128, 228, 0),
        (80, 32, 128, 164, 0),
        (89, 64, 256, 0, 4),
    ],
)
def test_blocks_per_sm(cc, registers, threads, shared_kib, blocks):
    assert tool.blocks_per_sm(cc, registers, threads, shared_kib * 1024) == blocks


def test_count_instructions_tells_modifiers_and_spellings_apart():
    opcodes = [
        "LDG.E.128.CONSTANT",
        "@!P0 LDG.E.LTC128B",
        "LDGSTS.E.BYPASS.LTC128B.128",
        "REDUX.MAX",
        "@UP1 REDG.E.ADD",
    ]
    opcodes += ["MUFU.EX2", "UTCHMMA", "LDGDEPBAR"]
    assembly = "\n".join(
        f"        /*{16 * line:04x}*/                   {text} R0 ;" for line, text in enumerate(opcodes)
    )
    counts = {name: count for name, count in tool.count_instructions(assembly).items() if count}
    expected = {"total": 8, "LDG": 2, "LDG.128": 1, "LDGSTS": 1, "ATOM": 1, "MUFU": 1, "MUFU.EX2": 1, "UTCMMA": 1}
    assert counts == expected


def test_offline_refuses_the_interpreter(monkeypatch):
    interpreting = SimpleNamespace(runtime=SimpleNamespace(interpret=True))
    monkeypatch.setattr(tool, "triton", SimpleNamespace(knobs=interpreting))
    with pytest.raises(RuntimeError, match="Triton runs in interpreter mode"), tool.offline(90):
        pass


def test_offline_refuses_an_unknown_architecture():
    with pytest.raises(ValueError, match="cc must be one of .* got 75"), tool.offline(75):
        pass


def test_analyse_names_a_missing_tool(monkeypatch, tmp_path):
    monkeypatch.setattr(tool, "TOOLS", tmp_path)
    with pytest.raises(RuntimeError, match="cuobjdump is missing"):
        tool._run_tools(b"")
