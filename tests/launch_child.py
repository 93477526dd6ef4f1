"""Run by test_launch.py in a process without TRITON_INTERPRET: compares _launch.launch with Triton's own way."""

import itertools
import json
import random

import torch
import triton
import triton.language as tl
from triton.runtime import jit

from benchmarks import host_time
from benchmarks.offline import offline
from gpt2_kernels import _launch

launch = _launch.launch


@triton.jit(do_not_specialize=["m"])
def kernel(a_ptr, b_ptr, c_ptr, n, m, scale, BLOCK: tl.constexpr, KIND: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = i * scale + n + m + KIND
    if b_ptr is not None:
        value += tl.load(b_ptr + i)
    if c_ptr is not None:
        value *= tl.load(c_ptr + i)
    tl.store(a_ptr + i, value.to(a_ptr.dtype.element_ty))


def main() -> None:
    result: dict[str, object] = {}
    with host_time.idle_driver() as launches:
        active = triton.runtime.driver.active
        ran: list[tuple] = []  # (the compiled variant's launcher, grid)

        class Recording(active.launcher_cls):
            def __call__(self, *args):
                ran.append((self, args[:3]))
                return super().__call__(*args)

        active.launcher_cls = Recording
        own_way = 0
        compute = jit.compute_cache_key

        def counted(*args):
            nonlocal own_way
            own_way += 1
            return compute(*args)

        jit.compute_cache_key = counted

        # every pair of values that Triton may specialize on, in a mixed order, twice
        storage = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int32)}
        tensors = [t[offset : offset + 16] for t in storage.values() for offset in (0, 1)]
        tensors.append(torch.nn.Parameter(storage[torch.float32][:16]))
        integers = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31 - 16, 2**31, -(2**31), -(2**31) - 1, 2**62, True]
        base = (tensors[0], tensors[2], None, 3, 3, 0.5)
        calls = [(t, *base[1:]) for t in tensors]
        calls += [(base[0], b, c, *base[3:]) for b, c in itertools.permutations([*tensors, None], 2)]
        calls += [(*base[:3], n, *base[4:]) for n in integers]
        calls += [(*base[:4], m, base[5]) for m in integers]
        calls += [(*base[:5], scale) for scale in (0.0, 1.0, 2, 16, True)]
        # the same values under swapped names, the same names in another order, another value, another option
        options = [dict(BLOCK=16, KIND=8), dict(KIND=16, BLOCK=8), dict(KIND=8, BLOCK=16), dict(BLOCK=16, KIND=0)]
        options.append(dict(BLOCK=16, KIND=8, num_warps=2))
        calls = [*itertools.product(calls, options[:1]), *itertools.product(calls[:2] + calls[-2:], options[1:])]
        all_of_them = calls * 2
        random.Random(0).shuffle(all_of_them)
        different, direct = [], 0
        for args, meta in all_of_them:
            before = own_way
            launch(kernel, (1,), *args, **meta)
            direct += own_way == before
            mine = ran[-1][0]
            kernel[(1,)](*args, **meta)
            if mine is not ran[-1][0]:
                different.append(str((args[3:], meta)))
        result["different"], result["direct"], result["calls"] = different, direct, len(all_of_them)

        def took_the_short_way(*args, grid=(1,), **meta) -> bool:
            before, count = own_way, launches()
            launch(kernel, grid, *args, **{"BLOCK": 16, "KIND": 0, **meta})
            assert launches() == count + 1
            return own_way == before

        result["again"] = took_the_short_way(*base)
        result["unaligned"] = took_the_short_way(tensors[1], *base[1:])
        for grid in ((2,), (2, 3), (2, 3, 4)):
            took_the_short_way(*base, grid=grid)
        result["grids"] = [grid for _, grid in ran[-3:]]

        seen = []
        triton.knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
        result["with a hook"] = took_the_short_way(*base)
        triton.knobs.runtime.launch_enter_hook.calls.clear()
        result["hook saw"] = seen
        result["after the hook"] = took_the_short_way(*base)
        triton.knobs.runtime.debug = True
        result["debug"] = took_the_short_way(*base)  # another variant, for device_assert
        triton.knobs.runtime.debug = False
        kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append("pre"))
        result["with a pre-run hook"] = took_the_short_way(*base)
        kernel.pre_run_hooks.clear()
        run = jit.JITFunction.run
        jit.JITFunction.run = lambda *args, **kwargs: seen.append("run") or run(*args, **kwargs)
        result["with run replaced"] = took_the_short_way(*base)
        jit.JITFunction.run = run
        with offline(90, compile=False) as entries:
            launch(kernel, (5,), *base, BLOCK=16, KIND=0)
        result["offline saw"] = [(e.name, e.grid) for e in entries]

    jit.compute_cache_key = compute
    with host_time.idle_driver() as launches:
        count = launches()
        table = host_time.measure(torch.device("cpu"), lambda call: float(bool(call() is None)))
        result["measured"], result["launches"] = list(table), launches() - count
    print(json.dumps(result))


if __name__ == "__main__":
    main()
