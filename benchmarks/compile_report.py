"""What the compiler makes of every kernel, with no GPU: `python -m benchmarks.compile_report`.

Each case calls a public function on small tensors; `benchmarks.offline` turns the launches into compilations for sm_80,
sm_90 and sm_100. Prints registers, spills, shared memory, occupancy and the instructions that decide speed. Kernels
depend on shapes only through what is constexpr in them, so the small tensors here compile what large ones run.

The table is kept for each version of Triton, results/compile_triton_*.txt, so that a change of a kernel shows in review
as what it did to the machine code. `--write` brings it up to date and compiles only what has changed.
A new operator has one line here in each of three places: `cases()`, `lengths()`, and MMA in tests/test_offline.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpt2_kernels as ops
from benchmarks.offline import Entry, analyse, offline
from gpt2_kernels import _runtime

ARCHITECTURES = (80, 90, 100)
MMA = ("HGMMA", "UTCMMA", "HMMA")  # tensor cores of Hopper, Blackwell and Ampere
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# What `--check` compiles anew whatever has changed: where GPT-2 spends its time. The others are compared by what the
# compiler is given, which takes 20 ms each instead of a second, and which decides what it makes of them.
CHECKED = (
    "attention D=64 bf16",
    "paged decode D=64 bf16",
    "paged prefill D=64 bf16",
    "linear 768x3072 gelu_tanh bf16",
    "layer_norm C=768 bf16",
)


def cases() -> dict[str, Callable[[], object]]:
    """Name -> call. Half precision is GPT-2's; float32 is what a check against the reference runs."""
    found: dict[str, Callable[[], object]] = {}
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (64, 80, 128, 256)):
        found[f"attention D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _attention(_qkv(D, dtype))
        found[f"paged decode D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _paged(D, dtype, 1)
        found[f"paged prefill D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _paged(D, dtype, 7)
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (64, 80, 128, 256)):
        found[f"paged decode grouped D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _paged(D, dtype, 1, H=12)
    found["paged decode D=64 bf16 window"] = lambda: _paged(64, torch.bfloat16, 1, window=100)
    found["paged decode D=64 fp16"] = lambda: _paged(64, torch.float16, 1)
    found["attention D=64 fp16"] = lambda: _attention(_qkv(64, torch.float16))
    found["attention D=64 bf16 window"] = lambda: _attention(_qkv(64, torch.bfloat16), window=128)
    found["attention D=64 bf16 full"] = lambda: _attention(_qkv(64, torch.bfloat16), causal=False)
    found["attention D=64 bf16 dropout"] = lambda: _attention(_qkv(64, torch.bfloat16), dropout_p=0.1)
    found["attention D=64 bf16 packed"] = lambda: _attention(_qkv(64, torch.bfloat16), packed=True)
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (64, 80, 128, 256)):
        found[f"attention_map D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _map(D, dtype, None)
    found["attention_map D=64 bf16 window"] = lambda: _map(64, torch.bfloat16, 128)
    found["attention_map D=64 bf16 full"] = lambda: _map(64, torch.bfloat16, None, causal=False)
    found["attention_map D=64 bf16 full window"] = lambda: _map(64, torch.bfloat16, 128, causal=False)
    found["append_kv_ D=64 bf16"] = lambda: _append(torch.bfloat16)
    found["advance_"] = _advance
    found["append_kv_ D=64 bf16 fp8"] = lambda: _append(torch.bfloat16, float8=True)
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (64, 80, 128, 256)):
        for name, H, queries in (("decode", 4, 1), ("decode grouped", 12, 1), ("prefill", 4, 7)):
            call = functools.partial(_paged, D, dtype, queries, H=H, float8=True)
            found[f"paged {name} D={D} {SHORT[dtype]} fp8"] = call
    for dtype, V in itertools.product((torch.bfloat16, torch.float32), (1000, 50257)):
        found[f"cross_entropy V={V} {SHORT[dtype]}"] = lambda V=V, dtype=dtype: _cross_entropy(V, dtype)
    found["linear_cross_entropy V=50257 bf16"] = _linear_cross_entropy
    for dtype, C in itertools.product((torch.bfloat16, torch.float32), (768, 1600, 16384)):
        found[f"layer_norm C={C} {SHORT[dtype]}"] = lambda C=C, dtype=dtype: _norm(C, dtype, False)
        found[f"add_layer_norm C={C} {SHORT[dtype]}"] = lambda C=C, dtype=dtype: _norm(C, dtype, True)
        found[f"layer_norm_backward C={C} {SHORT[dtype]}"] = lambda C=C, dtype=dtype: _norm_backward(C, dtype, False)
    for dtype, C in itertools.product((torch.bfloat16, torch.float32), (768, 1600, 4096, 8192)):
        name = f"add_layer_norm_backward C={C} {SHORT[dtype]}"
        found[name] = lambda C=C, dtype=dtype: _norm_backward(C, dtype, True)
    for dtype, activation in itertools.product((torch.bfloat16, torch.float32), (None, "gelu_tanh")):
        name = f"linear 768x3072 {activation or 'plain'} {SHORT[dtype]}"
        found[name] = lambda dtype=dtype, activation=activation: _linear(768, 3072, dtype, activation)
    for dtype, history in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        name = f"sample V=50257 {SHORT[dtype]}{' history' if history else ''}"
        found[name] = lambda dtype=dtype, history=history: _sample(50257, dtype, history)
    found["sample V=64 fp32"] = lambda: _sample(64, torch.float32, False)
    found["sample V=262144 fp16"] = lambda: _sample(262144, torch.float16, False)
    for dtype, activation in itertools.product((torch.bfloat16, torch.float32), ("", "gelu_tanh", "gelu")):
        name = f"linear_backward {activation or 'plain'} {SHORT[dtype]}"
        found[name] = lambda dtype=dtype, activation=activation: _linear_backward(768, 3072, dtype, activation)
    found["linear 768x768 residual bf16"] = lambda: _linear(768, 768, torch.bfloat16, None, residual=True)
    found["linear gelu_tanh kept bf16"] = lambda: _linear_kept(768, 3072, torch.bfloat16, "gelu_tanh")
    found["linear 100x70 gelu_tanh bf16"] = lambda: _linear(100, 70, torch.bfloat16, "gelu_tanh")
    return found


def _qkv(D: int, dtype: torch.dtype, T: int = 256) -> tuple[Tensor, ...]:
    return torch.empty(2, T, 3, 4, D, dtype=dtype).unbind(2)


def _attention(qkv: tuple[Tensor, ...], packed: bool = False, **options: Any) -> tuple[Tensor, ...]:
    """Forward and backward."""
    with torch.enable_grad():
        q, k, v = (t.requires_grad_() for t in qkv)
        if packed:
            cu = torch.zeros(9, dtype=torch.int32)
            out = ops.attention_varlen(*(t.flatten(0, 1) for t in (q, k, v)), cu, cu, 256, 256, **options)
        else:
            out = ops.attention(q, k, v, **options)
        return torch.autograd.grad(out, (q, k, v), torch.empty_like(out))


def _paged(
    D: int,
    dtype: torch.dtype,
    max_seqlen: int,
    *,
    H: int = 4,
    S: int = 16,
    rows: int = 64,
    num_blocks: int = 64,
    max_blocks: int = 32,
    window: int | None = None,
    float8: bool = False,
) -> Tensor:
    cache = torch.empty(num_blocks, 4, 16, D, dtype=torch.float8_e4m3fn if float8 else dtype).transpose(1, 2)
    scale = torch.ones(4) if float8 else None
    table, lens, cu = (torch.zeros(shape, dtype=torch.int32) for shape in ((S, max_blocks), (S,), (S + 1,)))
    q = torch.empty(max(rows, S), H, D, dtype=dtype)
    options = {"window": window, "k_scale": scale, "v_scale": scale}
    return ops.paged_attention(q, cache, cache, table, lens, cu, max_seqlen, **options)


def _map(D: int, dtype: torch.dtype, window: int | None, causal: bool = True, rows: int = 256, Tk: int = 256) -> object:
    q, k = _qkv(D, dtype, T=1024)[0], _qkv(D, dtype, T=Tk)[1]
    return ops.attention_map(q, k, torch.empty(2, 4, 1024), rows=range(rows), causal=causal, window=window)


def _append(dtype: torch.dtype, N: int = 32, num_blocks: int = 64, float8: bool = False) -> None:
    cache = torch.empty(num_blocks, 12, 16, 64, dtype=torch.float8_e4m3fn if float8 else dtype).transpose(1, 2)
    k, scale = torch.empty(N, 3, 12, 64, dtype=dtype), torch.ones(12) if float8 else None
    slots = torch.zeros(N, dtype=torch.int64)
    ops.append_kv_(k[:, 1], k[:, 2], cache, cache.clone(), slots, k_scale=scale, v_scale=scale)


def _advance(S: int = 64, max_blocks: int = 64) -> None:
    drawn, tokens, positions, slots, limits, ends = torch.zeros(6, S, dtype=torch.int64)
    table = torch.zeros(S, max_blocks, dtype=torch.int32)
    record, count = torch.zeros(8, S, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    ops.advance_(drawn, tokens, positions, slots, table[:, 0].clone(), limits, ends, table, record, count, 16)


def _cross_entropy(V: int, dtype: torch.dtype, R: int = 64) -> Tensor:
    """Forward and backward of dense rows, which start at any multiple of an element's size."""
    with torch.enable_grad():
        logits = torch.empty(R, V, dtype=dtype, requires_grad=True)
        loss = ops.cross_entropy(logits, torch.zeros(R, dtype=torch.int64))
        return torch.autograd.grad(loss, logits)[0]


def _linear_cross_entropy() -> object:
    """One row and so one chunk, whose gradient replaces it."""
    x, weight = torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(50257, 8, dtype=torch.bfloat16)
    return torch.ops.gpt2_kernels.linear_cross_entropy(x, weight, torch.zeros(1, dtype=torch.int64), -100, True, True)


def _norm(C: int, dtype: torch.dtype, add: bool, M: int = 64) -> object:
    x, weight = torch.empty(M, C, dtype=dtype), torch.empty(C, dtype=dtype)
    return ops.add_layer_norm(x, x, weight, weight) if add else ops.layer_norm(x, weight, weight)


def _norm_backward(C: int, dtype: torch.dtype, add: bool, M: int = 64) -> object:
    x, weight, statistics = torch.empty(M, C, dtype=dtype), torch.empty(C, dtype=dtype), torch.empty(2, M)
    backward = torch.ops.gpt2_kernels.layer_norm_backward
    return backward(x, x if add else None, x, weight, statistics, True, True, True)


def _linear(K: int, N: int, dtype: torch.dtype, activation: str | None, M: int = 64, residual: bool = False) -> Tensor:
    weight, bias = torch.empty(N, K, dtype=dtype), torch.empty(N, dtype=dtype)
    other = torch.empty(M, N, dtype=dtype) if residual else None
    return ops.linear(torch.empty(M, K, dtype=dtype), weight, bias, activation=activation, residual=other)


def _linear_kept(K: int, N: int, dtype: torch.dtype, activation: str) -> object:
    """Forward in training: the input of the activation is written too."""
    weight, bias = torch.empty(N, K, dtype=dtype), torch.empty(N, dtype=dtype)
    return torch.ops.gpt2_kernels.linear(torch.empty(64, K, dtype=dtype), weight, bias, None, activation, True, True)


def _linear_backward(K: int, N: int, dtype: torch.dtype, activation: str, M: int = 64) -> Tensor:
    """From the N outputs of a layer to its K inputs, and through the activation that made them."""
    grad, weight = torch.empty(M, N, dtype=dtype), torch.empty(N, K, dtype=dtype)
    pre = torch.empty(M, K, dtype=dtype) if activation else None
    return torch.ops.gpt2_kernels.linear_backward(grad, weight, pre, activation, True)


def _sample(V: int, dtype: torch.dtype, history: bool, S: int = 16, top_logprobs: int = 5) -> object:
    real, whole = torch.ones(S), torch.ones(S, dtype=torch.int64)
    return ops.sample(
        torch.empty(S, V, dtype=dtype),
        temperature=real,
        top_k=whole,
        top_p=real,
        min_p=real,
        seeds=whole,
        positions=whole,
        history=torch.zeros(S, V, dtype=torch.bool) if history else None,
        repetition_penalty=real if history else None,
        top_logprobs=top_logprobs,
    )


# --- sizes that a user varies from call to call ---------------------------------------------------------------------

# Equal to 1, divisible by 16, or neither: what Triton tells apart; and each side of a block.
LENGTHS = (1, 2, 15, 16, 17, 64, 100, 512, 1000, 1024)


def lengths() -> dict[str, Callable[[int], object]]:
    """Name -> call with a number of rows, queries, keys or sequences, none of which may decide what is compiled."""
    bf16 = torch.bfloat16
    return {
        "attention T": lambda n: _attention(_qkv(64, bf16, T=n)),
        "attention Tq": lambda n: ops.attention(_qkv(64, bf16, T=n)[0], *_qkv(64, bf16, T=1024)[1:]),
        "attention packed T": lambda n: _attention(_qkv(64, bf16, T=n), packed=True),
        "attention_map rows": lambda n: _map(64, bf16, None, rows=n),
        "attention_map Tk": lambda n: _map(64, bf16, None, Tk=n),
        "paged decode S": lambda n: _paged(64, bf16, 1, S=n),
        "paged prefill S": lambda n: _paged(64, bf16, 300, S=n),
        "paged prefill Tq": lambda n: _paged(64, bf16, n + 1),
        "paged decode max_blocks": lambda n: _paged(64, bf16, 1, max_blocks=n),
        "paged decode num_blocks": lambda n: _paged(64, bf16, 1, num_blocks=n),
        "paged decode rows": lambda n: _paged(64, bf16, 1, rows=n, S=1),
        "paged decode window": lambda n: _paged(64, bf16, 1, window=n),
        "advance_ S": lambda n: _advance(S=n),
        "advance_ max_blocks": lambda n: _advance(max_blocks=n),
        "append_kv_ N": lambda n: _append(bf16, N=n),
        "append_kv_ num_blocks": lambda n: _append(bf16, num_blocks=n),
        "cross_entropy R": lambda n: _cross_entropy(50257, bf16, R=n),
        "layer_norm M": lambda n: _norm(768, bf16, False, M=n),
        "add_layer_norm M": lambda n: _norm(768, bf16, True, M=n),
        "layer_norm_backward M": lambda n: _norm_backward(768, bf16, False, M=n),
        "sample S": lambda n: _sample(50257, bf16, True, S=n),
        "sample V": lambda n: _sample(4097 + n, bf16, False),
        "sample top_logprobs": lambda n: _sample(50257, bf16, False, top_logprobs=min(n, 32)),
        "linear_backward M": lambda n: _linear_backward(768, 3072, bf16, "gelu_tanh", M=n),
        "linear M": lambda n: _linear(768, 3072, bf16, "gelu_tanh", M=n),
    }


def variants(cc: int = 90) -> dict[str, dict[str, int]]:
    """How many machine codes of each kernel the calls of `lengths()` ask for over all of LENGTHS; compiles nothing."""
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
    regs: int  # a thread
    spills: int  # instructions that touch local memory
    shared: int  # bytes a block
    blocks: int  # resident on an SM; 0 cannot be launched
    occupancy: str
    mma: str  # tensor-core instructions, "-" where there are none
    tma: int  # UTMALDG
    cp_async: int  # LDGSTS
    ldg: int  # other loads from global memory
    ldg_128: int  # and how many of those are of 16 bytes
    fingerprint: str  # of what the compiler was given: comments and line numbers are not in it

    @property
    def launch(self) -> tuple[str, str, int, str]:
        return self.case, self.kernel, self.sm, self.fingerprint

    @property
    def exact(self) -> tuple[object, ...]:
        """What builds of one compiler must agree on; registers and counts may differ a little between them."""
        return self.spills, self.blocks, self.mma, self.tma > 0, self.ldg == self.ldg_128


FORMAT = "{:36} {:28} {:>3} {:>4} {:>6} {:>7} {:>6} {:>9} {:>6} {:>3} {:>8} {:>4} {:>7} {:>11}"
HEADER = FORMAT.format(*(field.name for field in dataclasses.fields(Row)))


def entries(name: str, sm: int, compile: bool) -> list[Entry]:
    """The launches of a case; none of a float8 cache on sm_80, where it is refused."""
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
    """Compiles cases in as many processes as there are cores; in order, as they come."""
    workers = min(len(names), os.cpu_count() or 1)
    if workers < 2:
        yield from (rows(name, architectures) for name in names)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(functools.partial(rows, architectures=tuple(architectures)), names)


# --- the snapshot: the table as it was when somebody last looked ----------------------------------------------------


def snapshot_path(version: str) -> Path:
    """Triton's minor versions have a file each: 3.7.1 -> results/compile_triton_3.7.txt."""
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
    """Cases of which some launch is not the snapshot's; nothing is compiled to find out."""
    known: dict[str, list[tuple[str, str, int, str]]] = {}
    for row in old:
        known.setdefault(row.case, []).append(row.launch)
    now = {
        name: [(name, e.name, sm, e.fingerprint) for sm in ARCHITECTURES for e in entries(name, sm, compile=False)]
        for name in cases()
    }
    return [name for name in now if known.get(name) != now[name]]


def write(version: str) -> None:
    """Bring the snapshot up to date, compiling what has changed."""
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
    """What is wrong with the snapshot: cases that have changed since, and chosen ones that compile differently."""
    path = snapshot_path(version)
    old_version, old = read_snapshot(path)
    if not old:
        return [f"{path} is missing or of another form"]
    wrong = []
    if old_version == version:  # another patch of Triton may build other code from the same kernels, rightly
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
