"""What every kernel compiles to, with no GPU: `python -m benchmarks.compile_report`.

The cases in compile_cases.py call public functions on small tensors; `benchmarks.offline` turns their launches into
compilations for sm_80, sm_90 and sm_100. Prints registers, spills, shared memory, occupancy and the instructions that
decide speed.

A snapshot of the table is kept for each version of Triton, results/compile_triton_*.txt, so that a review of a kernel
change shows what it did to the machine code. `--write` updates it and compiles only what has changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.compile_cases import LENGTHS, cases, lengths
from benchmarks.offline import Entry, analyse, offline
from gpt2_kernels import _runtime

ARCHITECTURES = (80, 90, 100)
MMA = ("HGMMA", "UTCMMA", "HMMA")  # tensor cores of Hopper, Blackwell and Ampere

# What `--check` always recompiles: where GPT-2 spends its time. For the others only the compiler's input is compared,
# which determines its output and takes 20 ms each instead of a second.
CHECKED = (
    "attention D=64 bf16",
    "paged decode D=64 bf16",
    "paged prefill D=64 bf16",
    "linear 768x3072 gelu_tanh bf16",
    "layer_norm C=768 bf16",
)


def variants(cc: int = 90) -> dict[str, dict[str, int]]:
    """How many variants of each kernel the calls of `lengths()` need over all of LENGTHS; compiles nothing."""
    found = {}
    for name, call in lengths().items():
        with torch.no_grad(), _runtime.force("triton"), offline(cc, compile=False) as log:
            for n in LENGTHS:
                call(n)
        found[name] = dict(Counter(kernel for kernel, _ in {(entry.name, entry.fingerprint) for entry in log}))
    return found


# --- the table ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One launch of a case on one architecture; the fields are the columns of the table and of the snapshot."""

    case: str
    kernel: str
    sm: int
    regs: int  # per thread
    spills: int  # instructions that touch local memory
    shared: int  # bytes per block
    blocks: int  # resident on an SM; 0: cannot be launched
    occupancy: str
    mma: str  # tensor-core instructions, "-" if none
    tma: int  # UTMALDG
    cp_async: int  # LDGSTS
    ldg: int  # other loads from global memory
    ldg_128: int  # how many of those load 16 bytes
    fingerprint: str  # of the compiler's input, without comments and line numbers

    @property
    def launch(self) -> tuple[str, str, int, str]:
        return self.case, self.kernel, self.sm, self.fingerprint

    @property
    def exact(self) -> tuple[object, ...]:
        """What builds of the same compiler must agree on; registers and counts may differ a little between them."""
        return self.spills, self.blocks, self.mma, self.tma > 0, self.ldg == self.ldg_128


FORMAT = "{:36} {:28} {:>3} {:>4} {:>6} {:>7} {:>6} {:>9} {:>6} {:>3} {:>8} {:>4} {:>7} {:>11}"
HEADER = FORMAT.format(*(field.name for field in dataclasses.fields(Row)))


def entries(name: str, sm: int, compile: bool) -> list[Entry]:
    """The launches of a case; none for a float8 cache on sm_80, where it is refused."""
    if "fp8" in name and sm < 89:
        return []
    with torch.no_grad(), _runtime.force("triton"), offline(sm, compile=compile) as log:
        cases()[name]()
    return log


def rows(name: str, architectures: Iterable[int] = ARCHITECTURES) -> list[Row]:
    """Compiles a case."""
    found = []
    for sm in architectures:
        for entry in entries(name, sm, compile=True):
            report = analyse(entry, sm)
            count = report.instructions
            found.append(
                Row(
                    case=name,
                    kernel=report.name,
                    sm=sm,
                    regs=report.registers,
                    spills=report.spills,
                    shared=report.shared_bytes,
                    blocks=report.blocks_per_sm,
                    occupancy=f"{100 * report.occupancy:.0f}%",
                    mma="+".join(mma for mma in MMA if count[mma]) or "-",
                    tma=count["UTMALDG"],
                    cp_async=count["LDGSTS"],
                    ldg=count["LDG"],
                    ldg_128=count["LDG.128"],
                    fingerprint=entry.fingerprint,
                )
            )
    return found


def rows_of_all(names: list[str], architectures: Iterable[int] = ARCHITECTURES) -> Iterator[list[Row]]:
    """Compiles cases in as many processes as there are cores; yields rows in order, as they are ready."""
    workers = min(len(names), os.cpu_count() or 1)
    if workers < 2:
        yield from (rows(name, architectures) for name in names)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(functools.partial(rows, architectures=tuple(architectures)), names)


# --- the snapshot: the table as it was when somebody last looked ----------------------------------------------------


def snapshot_path(version: str) -> Path:
    """One file per minor version of Triton: 3.7.1 -> results/compile_triton_3.7.txt."""
    return Path(__file__).with_name("results") / f"compile_triton_{'.'.join(version.split('.')[:2])}.txt"


def read_snapshot(path: Path) -> tuple[str, list[Row]]:
    """(Triton's version, rows)."""
    if not path.exists():
        return "", []
    first, header, *lines = path.read_text(encoding="utf-8").splitlines()
    if header != HEADER:
        return "", []
    types = [int if field.type == "int" else str for field in dataclasses.fields(Row)]
    found = []
    for line in lines:
        cells = [line[:36].strip(), *line[36:].split()]
        found.append(Row(*(type_(cell) for type_, cell in zip(types, cells, strict=True))))
    return first.split()[1].rstrip(":"), found


def format_row(row: Row) -> str:
    return FORMAT.format(*dataclasses.astuple(row)).rstrip()


def stale(old: list[Row]) -> list[str]:
    """Cases with a launch that differs from the snapshot; found without compiling."""
    known: dict[str, list[tuple[str, str, int, str]]] = {}
    for row in old:
        known.setdefault(row.case, []).append(row.launch)
    now = {
        name: [(name, e.name, sm, e.fingerprint) for sm in ARCHITECTURES for e in entries(name, sm, compile=False)]
        for name in cases()
    }
    return [name for name in now if known.get(name) != now[name]]


def write(version: str) -> None:
    """Updates the snapshot, compiling what has changed."""
    path = snapshot_path(version)
    old_version, old = read_snapshot(path)
    old = old if old_version == version else []
    changed = stale(old)
    table = {name: [row for row in old if row.case == name] for name in cases()}
    for name, fresh in zip(changed, rows_of_all(changed)):
        table[name] = fresh
        for row in fresh:
            print(format_row(row), flush=True)
    lines = [f"triton {version}: python -m benchmarks.compile_report --write", HEADER]
    lines += [format_row(row) for name in table for row in table[name]]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(changed)} of {len(table)} cases compiled, {path}")


def check(version: str) -> list[str]:
    """What is wrong with the snapshot: cases that have changed since, and CHECKED ones that compile differently."""
    path = snapshot_path(version)
    old_version, old = read_snapshot(path)
    if not old:
        return [f"{path} is missing or of another form"]
    wrong = []
    if old_version == version:  # another patch release of Triton may rightly build other code
        wrong += [f"{name}: not what the snapshot was made of" for name in stale(old)]
        wrong += [f"{name}: no such case any more" for name in sorted({row.case for row in old} - set(cases()))]
    for name, fresh in zip(CHECKED, rows_of_all(list(CHECKED))):
        before = [row for row in old if row.case == name]
        if [r.exact for r in before] != [r.exact for r in fresh]:
            wrong += [f"{name}: spills, blocks, mma, tma or width of loads differ", HEADER]
            wrong += [f"- {format_row(row)}" for row in before] + [f"+ {format_row(row)}" for row in fresh]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="repeatable; default all")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="bring the snapshot up to date, compiling what changed")
    action.add_argument("--check", action="store_true", help="compare with the snapshot; exit status 1 if it differs")
    action.add_argument("--variants", action="store_true", help="count the machine codes that lengths ask for")
    options = parser.parse_args()
    version = _runtime.triton.__version__
    if options.write:
        write(version)
    elif options.check:
        wrong = check(version)
        print("\n".join(wrong) or f"{snapshot_path(version)} holds")
        if wrong:
            sys.exit(
                f"to see what changed: python -m benchmarks.compile_report --write, and git diff (triton {version})"
            )
    elif options.variants:
        print(f"machine codes for lengths {', '.join(map(str, LENGTHS))}")
        for name, counts in variants().items():
            print(f"{name:28} {', '.join(f'{kernel} {count}' for kernel, count in counts.items())}")
    else:
        print(f"triton {version}, torch {torch.__version__}")
        print(HEADER)
        names = [name for name in cases() if options.only in name]
        for found in rows_of_all(names, options.arch or ARCHITECTURES):
            for row in found:
                print(format_row(row), flush=True)


if __name__ == "__main__":
    main()
