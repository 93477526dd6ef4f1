"""`python -m gpt2_kernels.warmup --model gpt2 --dtype bf16`: compile before the first request, and say what it took.

Kernels are compiled at their first call, once for a shape's constants (widths, dtype, options, never lengths), into
Triton's cache on disk. This calls every operator that the model and its training need on small inputs of its widths;
the processes that follow find the results. Without a GPU it compiles the C++ operators, which is all there is to do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import gpt2_kernels as ops
from gpt2_kernels import _native, _runtime


class Widths(NamedTuple):
    width: int
    heads: int
    vocab: int


MODELS = {
    "gpt2": Widths(768, 12, 50257),
    "gpt2-medium": Widths(1024, 16, 50257),
    "gpt2-large": Widths(1280, 20, 50257),
    "gpt2-xl": Widths(1600, 25, 50257),
    "storybook": Widths(256, 4, 4096),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def calls(sizes: Widths, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Name -> a call of everything that generating with, and training, a GPT-2 of these widths compiles."""
    C, H, V = sizes
    D = C // H

    def tensor(*shape: int, gradient: bool = False) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_(gradient)

    def train(function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        out = function(*(tensor(*shape, gradient=True) for shape in shapes))
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def paged(queries: int) -> None:
        cache = tensor(8, H, 16, D).transpose(1, 2)  # as the engine keeps it
        where = ints(0, 1, 2, 3).view(1, 4), ints(40)
        q, k, v = tensor(queries, 3, H, D).unbind(1)
        slots = torch.full((queries,), 23, device=device)  # where the last of 40 keys lies
        if queries == 1:
            ops.paged_decode_(q, k, v, cache, cache.clone(), slots, *where)
        else:
            ops.append_kv_(k[:1], v[:1], cache, cache.clone(), slots[:1])
            ops.paged_attention(q, cache, cache, *where, ints(0, queries), queries)

    def sampled() -> None:
        one = torch.ones(1, device=device)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        options: dict[str, Any] = dict(
            temperature=one, top_k=zero + 40, top_p=one, min_p=0 * one, seeds=zero, positions=zero
        )
        ops.sample(tensor(1, V), **options)

    def advanced() -> None:
        longs = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(7)]
        drawn, tokens, positions, slots, limits, ends, count = longs
        state = tokens, positions, slots, ints(1), limits + 9, ends + 1
        ops.advance_(drawn, *state, ints(0, 1).view(1, 2), drawn.new_zeros(4, 1), count, 16)

    def products(decode: bool) -> None:
        x, w = tensor(16, C), tensor(C)
        ops.linear(x, tensor(3 * C, C), tensor(3 * C), decode=decode)
        ops.linear(x, tensor(C, C), w, residual=x, decode=decode)
        ops.gelu_mlp(x, tensor(4 * C, C), tensor(4 * C), tensor(C, 4 * C), w, residual=x, decode=decode)
        ops.linear(x, tensor(V, C), decode=decode)

    def inference() -> None:
        ops.layer_norm(tensor(2, 16, C), w := tensor(C), w)
        ops.attention_qkvpacked(tensor(1, 16, 3, H, D))
        products(decode=False)

    def decoded() -> None:
        paged(1)
        products(decode=True)

    def stream(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y, x = ops.layer_norm(x, w, b, prenorm=True)
        return x + y

    heads, row = (2, 16, H, D), (2, 16, C)
    targets = torch.zeros(2, 16, dtype=torch.int64, device=device)
    return {
        "inference": torch.no_grad()(inference),
        "decode": torch.no_grad()(decoded),
        "prefill": torch.no_grad()(lambda: paged(24)),
        "advance": torch.no_grad()(advanced),
        "sample": torch.no_grad()(sampled),
        "training: layer_norm": lambda: train(ops.layer_norm, row, (C,), (C,)),
        "training: layer_norm, prenorm": lambda: train(stream, row, (C,), (C,)),
        "training: add_layer_norm": lambda: train(ops.add_layer_norm, row, row, (C,), (C,)),
        "training: attention": lambda: train(ops.attention, heads, heads, heads),
        "training: attention_qkvpacked": lambda: train(ops.attention_qkvpacked, (2, 16, 3, H, D)),
        "training: linear": lambda: train(ops.linear, row, (3 * C, C), (3 * C,)),
        "training: gelu_mlp": lambda: train(ops.gelu_mlp, row, (4 * C, C), (4 * C,), (C, 4 * C), (C,)),
        "training: loss": lambda: train(lambda x, w: ops.linear_cross_entropy(x, w, targets), row, (V, C)),
    }


def warm(sizes: Widths, dtype: torch.dtype, device: torch.device) -> int:
    """Run all of `calls` on a GPU and print each variant as it is compiled, or found in the cache; how many."""
    knobs = _runtime.triton.knobs.compilation
    seen = 0

    def listener(*, src: Any, metadata: Any, times: Any, cache_hit: bool, **others: Any) -> None:
        nonlocal seen
        seen += 1
        print(f"  {metadata['name']:32} {times.total / 1e6:7.2f} s{' (cached)' if cache_hit else ''}", flush=True)

    previous, knobs.listener = knobs.listener, listener
    try:
        for name, call in calls(sizes, dtype, device).items():
            print(name, flush=True)
            call()
        torch.cuda.synchronize(device)
    finally:
        knobs.listener = previous
    return seen


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gpt2_kernels.warmup", description="Compile what a GPT-2 needs.")
    parser.add_argument("--model", choices=MODELS, default="gpt2", help="whose widths (default gpt2)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of tensors (default bf16)")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    refusal = ops.gpu_refusal() or (None if _runtime.HAS_TRITON else "Triton is not installed")
    if refusal:
        print(f"no kernel to compile: {refusal}; C++ operators: {_native.status()}")
        print(f"done in {time.perf_counter() - begin:.2f} s")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    count = warm(MODELS[options.model], DTYPES[options.dtype], device)
    print(f"{count} variants for {options.model} in {options.dtype}: {time.perf_counter() - begin:.2f} s")


if __name__ == "__main__":
    main()
