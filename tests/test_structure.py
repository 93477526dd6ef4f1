"""What keeps the code easy to navigate: imports in one direction, no import-time work, no name clashes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

KERNELS, MODEL = ROOT / "kernels" / "gpt2_kernels", ROOT / "gpt2"
FOUNDATION = (
    "_native", "_runtime", "_launch", "_operator", "_check", "_attention", "_gelu", "_float8", "_thresholds",
    "_crossentropy_cpu", "_linear_decode", "_overlap", "_paged_decode", "reference",
)  # fmt: skip
WRAPPERS = ("sdpa", "modules")  # no kernels of their own: they import the operator files
TOOLS = ("_trial", "_fused", "dropin", "explanation", "env_report", "warmup")  # on top of both
OP_FILES = sorted(p.stem for p in KERNELS.glob("*.py") if p.stem not in (*FOUNDATION, *WRAPPERS, *TOOLS, "__init__"))

# Each may import those before it, and nothing else from the package.
MODEL_ORDER = (
    "config", "profiling", "blocks", "text", "sampling", "recipe", "device", "weights", "tokenizer", "reference",
    "layer", "model", "parallel", "scheduler", "request", "cache", "decode", "engine", "data", "checkpoint", "trainer",
    "training", "__init__", "options", "commands", "evaluate", "harness", "batch_files", "batch", "cli", "__main__",
)  # fmt: skip


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True
    )


def test_operators_do_not_import_each_other_or_the_model() -> None:
    for path in KERNELS.glob("*.py"):
        assert not any(name.split(".")[0] in ("gpt2", "benchmarks", "tests") for name in imports(path)), path.name
        if path.stem in OP_FILES:
            others = [f"gpt2_kernels.{other}" for other in OP_FILES if other != path.stem]
            assert not imports(path) & set(others), path.name
    for stem in FOUNDATION:
        assert not imports(KERNELS / f"{stem}.py") & {f"gpt2_kernels.{op}" for op in OP_FILES}
    for stem in (*FOUNDATION, *OP_FILES, *WRAPPERS):
        assert not imports(KERNELS / f"{stem}.py") & {f"gpt2_kernels.{above}" for above in (*WRAPPERS, *TOOLS)}, stem


def test_the_model_is_built_in_one_direction() -> None:
    assert {p.stem for p in MODEL.glob("*.py")} == set(MODEL_ORDER)
    for i, stem in enumerate(MODEL_ORDER):
        later = {f"gpt2.{name}" for name in MODEL_ORDER[i + 1 :]}
        assert not imports(MODEL / f"{stem}.py") & later, stem


def test_the_explorer_stands_on_the_model_and_only_the_command_leads_to_it() -> None:
    order = ("metrics", "worker", "api", "look", "completion", "guard", "server", "__init__")
    folder = MODEL / "explorer"
    assert {p.stem for p in folder.glob("*.py")} == set(order)
    for i, stem in enumerate(order):
        assert not imports(folder / f"{stem}.py") & {f"gpt2.explorer.{name}" for name in order[i:]}, stem
        needs = {name.split(".")[0] for name in imports(folder / f"{stem}.py")}
        assert stem in ("guard", "server", "__init__") or not needs & {"starlette", "uvicorn"}, stem
    for path in (*MODEL.glob("*.py"), *KERNELS.glob("*.py")):
        roots = {name.split(".")[0] for name in imports(path)}
        assert "gpt2.explorer" not in imports(path) and not roots & {"starlette", "uvicorn"}, path.name


def test_bookkeeping_knows_no_tensors() -> None:
    for stem in ("blocks", "scheduler", "request"):
        roots = {name.split(".")[0] for name in imports(MODEL / f"{stem}.py")}
        assert not roots & {"torch", "triton", "numpy", "gpt2_kernels"}, stem


def test_a_file_never_shares_its_name_with_a_function_it_exports() -> None:
    """`from gpt2_kernels.x import x` would hide the module behind the function."""
    import gpt2_kernels

    assert not set(OP_FILES) & set(gpt2_kernels.__all__)


def test_every_operator_has_a_reference_and_a_test() -> None:
    import gpt2_kernels
    from gpt2_kernels import reference

    tools = {
        "OPS", "apply", "compat", "explain", "gpu_refusal", "has_paged_layer", "integrations", "modules", "path_of",
        "reference",
    }  # fmt: skip
    for name in set(gpt2_kernels.__all__) - tools:
        assert callable(getattr(reference, name)), name
    for stem in (*OP_FILES, *WRAPPERS):
        assert (ROOT / "tests" / f"test_{stem}.py").exists(), stem


def test_kernels_is_no_package() -> None:
    """`kernels` is the import name of another package, which transformers imports: our folder must never take it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("installed", [False, True], ids=["alone", "beside a package named kernels"])
def test_transformers_works_from_the_repository_root(installed: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    if installed:  # what a regular package of that name looks like to an import
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("MARK = 'theirs'\n")
    path = os.pathsep.join([str(ROOT / "kernels"), str(tmp_path)])
    code = f"""
import sys
sys.path.insert(0, '')  # as `python -m` and `python -c` do
import torch, transformers
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32)).eval()
print(model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1])
import gpt2, gpt2_kernels
if {installed}:
    import kernels
    assert kernels.MARK == 'theirs'
config = gpt2.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=49)
print(gpt2.GPT2(config).generate([1, 2], 3))
"""
    done = run(code, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[0] == "5"


def test_import_asks_nothing_of_the_machine(tmp_path: Path) -> None:
    """No compiler, no driver, no cache directory is touched by the import."""
    code = """
import subprocess, os
import torch  # whose CUDA builds look for libraries, from 2.14 on by a process
def refuse(*args, **kwargs): raise AssertionError("a process was started at import")
subprocess.run = subprocess.Popen = refuse
import gpt2_kernels, gpt2
assert not torch.cuda.is_initialized()
assert not os.path.exists(os.environ["XDG_CACHE_HOME"] + "/gpt2_kernels")
"""
    done = run(code, PYTHONPATH=str(ROOT / "kernels"), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]


def test_everything_but_kernels_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as on a system for which Triton is not published
import torch, gpt2_kernels as ops
from gpt2_kernels import _runtime
assert not _runtime.HAS_TRITON
x = torch.randn(3, 16)
assert torch.allclose(ops.layer_norm(x, torch.ones(16)), torch.nn.functional.layer_norm(x, (16,)), atol=1e-6)
q = torch.randn(1, 5, 2, 16)
assert ops.attention(q, q, q).shape == q.shape
assert ops.path_of("attention", "cuda").startswith("PyTorch")
"""
    done = run(code, PYTHONPATH=str(ROOT / "kernels"))
    assert done.returncode == 0, done.stderr[-2000:]


def test_interpreter_mode_zero_means_off() -> None:
    code = "from gpt2_kernels import _runtime; assert not _runtime.interpreting()"
    done = run(code, PYTHONPATH=str(ROOT / "kernels"), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-2000:]


def test_bfloat16_is_refused_in_an_unrepaired_interpreter() -> None:
    pytest.importorskip("triton")
    code = """
import torch, gpt2_kernels as ops
x = torch.randn(2, 8)
ops.layer_norm(x, torch.ones(8))
try:
    ops.layer_norm(x.bfloat16(), torch.ones(8).bfloat16())
except ValueError as e:
    assert str(e).startswith("layer_norm: dtype must be float32 or float16"), e
else:
    raise AssertionError("bfloat16 was computed")
"""
    done = run(code, PYTHONPATH=str(ROOT / "kernels"), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
