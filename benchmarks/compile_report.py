"""What the compiler makes of every kernel, with no GPU: `python -m benchmarks.compile_report`.

Each case calls a public function on small tensors; `benchmarks.offline` turns the launches into compilations for sm_80,
sm_90 and sm_100. Prints registers, spills, shared memory, occupancy and the instructions that decide speed. Kernels
depend on shapes only through what is constexpr in them, so the small tensors here compile what large ones run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable

import torch
from torch import Tensor

import gpt2_kernels as ops
from benchmarks.offline import analyse, offline
from gpt2_kernels import _runtime

ARCHITECTURES = (80, 90, 100)
COLUMNS = ("HGMMA", "UTCMMA", "HMMA", "LDGSTS", "LDG.128", "LDG")
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def cases() -> dict[str, Callable[[], object]]:
    """Name -> call. Half precision is GPT-2's; float32 is what a check against the reference runs."""
    found: dict[str, Callable[[], object]] = {}
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (64, 80, 128, 256)):
        found[f"attention D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: ops.attention(*_qkv(D, dtype))
        found[f"paged decode D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _paged(D, dtype, 1)
        found[f"paged prefill D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _paged(D, dtype, 7)
    found["attention D=64 fp16"] = lambda: ops.attention(*_qkv(64, torch.float16))
    found["attention D=64 bf16 window"] = lambda: ops.attention(*_qkv(64, torch.bfloat16), window=128)
    found["attention D=64 bf16 full"] = lambda: ops.attention(*_qkv(64, torch.bfloat16), causal=False)
    found["append_kv_ D=64 bf16"] = lambda: _append(torch.bfloat16)
    for dtype, C in itertools.product((torch.bfloat16, torch.float32), (768, 1600, 16384)):
        found[f"layer_norm C={C} {SHORT[dtype]}"] = lambda C=C, dtype=dtype: _norm(C, dtype, False)
        found[f"add_layer_norm C={C} {SHORT[dtype]}"] = lambda C=C, dtype=dtype: _norm(C, dtype, True)
    for dtype, activation in itertools.product((torch.bfloat16, torch.float32), (None, "gelu_tanh")):
        name = f"linear 768x3072 {activation or 'plain'} {SHORT[dtype]}"
        found[name] = lambda dtype=dtype, activation=activation: _linear(768, 3072, dtype, activation)
    found["linear 100x70 gelu bf16"] = lambda: _linear(100, 70, torch.bfloat16, "gelu")
    return found


def _qkv(D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.empty(2, 256, 3, 4, D, dtype=dtype).unbind(2)


def _paged(D: int, dtype: torch.dtype, max_seqlen: int) -> Tensor:
    cache = torch.empty(64, 4, 16, D, dtype=dtype).transpose(1, 2)
    table, lens, cu = (torch.zeros(shape, dtype=torch.int32) for shape in ((16, 32), (16,), (17,)))
    return ops.paged_attention(torch.empty(64, 4, D, dtype=dtype), cache, cache, table, lens, cu, max_seqlen)


def _append(dtype: torch.dtype) -> None:
    cache = torch.empty(64, 12, 16, 64, dtype=dtype).transpose(1, 2)
    k = torch.empty(32, 3, 12, 64, dtype=dtype)
    ops.append_kv_(k[:, 1], k[:, 2], cache, cache.clone(), torch.zeros(32, dtype=torch.int64))


def _norm(C: int, dtype: torch.dtype, add: bool) -> object:
    x, weight = torch.empty(64, C, dtype=dtype), torch.empty(C, dtype=dtype)
    return ops.add_layer_norm(x, x, weight, weight) if add else ops.layer_norm(x, weight, weight)


def _linear(K: int, N: int, dtype: torch.dtype, activation: str | None) -> Tensor:
    weight, bias = torch.empty(N, K, dtype=dtype), torch.empty(N, dtype=dtype)
    return ops.linear(torch.empty(64, K, dtype=dtype), weight, bias, activation=activation)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="repeatable; default all")
    options = parser.parse_args()
    rows = []
    if not options.json:
        print(f"triton {_runtime.triton.__version__}, torch {torch.__version__}")
        print(f"{'case':32} {'sm':>3} {'regs':>4} {'spill':>5} {'shared':>7} {'blk/SM':>6} {'occ':>4} ", end="")
        print(" ".join(f"{c:>7}" for c in COLUMNS))
    for name, call in cases().items():
        if options.only not in name:
            continue
        for cc in options.arch or ARCHITECTURES:
            with torch.no_grad(), _runtime.force("triton"), offline(cc) as log:
                call()
            for entry in log:
                report = analyse(entry, cc)
                rows.append({"case": name, **dataclasses.asdict(report), "over_limit": report.over_limit})
                if not options.json:
                    r = report
                    print(f"{name:32} {cc:3d} {r.registers:4d} {r.spills:5d} {r.shared_bytes / 1024:6.1f}K ", end="")
                    print(f"{r.blocks_per_sm:6d} {100 * r.occupancy:3.0f}% ", end="")
                    print(" ".join(f"{r.instructions.get(c, 0):7d}" for c in COLUMNS), flush=True)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
