"""Every kernel compiles for sm_80, sm_90 and sm_100 through the real host code, within limits, with no GPU.

The interpreter accepts constructs that the compiler refuses, and knows nothing of registers: this is the other half of
the proof. What kernels compile to is kept in benchmarks/results/compile_triton_*.txt. Compiling everything takes
minutes, so the proof has two steps: the snapshot is what today's kernels compile to (`--check`: the compiler's input is
the same, and a few cases are recompiled), and everything in the snapshot is as required.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("triton")
from benchmarks.compile_report import Row, read_snapshot, snapshot_path  # noqa: E402

CHOSEN = ("3.6", "3.7")  # Triton versions that the launch tables were chosen with: nothing spills there
VERSIONS = (*CHOSEN, "3.9")  # with 3.9 all kernels compile, with few spills

# A kernel's tensor-core instruction in half precision for sm_80, sm_90 and sm_100, "-" for none; the longest key that
# is a prefix of "kernel: case" decides. float32 is multiplied in full precision, on the CUDA cores.
NONE, OLD, NEW = ("-", "-", "-"), ("HMMA", "HMMA", "HMMA"), ("HMMA", "HGMMA", "UTCMMA")
MMA = {
    "attention_kernel": NEW,
    "attention_dq_kernel": NEW,
    "attention_dq_kernel: attention D=256": OLD,
    "attention_dkdv_kernel": NEW,
    "attention_dkdv_kernel: attention D=256": OLD,
    "attention_map_kernel": NEW,
    "advance_kernel": NONE,
    "append_kv_kernel": NONE,
    "cross_entropy_kernel": NONE,
    "cross_entropy_backward_kernel": NONE,
    "mean_kernel": NONE,
    "layer_norm_kernel": NONE,
    "layer_norm_backward_kernel": NONE,
    "sum_partials_kernel": NONE,
    "linear_kernel": NEW,
    "linear_decode_kernel": NEW,
    "sample_kernel": NONE,
    "paged_attention_kernel": OLD,  # 32 rows: fewer than the 64 of Hopper's and Blackwell's instructions
    "paged_attention_kernel: paged prefill D=64": NEW,
    "paged_decode_kernel": NONE,
    "paged_decode_kernel: paged decode grouped": OLD,  # 16 rows
    "paged_decode_kernel: paged decode_ grouped": OLD,
}
# Kernels that load through tensor descriptors (TMA) on sm_90.
TMA: set[str] = set()


def child(code_or_module: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process that does not interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    return subprocess.run(
        [sys.executable, *code_or_module], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def rows(version: str) -> list[Row]:
    _, found = read_snapshot(snapshot_path(version))
    assert found, f"{snapshot_path(version)}: make it with python -m benchmarks.compile_report --write"
    return found


def test_the_snapshot_is_what_the_kernels_compile_to() -> None:
    import triton

    if snapshot_path(triton.__version__) not in map(snapshot_path, VERSIONS):
        pytest.skip(f"there is no table of Triton {triton.__version__}, of {', '.join(VERSIONS)} alone")
    done = child(["-m", "benchmarks.compile_report", "--check"])
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr[-3000:]}"


def test_every_kernel_is_there(rows: list[Row]) -> None:
    """Every launched kernel of the package has a case: a function under @triton.jit whose name ends in _kernel."""
    package = ROOT / "kernels" / "gpt2_kernels"
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package.glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    kernels = {
        function.name
        for function in functions
        if function.name.endswith("_kernel") and any("jit" in ast.unparse(d) for d in function.decorator_list)
    }
    assert {r.kernel for r in rows} == kernels
    assert {r.sm for r in rows} == {80, 90, 100}


def test_nothing_spills(rows: list[Row], version: str) -> None:
    most = 0 if version in CHOSEN else 20
    assert not [(r.case, r.kernel, r.sm, r.spills) for r in rows if r.spills > most]


def test_everything_can_be_launched(rows: list[Row]) -> None:
    assert not [(r.case, r.kernel, r.sm, r.shared) for r in rows if r.blocks < 1]
    # in the kernels where GPT-2 spends its time, two blocks hide each other's latency
    busiest = {"attention D=64 bf16": "attention_kernel", "linear 768x3072 gelu_tanh bf16": "linear_kernel"}
    assert [r.blocks for r in rows if r.sm == 90 and busiest.get(r.case) == r.kernel] == [2, 2]


def test_products_run_on_the_tensor_cores_that_are_expected(rows: list[Row]) -> None:
    for r in rows:
        keys = [key for key in MMA if f"{r.kernel}: {r.case}".startswith(key)]
        assert keys, f"say in MMA which instruction {r.kernel} multiplies with"
        expected = NONE if "fp32" in r.case else MMA[max(keys, key=len)]
        assert r.mma == expected[(80, 90, 100).index(r.sm)], (r.case, r.kernel, r.sm)


def test_descriptors_are_used_where_expected(rows: list[Row]) -> None:
    for r in rows:
        assert (r.tma > 0) == (r.kernel in TMA and r.sm == 90), (r.case, r.kernel, r.sm)


def test_rows_are_read_128_bits_at_a_time(rows: list[Row]) -> None:
    for r in rows:
        if r.kernel == "layer_norm_kernel":
            assert r.ldg_128 == r.ldg, (r.case, r.sm)


def test_decode_reads_keys_and_values_128_bits_at_a_time(rows: list[Row], version: str) -> None:
    """And two programs fit on a multiprocessor, so that one loads while the other computes."""
    for r in rows:
        if r.kernel == "paged_decode_kernel" and "grouped" not in r.case:
            assert r.ldg_128 >= 9, (r.case, r.sm)
            assert r.blocks >= 2 or version not in CHOSEN, (r.case, r.sm)


def test_lengths_and_batch_do_not_decide_what_is_compiled() -> None:
    """Rows, queries, keys, sequences of 1..1024: one compiled variant per kernel, so the same bits and no compiling."""
    done = child(["-c", "from benchmarks.compile_report import variants; print(variants())"])
    assert done.returncode == 0, done.stderr[-3000:]
    counts = ast.literal_eval(done.stdout)
    assert not {name: kernels for name, kernels in counts.items() if max(kernels.values()) > 1}


def test_more_sequences_than_one_launch_takes() -> None:
    """A grid's third axis is limited to 65535, and so is the second."""
    code = """
import torch, gpt2_kernels as ops
from benchmarks.offline import offline
from gpt2_kernels import _runtime
S = 70_000
table, lens, cu = (torch.zeros(shape, dtype=torch.int32) for shape in ((S, 1), (S,), (S + 1,)))
cache, q = torch.empty(4, 16, 2, 64), torch.empty(S, 6, 64)
with _runtime.force("triton"), offline(90, compile=False) as launches:
    ops.paged_attention(q, cache, cache, table, lens, cu, 1)
print([launch.grid for launch in launches])
"""
    done = child(["-c", code])
    assert done.stdout == "[(1, 2, 65535), (1, 2, 4465)]\n", done.stderr[-3000:]


def test_kernels_that_start_early_wait_before_they_touch_memory() -> None:
    """From Hopper on: in the compiled code no load, store or atomic precedes the wait, and every program waits."""
    code = r"""
import re
from benchmarks import compile_cases
from benchmarks.offline import offline
from gpt2_kernels import _overlap, _runtime
names = ["layer_norm C=768 bf16", "add_layer_norm C=768 bf16", "paged decode D=64 bf16", "paged decode_ D=64 bf16",
         "paged decode_ grouped D=64 bf16", "advance_", "sample V=50257 bf16", "linear decode 768x2304 bf16",
         "linear decode 3072x768 fp32"]
cases = compile_cases.cases()
for name in names:
    for cc in (80, 90, 100):
        with _runtime.force("triton"), offline(cc) as launches:
            cases[name]()
        ptx = launches[0].kernel.asm["ptx"].partition(".entry")[2]
        before, wait, after = ptx.partition("griddepcontrol.wait")
        instructions = re.findall(r"^\s*(?:@!?%p\d+ )?(\w+)\.?([\w.]*)", before, re.MULTILINE)
        watched = "ld", "st", "atom", "red", "cp", "ret", "bra", "exit"
        found = [f"{i}.{rest}" for i, rest in instructions if i in watched]
        touched = [i for i in found if not re.match(r"(ld|st)\.(param|shared)", i)]
        assert bool(wait) == launches[0].kernel.metadata.launch_pdl == (cc >= 90), (name, cc)
        if wait:
            assert found and not touched, (name, cc, touched)
            assert "launch_dependents" in after and ("prefetch" in before) == name.startswith("linear"), (name, cc)
with _runtime.force("triton"), _overlap.disabled(), offline(90) as launches:
    cases[names[0]]()
assert not launches[0].kernel.metadata.launch_pdl
"""
    done = child(["-c", code])
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_damaged_snapshot_is_noticed(tmp_path: Path) -> None:
    """A snapshot in another format counts as missing, so that `--write` recreates it and `--check` fails."""
    path = tmp_path / "compile_triton_3.7.txt"
    assert read_snapshot(path) == ("", [])
    text = snapshot_path("3.7").read_text(encoding="utf-8")
    path.write_text(text.replace("fingerprint", "hash"), encoding="utf-8")
    assert read_snapshot(path) == ("", [])
    path.write_text(text, encoding="utf-8")
    version, rows = read_snapshot(path)
    assert (version, rows) == read_snapshot(snapshot_path("3.7")) and rows
    assert re.fullmatch(r"3\.7\.\d+", version)  # with any other version, no kernel would be compared
