"""What is compiled with no GPU: calls of public functions on small tensors, for compile_report and its tests.

Compiled code depends on shapes only through constexpr arguments, so these small tensors compile what large ones run.
A new operator needs a line in both `cases()` and `lengths()`, and one in MMA of tests/test_offline.py.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gpt2_kernels as ops

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def cases() -> dict[str, Callable[[], object]]:
    """Name -> call. GPT-2 runs in half precision; checks against the reference run in float32."""
    found: dict[str, Callable[[], object]] = {}
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (64, 80, 128, 256)):
        found[f"attention D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _attention(_qkv(D, dtype))
        found[f"paged decode D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _paged(D, dtype, 1)
        found[f"paged decode_ D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _decode(D, dtype)
        found[f"paged prefill D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _paged(D, dtype, 7)
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (64, 80, 128, 256)):
        found[f"paged decode grouped D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _paged(D, dtype, 1, H=12)
        found[f"paged decode_ grouped D={D} {SHORT[dtype]}"] = lambda D=D, dtype=dtype: _decode(D, dtype, H=12)
    found["paged decode D=64 bf16 window"] = lambda: _paged(64, torch.bfloat16, 1, window=100)
    found["paged decode_ D=64 bf16 window"] = lambda: _decode(64, torch.bfloat16, window=100)
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
        for name, H in (("", 4), ("grouped ", 12)):
            call = functools.partial(_decode, D, dtype, H=H, float8=True)
            found[f"paged decode_ {name}D={D} {SHORT[dtype]} fp8"] = call
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
    for dtype, (K, N) in itertools.product((torch.bfloat16, torch.float32), ((768, 2304), (3072, 768), (768, 50257))):
        name = f"linear decode {K}x{N} {SHORT[dtype]}"
        found[name] = lambda K=K, N=N, dtype=dtype: _linear(K, N, dtype, None, residual=N == 768, decode=True)
    found["linear decode 4096x256 bf16"] = lambda: _linear(4096, 256, torch.bfloat16, None, decode=True)  # 32 splits
    found["linear decode gelu_tanh bf16"] = lambda: _linear(768, 3072, torch.bfloat16, "gelu_tanh", decode=True)
    found["linear decode 336x80 gelu bf16"] = lambda: _linear(336, 80, torch.bfloat16, "gelu", decode=True)
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
    cache, options = _cache(D, dtype, num_blocks, window, float8)
    table, lens, cu = (torch.zeros(shape, dtype=torch.int32) for shape in ((S, max_blocks), (S,), (S + 1,)))
    q = torch.empty(max(rows, S), H, D, dtype=dtype)
    return ops.paged_attention(q, cache, cache, table, lens, cu, max_seqlen, **options)


def _decode(
    D: int,
    dtype: torch.dtype,
    *,
    H: int = 4,
    S: int = 16,
    num_blocks: int = 64,
    max_blocks: int = 32,
    window: int | None = None,
    float8: bool = False,
) -> Tensor:
    cache, options = _cache(D, dtype, num_blocks, window, float8)
    q = torch.empty(S, H + 8, D, dtype=dtype)  # one fused projection
    table, lens = (torch.zeros(shape, dtype=torch.int32) for shape in ((S, max_blocks), (S,)))
    slots = torch.zeros(S, dtype=torch.int64)
    k, v = q[:, H : H + 4], q[:, H + 4 :]
    return ops.paged_decode_(q[:, :H], k, v, cache, cache.clone(), slots, table, lens, **options)


def _cache(
    D: int, dtype: torch.dtype, num_blocks: int, window: int | None, float8: bool
) -> tuple[Tensor, dict[str, Any]]:
    cache = torch.empty(num_blocks, 4, 16, D, dtype=torch.float8_e4m3fn if float8 else dtype).transpose(1, 2)
    scale = torch.ones(4) if float8 else None
    return cache, {"window": window, "k_scale": scale, "v_scale": scale}


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
    """Forward and backward of dense rows, whose starts are aligned to an element only."""
    with torch.enable_grad():
        logits = torch.empty(R, V, dtype=dtype, requires_grad=True)
        loss = ops.cross_entropy(logits, torch.zeros(R, dtype=torch.int64))
        return torch.autograd.grad(loss, logits)[0]


def _linear_cross_entropy() -> object:
    """One row, and so one chunk, which its gradient overwrites."""
    x, weight = torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(50257, 8, dtype=torch.bfloat16)
    return torch.ops.gpt2_kernels.linear_cross_entropy(x, weight, torch.zeros(1, dtype=torch.int64), -100, True, True)


def _norm(C: int, dtype: torch.dtype, add: bool, M: int = 64) -> object:
    x, weight = torch.empty(M, C, dtype=dtype), torch.empty(C, dtype=dtype)
    return ops.add_layer_norm(x, x, weight, weight) if add else ops.layer_norm(x, weight, weight)


def _norm_backward(C: int, dtype: torch.dtype, add: bool, M: int = 64) -> object:
    x, weight, statistics = torch.empty(M, C, dtype=dtype), torch.empty(C, dtype=dtype), torch.empty(2, M)
    backward = torch.ops.gpt2_kernels.layer_norm_backward
    return backward(x, x if add else None, x, weight, statistics, True, True, True)


def _linear(
    K: int,
    N: int,
    dtype: torch.dtype,
    activation: str | None,
    M: int = 64,
    *,
    residual: bool = False,
    decode: bool = False,
) -> Tensor:
    x, weight, bias = (torch.empty(shape, dtype=dtype) for shape in ((M, K), (N, K), (N,)))
    other = torch.empty(M, N, dtype=dtype) if residual else None
    return ops.linear(x, weight, bias, activation=activation, residual=other, decode=decode)


def _linear_kept(K: int, N: int, dtype: torch.dtype, activation: str) -> object:
    """Forward in training: the activation's input is written too."""
    weight, bias = torch.empty(N, K, dtype=dtype), torch.empty(N, dtype=dtype)
    return torch.ops.gpt2_kernels.linear(torch.empty(64, K, dtype=dtype), weight, bias, None, activation, True, True)


def _linear_backward(K: int, N: int, dtype: torch.dtype, activation: str, M: int = 64) -> Tensor:
    """From a layer's N outputs to its K inputs, and through the activation that produced those inputs."""
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

# Equal to 1, divisible by 16, or neither, which Triton specializes on; and either side of a block.
LENGTHS = (1, 2, 15, 16, 17, 64, 100, 512, 1000, 1024)


def lengths() -> dict[str, Callable[[int], object]]:
    """Name -> call with a number of rows, queries, keys or sequences, none of which may affect what is compiled."""
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
        "paged decode max_blocks": lambda n: _paged(64, bf16, 1, max_blocks=min(n, 1000)),  # wider: see MAX_PARTS
        "paged decode num_blocks": lambda n: _paged(64, bf16, 1, num_blocks=n),
        "paged decode rows": lambda n: _paged(64, bf16, 1, rows=n, S=1),
        "paged decode window": lambda n: _paged(64, bf16, 1, window=n),
        "paged decode_ S": lambda n: _decode(64, bf16, S=n),
        "paged decode_ max_blocks": lambda n: _decode(64, bf16, max_blocks=min(n, 1000)),
        "paged decode_ num_blocks": lambda n: _decode(64, bf16, num_blocks=n),
        "paged decode_ window": lambda n: _decode(64, bf16, window=n),
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
        "linear decode M": lambda n: _linear(768, 3072, bf16, "gelu_tanh", M=n, decode=True),
    }
