"""The compiled CPU operators: found, compiled at first use and cached, with whatever compiler there is."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gpt2_kernels import _native
from gpt2_kernels._runtime import ALL_INSTRUCTIONS, DOT_PRODUCTS

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no c++ on this machine")
X86 = platform.machine() in ("x86_64", "AMD64")

CHILD = """
import torch
from gpt2_kernels import _native, reference
assert _native._outcome is None, "something was compiled or loaded at import"
loaded = _native.load()
if loaded:
    k = torch.randn(3, 2, 16)
    cache = torch.zeros(1, 4, 2, 16)
    _native.ops().append_kv_(k, k, cache, cache.clone(), torch.tensor([0, 1, 2]))
    assert torch.equal(cache[0, :3], k)
print(loaded, _native.status())
"""


OLD_COMPILER_CHILD = (
    CHILD
    + """
from gpt2_kernels import _operator, _runtime
import gpt2_kernels as ops
with _runtime.force("native"):
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    for dtype in (torch.float32, torch.bfloat16):  # by whatever there is
        y = ops.linear(x.to(dtype), weight.to(dtype))
        torch.testing.assert_close(y.float(), x @ weight.T, rtol=0.05, atol=0.1)
    print(_runtime.simd_level(), _operator.path_of("linear", "cpu"), sep="\\n")
assert _runtime.has_amx() == torch.cpu._is_amx_tile_supported()
"""
)


class Machine:
    """Runs a fresh Python with its own cache folder, temporary folder and compiler, and logs compiler calls."""

    def __init__(self, root: Path, *, compiler: str = 'exec c++ "$@"'):
        self.cache, self.temporary, self.log = root / "cache", root / "tmp", root / "log"
        self.temporary.mkdir(parents=True)
        self.log.touch()
        script = root / "cxx"
        script.write_text(f'#!/bin/sh\necho "$@" >> {self.log}\n{compiler}\n')
        script.chmod(0o755)
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(self.cache), "TMPDIR": str(self.temporary)}
        self.environment |= {"CXX": str(script), "PYTHONPATH": str(Path(_native.__file__).parents[1])}

    def start(self, code: str = CHILD) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, code: str = CHILD) -> str:
        return self.result(self.start(code))

    def result(self, child: subprocess.Popen[str]) -> str:
        out, err = child.communicate(timeout=600)
        assert child.returncode == 0 and err == "", err  # quiet
        return out.strip()

    def compilations(self) -> int:
        return self.log.read_text().count("-shared")

    def libraries(self) -> list[Path]:
        return sorted((self.cache / "gpt2_kernels").iterdir())


def test_every_header_is_part_of_the_key():
    assert sorted(_native.HEADERS) == sorted(path.name for path in _native._source_directory().glob("*.h"))


@needs_compiler
def test_first_use_builds_once_and_repairs_a_damaged_file(tmp_path):
    """Two processes at once on an empty cache, a third that finds the library, one that finds half of it."""
    machine = Machine(tmp_path)
    for child in [machine.start(), machine.start()]:
        assert machine.result(child).startswith(f"True compiled ops loaded from {machine.cache}")
    built = machine.compilations()
    assert built in (1, 2)
    assert 1 <= len(machine.libraries()) <= built, "scratch folders were left behind"
    for extra in machine.libraries()[1:]:
        extra.unlink()
    assert machine.run().startswith("True")
    assert machine.compilations() == built, "compiled although the library was there"

    (library,) = machine.libraries()
    content = library.read_bytes()
    library.write_bytes(content[: len(content) // 2])
    assert machine.run().startswith(f"True compiled ops loaded from {machine.cache}")
    assert machine.compilations() == built + 1
    (library,) = machine.libraries()

    # if the cache cannot be written, a private folder among the temporary files is used
    private = machine.temporary / f"gpt2_kernels-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(library, private)
    machine.environment["XDG_CACHE_HOME"] = str(machine.log)  # a file, so nothing can be created in it
    assert machine.run().startswith(f"True compiled ops loaded from {private}")
    assert machine.compilations() == built + 1


def test_no_compiler(tmp_path):
    machine = Machine(tmp_path)
    del machine.environment["CXX"]
    machine.environment["PATH"] = str(tmp_path / "nothing")
    assert machine.run() == "False no C++ compiler found (looked for c++, g++, clang++)"


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for a compiler is a shell script")
def test_a_compiler_that_fails_is_quoted(tmp_path):
    complain = 'echo note >&2; echo "a.h:1: error: no" >&2; exit 1'
    machine = Machine(tmp_path, compiler=f'[ "$1" = --version ] && exit 0; {complain}')
    assert machine.run() == "False compiler failed: a.h:1: error: no"
    assert machine.compilations() == (len(_native.LEVELS) if X86 else 1)
    assert machine.libraries() == []


@needs_compiler
@pytest.mark.skipif(not X86, reason="levels of x86's instructions")
@pytest.mark.parametrize("level, refused", [(3, "amx"), (2, "amx avx512_dot")], ids=["amx", "products"])
def test_a_compiler_that_is_too_old(tmp_path, level: int, refused: str) -> None:
    """All that it can compile is there, and the status says what is not, even when the library is found again."""
    old = tmp_path / "old.h"
    old.write_text(f"#pragma GCC poison {refused}\n")  # an error if one of these namespaces is left in the source
    machine = Machine(tmp_path, compiler=f'exec c++ "$@" -O0 -include {old}')  # -O0 takes a third of the time
    for _ in range(2):
        status, mine, product = machine.run(OLD_COMPILER_CHILD).splitlines()
        assert status.startswith(f"True compiled ops loaded from {machine.cache}")
        assert status.endswith(_native.LEVELS[level])
        assert int(mine) == min(level, _native.ops().simd_level(ALL_INSTRUCTIONS))
        assert (product == "compiled C++") == (int(mine) >= DOT_PRODUCTS)
        assert machine.compilations() == 1 + max(_native.LEVELS) - level


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for a compiler is a shell script")
def test_a_new_assembler_is_asked_again(tmp_path, monkeypatch):
    """A library built without AMX, because the old assembler lacked it, is then not reused."""
    for version in "12":
        compiler, assembler = tmp_path / "cxx", tmp_path / "as"
        compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo C++ || echo {assembler}\n')
        assembler.write_text(f"#!/bin/sh\necho as {version}\n")
        compiler.chmod(0o755), assembler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        assert _native._find_compiler() == ([str(compiler)], f"C++; as {version}")


def test_missing_sources_and_surprises_are_a_status(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "_outcome", None)
    monkeypatch.setattr(_native, "_find_compiler", lambda: (["c++"], "1"))
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "a" / "b" / "_native.py"))
    assert not _native.load()
    assert _native.status().startswith("C++ sources not found (looked in ")
    monkeypatch.setattr(_native, "_outcome", None)
    monkeypatch.setattr(_native, "_source_directory", lambda: 1 / 0)
    assert not _native.load()
    assert _native.status() == "compiled ops failed: ZeroDivisionError: division by zero"


def test_disabled():
    before = _native.load()
    with _native.disabled():
        assert not _native.load()
        assert _native.status() == "compiled ops disabled"
        with pytest.raises(RuntimeError, match="compiled ops disabled"):
            _native.ops()
    assert _native.load() == before


@pytest.mark.skipif(os.name != "posix", reason="modes and owners of POSIX")
def test_a_shared_temporary_folder_is_not_trusted(tmp_path, monkeypatch):
    """Somebody else could put a library there under our name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore it
    home, private = _native._cache_folders()
    assert home == Path.home() / ".cache" / "gpt2_kernels"
    assert private.parent == tmp_path and private.stat().st_mode & 0o777 == 0o700
    private.chmod(0o770)
    assert list(_native._cache_folders()) == [home]
    private.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    private.symlink_to(tmp_path / "elsewhere")
    assert list(_native._cache_folders()) == [home]
