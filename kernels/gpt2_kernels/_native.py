"""The compiled CPU operators, `torch.ops.gpt2_kernels_cpu`: found, compiled once, loaded.

The C++ sources are compiled **on first use, into a cache**, in a few seconds, not when the package is installed: pip
builds our wheel before torch is there, naming torch in `build-system.requires` would make every install download it
twice, and Triton needs a C compiler at run time anyway. The code uses only LibTorch's stable ABI of torch 2.11.

Nothing here runs at import, prints, or raises if it cannot work: without a compiler `load()` returns False, `status()`
says why, and PyTorch computes the package's operators.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

SOURCE = "cpu_ops.cpp"
HEADERS = (
    "cpu_amx_tile.h",
    "cpu_attention.h",
    "cpu_attention_tile.h",
    "cpu_checks.h",
    "cpu_crossentropy_tile.h",
    "cpu_gelu_tile.h",
    "cpu_lanes.h",
    "cpu_layernorm.h",
    "cpu_layernorm_tile.h",
    "cpu_linear.h",
    "cpu_linear_tile.h",
    "cpu_sample.h",
    "cpu_sample_tile.h",
    "cpu_simd.h",
    "cpu_tiles.h",
)
COMPILERS = ("c++", "g++", "clang++")  # after $CXX
FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # the sources say which multiply-adds are fused: the same bits from every compiler
    "-Wno-psabi",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11; later versions keep it
)
# Of x86's instructions, as GPT2K_LEVEL in csrc numbers them, best first: what the status adds where no more compiled.
# Whether compiler and assembler know them shows when it is tried: either may be older than the other.
LEVELS = {
    4: "",
    3: ", without AMX, which did not compile",
    2: ", without products, whose AVX-512 with BF16 and VNNI did not compile",
}
COMPILE_SECONDS = 600  # a compiler that takes longer is stuck

_lock = threading.Lock()


class _Outcome(NamedTuple):
    loaded: bool
    message: str


class _Unavailable(Exception):
    """The operators are unavailable here; the message becomes the status."""


_outcome: _Outcome | None = None
_disabled = False


def load() -> bool:
    """Whether the compiled operators can be called; the first call finds or compiles them. Never raises."""
    if _disabled:
        return False
    return _result().loaded


def status() -> str:
    """One line: where the operators were loaded from, or why they were not. Loads them if nobody has yet."""
    if _disabled:
        return "compiled ops disabled"
    return _result().message


def ops() -> Any:
    """The namespace `torch.ops.gpt2_kernels_cpu`: what csrc/cpu_ops.cpp registers; products on x86 alone.

    Raises RuntimeError with `status()` if the operators are unavailable: call `load()` first.
    """
    if not load():
        raise RuntimeError(f"gpt2_kernels: {status()}")
    return torch.ops.gpt2_kernels_cpu


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Behave as on a machine without a compiler. For tests."""
    global _disabled
    previous, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = previous


def _result() -> _Outcome:
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                try:
                    library, level = _load_or_build()
                    _outcome = _Outcome(True, f"compiled ops loaded from {library}{LEVELS[level]}")
                except _Unavailable as reason:
                    _outcome = _Outcome(False, str(reason))
                except Exception as error:  # an optional speed-up must never be the reason that something fails
                    _outcome = _Outcome(False, f"compiled ops failed: {type(error).__name__}: {_one_line(str(error))}")
    return _outcome


def _load_or_build() -> tuple[Path, int]:
    """Loads a valid library from a cache folder or compiles one there, at the best level possible; a damaged one is
    recompiled, once."""
    compiler, version = _find_compiler()
    sources = _source_directory()
    key = _key(sources, compiler, version)
    levels = list(LEVELS) if platform.machine() in ("x86_64", "AMD64") else [max(LEVELS)]
    stems = {level: f"cpu_ops-{key}-{level}" for level in levels}
    folders = list(_cache_folders())
    for level, stem in stems.items():
        for folder in folders:
            library = _find_valid(folder, stem)
            if library is not None:
                try:
                    return _load_library(library), level
                except OSError:  # intact, yet the loader refuses it (another libc, say)
                    with contextlib.suppress(OSError):
                        library.unlink()
    problem = "no cache folder"
    for folder in folders:
        try:
            library, level = _build(folder, stems, sources, compiler)
        except OSError as error:
            problem = _one_line(str(error))
            continue
        try:
            return _load_library(library), level
        except OSError as error:
            problem = _one_line(str(error))  # a folder mounted noexec, for one: the next may do
    raise _Unavailable(f"compiled ops could not be stored or loaded: {problem}")


def _find_compiler() -> tuple[list[str], str]:
    """The compiler's command, and the first line of its version and of its assembler's."""
    looked_for = []
    for command in (os.environ.get("CXX", ""), *COMPILERS):
        words = shlex.split(command)  # CXX may be "ccache g++"
        if not words:
            continue
        looked_for.append(command)
        if shutil.which(words[0]) is None:
            continue
        reply = _run([*words, "--version"])
        if reply.returncode == 0:
            return words, f"{_first_line(reply)}; {_assembler(words)}"
    raise _Unavailable(f"no C++ compiler found (looked for {', '.join(looked_for)})")


def _assembler(compiler: list[str]) -> str:
    """The first line of its version: it may be upgraded separately from the compiler. Clang needs none."""
    name = _first_line(_run([*compiler, "-print-prog-name=as"]))
    return _first_line(_run([name, "--version"])) if shutil.which(name) else ""


def _first_line(reply: subprocess.CompletedProcess[str]) -> str:
    return reply.stdout.partition("\n")[0]


def _source_directory() -> Path:
    here = Path(__file__).resolve()
    for folder in (here.parent / "csrc", here.parents[2] / "csrc"):  # an installed wheel, a source checkout
        if (folder / SOURCE).is_file():
            return folder
    raise _Unavailable(f"C++ sources not found (looked in {here.parent / 'csrc'} and {here.parents[2] / 'csrc'})")


def _key(sources: Path, compiler: list[str], version: str) -> str:
    """What a library depends on, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in (SOURCE, *HEADERS):
        digest.update((sources / name).read_bytes())
    about = (*FLAGS, *compiler, version, torch.__version__, sys.platform, platform.machine())
    digest.update("\0".join(about).encode())
    return digest.hexdigest()[:16]


def _cache_folders() -> Iterator[Path]:
    """Where libraries are kept, best first: the user's cache, else a folder of the user's own among temporary files."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        yield Path(base) / "gpt2_kernels"
    else:
        with contextlib.suppress(RuntimeError):  # no home folder
            yield Path.home() / ".cache" / "gpt2_kernels"
    user = os.getuid() if hasattr(os, "getuid") else None
    folder = Path(tempfile.gettempdir()) / f"gpt2_kernels-{user}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
        # everybody may write to /tmp: code is loaded only from a real folder that is ours and closed to others
        private = stat.S_ISDIR(facts.st_mode) and not facts.st_mode & 0o077
        if user is not None and private and facts.st_uid == user:
            yield folder


def _find_valid(folder: Path, stem: str) -> Path | None:
    """A library whose contents match the digest in its name. dlopen itself would crash on a truncated one."""
    with contextlib.suppress(OSError):  # a folder that may not be read
        for library in sorted(folder.glob(f"{stem}-*.so")):
            if library.name == _library_name(stem, library):
                return library
            library.unlink()
    return None


def _library_name(stem: str, library: Path) -> str:
    return f"{stem}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def _build(folder: Path, stems: dict[int, str], sources: Path, compiler: list[str]) -> tuple[Path, int]:
    """Compiles into `folder` the first level that compiles; if none does, the error is the last level's, which needs no
    special instructions. Concurrent processes each rename a complete file into place, so none sees a partial one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        library = Path(scratch) / "cpu_ops.so"
        command = [*compiler, *FLAGS, "-isystem", str(root / "include"), SOURCE, "-o", str(library)]
        command += ["-L", str(root / "lib"), "-ltorch_cpu", "-lc10"]  # found again by name: torch is loaded already
        if sys.platform == "darwin":
            command.append(f"-Wl,-rpath,{root / 'lib'}")
        for level, stem in stems.items():  # in `sources`, so that error messages name "cpu_ops.cpp" and no long path
            reply = _run([*command, f"-DGPT2K_LEVEL={level}"], cwd=sources)
            if reply.returncode == 0:
                final = folder / _library_name(stem, library)
                os.replace(library, final)
                return final, level
    raise _Unavailable(f"compiler failed: {_first_error(reply.stderr) or f'exit status {reply.returncode}'}")


def _run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_SECONDS,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},  # messages in English, for _first_error
        )
    except subprocess.TimeoutExpired as error:
        raise _Unavailable(f"compiler failed: no result after {COMPILE_SECONDS} s") from error


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _load_library(library: Path) -> Path:
    """Loads the library and registers the shapes of its results. Raises OSError if the loader refuses it."""
    torch.ops.load_library(str(library))
    torch.library.register_fake("gpt2_kernels_cpu::append_kv_", _fake_append_kv)
    torch.library.register_fake("gpt2_kernels_cpu::paged_attention", _fake_paged_attention)
    torch.library.register_fake("gpt2_kernels_cpu::gelu_", lambda x, tanh: None)
    return library


def _fake_append_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    return None


def _fake_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    return q.new_empty(q.shape)  # (Nq, H, D), contiguous whatever q's strides
