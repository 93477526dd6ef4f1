"""Run by test_offline_tool.py in a process without TRITON_INTERPRET: compiles three kernels, prints reports as JSON."""

import dataclasses
import json

import torch
import triton
import triton.language as tl

from benchmarks.offline import analyse, offline


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows, columns, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a = tl.load(a_ptr + rows[:, None] * K + (k + inner)[None, :])  # (BM, BK)
        b = tl.load(b_ptr + columns[:, None] * K + (k + inner)[None, :])  # (BN, BK)
        total = tl.dot(a, b.T, total)
    tl.store(c_ptr + rows[:, None] * BN + columns[None, :], total)


@triton.jit
def subtract_max(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x - tl.max(x, 0))


@triton.autotune(configs=[triton.Config({"BLOCK": 256}), triton.Config({"BLOCK": 512})], key=[])
@triton.jit
def tuned_copy(x_ptr, y_ptr, BLOCK: tl.constexpr = 128):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))


def run_matmul(device: str, block: int, stages: int) -> None:
    a = torch.empty(block, 1024, dtype=torch.bfloat16, device=device)
    c = torch.empty(block, block, dtype=torch.float32, device=device)
    matmul[(1,)](a, a, c, 1024, BM=block, BN=block, BK=64, num_stages=stages)


def run_subtract_max(**options) -> None:
    x = torch.empty(8192)
    subtract_max[lambda meta: (8192 // meta["BLOCK"],)](x, x, BLOCK=4096, **options)


def main() -> None:
    reports = {}
    for cc in (80, 90, 100):
        with offline(cc) as entries:
            run_matmul("meta", 64, 3)
        reports[f"matmul {cc}"] = analyse(entries[0], cc)
    with offline(90) as entries:
        run_matmul("cpu", 128, 8)
        run_subtract_max()
        run_subtract_max(maxnreg=32)
    for name, entry in zip(("too much shared memory", "plain", "spilling"), entries, strict=True):
        reports[name] = analyse(entry, 90)
    with offline(90) as entries:
        x = torch.empty(1024)
        tuned_copy[lambda meta: (1024 // meta["BLOCK"],)](x, x)
    with offline(90, compile=False) as seen:  # two launches of one variant, then another option, then another argument
        run_matmul("cpu", 64, 3)
        run_matmul("cpu", 64, 3)
        run_matmul("cpu", 64, 2)
        matmul[(1,)](*[torch.empty(64, 64)] * 3, 1023, BM=64, BN=64, BK=64)
    with offline(90) as compiled:
        run_matmul("cpu", 64, 3)
    output = {name: {**dataclasses.asdict(report), "over_limit": report.over_limit} for name, report in reports.items()}
    fingerprints = [entry.fingerprint for entry in (*seen, *compiled)]
    compiled_at_all = [entry.kernel is not None for entry in (*seen, *compiled)]
    grids = [entry.grid for entry in entries]
    print(
        json.dumps({"reports": output, "tuned grids": grids, "fingerprints": fingerprints, "compiled": compiled_at_all})
    )


if __name__ == "__main__":
    main()
