"""Every kernel against its strongest rival in the same process, and against the ceilings of the machine.

Each part is a generator of rows for `benchmarks.gpu`. FLOPs are useful ones, never those of a tile; bytes are what the
operation has to move. Inputs are random, rivals take turns, and a rival that cannot run is named with its error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpt2_kernels as ops
from benchmarks.timing import kernel_times, wall_times

Row = dict[str, Any]
Calls = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a part needs to know."""

    device: torch.device
    smoke: bool
    ceilings: dict[str, float]  # "copy" bytes/s, "matmul" FLOP/s; empty until measured

    def size(self, real: int, smoke: int) -> int:
        return smoke if self.smoke else real

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype).requires_grad_(grad)


def compare(
    run: Run,
    name: str,
    calls: Calls,
    *,
    flops: float = 0.0,
    moved: float = 0.0,
    gates: dict[str, float] | None = None,
    wall: bool = False,
    close: float = 0.03,
) -> Row:
    """Times "ours", which comes first, and its rivals, once they agree to `close` of the largest value (0: not asked).

    `flops` and `moved` bytes of one call give the share of the ceiling.
    A gate names a rival, and how many times faster than it ours has to be; or a ceiling ("copy", "matmul"), and the
    share of it that ours has to reach. A rival that this machine cannot run is reported with its error.
    """
    usable: Calls = {}
    errors: dict[str, str] = {}
    disagrees: dict[str, str] = {}
    expected: list[Tensor] = []
    for rival, call in calls.items():
        try:
            found = flat(call())
            expected = found if rival == "ours" else expected
            for a, b in zip(found, expected) if close else ():
                torch.testing.assert_close(b.float(), a.float(), rtol=close, atol=close * a.abs().max().item())
            usable[rival] = call
        except AssertionError as error:
            disagrees[rival] = str(error)[:500]
        except Exception as error:  # noqa: BLE001 - a rival that is missing must not end the run
            if rival == "ours":
                raise
            errors[rival] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    times = (wall_times if wall else kernel_times)(usable, run.device, turns=3 if run.smoke else 30)
    ours = times["ours"].median
    row: dict[str, Any] = {
        "name": name,
        "microseconds": {rival: dataclasses.asdict(t) for rival, t in times.items()},
        "faster_than": {rival: t.median / ours for rival, t in times.items() if rival != "ours"},
    }
    if errors:
        row["not_run"] = errors
    if disagrees:
        row["disagrees"] = disagrees  # ends the whole run with an error: one of the two is wrong
    if flops:
        row["tflops"] = {rival: flops / t.median / 1e6 for rival, t in times.items()}
        row["of_matmul"] = flops / ours * 1e6 / run.ceilings["matmul"]
    if moved:
        row["of_copy"] = moved / ours * 1e6 / run.ceilings["copy"]
    reached = {**row["faster_than"], "copy": row.get("of_copy"), "matmul": row.get("of_matmul")}
    row["gates"] = {
        f"{rival} x {least}": None if reached.get(rival) is None else reached[rival] >= least
        for rival, least in (gates or {}).items()
    }
    return row


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, which may be one or several."""
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of (B, T, H, D) views."""
    with sdpa_kernel(backend):
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def gradient(call: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> Callable[[], Any]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(call(), leaves, grad)


def attention(run: Run) -> Iterator[Row]:
    """Gates 1-4: bf16, causal, D = 64, 16k tokens in 12 heads."""
    for T in (32,) if run.smoke else (1024, 2048, 4096, 16384):
        yield from _attention(run, max(1, run.size(16384, 64) // T), T, 12, 64)


def _attention(run: Run, B: int, T: int, H: int, D: int) -> Iterator[Row]:
    q, k, v = (t.detach().requires_grad_() for t in run.random(B, T, 3, H, D).unbind(2))
    grad = run.random(B, T, H, D)
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    forward: Calls = {"ours": lambda: ops.attention(q, k, v)}
    forward |= {name: lambda backend=backend: sdpa(backend, q, k, v) for name, backend in backends.items()}
    flops = 2.0 * B * H * T * T * D
    gates = {"cudnn": 1.0, "flash": 1.3} if T == 1024 else {"cudnn": 0.95}
    with torch.no_grad():
        alone = compare(run, f"attention forward B={B} T={T}", forward, flops=flops, gates=gates)
    yield alone
    both: Calls = {name: gradient(call, (q, k, v), grad) for name, call in forward.items()}
    row = compare(run, f"attention forward + backward B={B} T={T}", both, flops=3.5 * flops)
    yield backward_alone(alone, row, "cudnn", 1.0 if T == 1024 else 0.9)


def backward_alone(forward: Row, both: Row, rival: str, least: float) -> Row:
    """A captured graph holds forward and backward: backward by itself, with its gate, is the difference."""
    times = [{name: t["median"] for name, t in row["microseconds"].items()} for row in (forward, both)]
    backward = {name: times[1][name] - times[0][name] for name in times[1] if name in times[0]}
    both["backward_microseconds"] = backward
    held = backward[rival] / backward["ours"] >= least if rival in backward else None
    both["gates"][f"backward: {rival} x {least}"] = held
    return both


def layer_norm(run: Run) -> Iterator[Row]:
    """Gates 8-10. Backward reads x and dy and writes dx: with the forward pass 5 R C elements."""
    for C in (768, 1024, 1280, 1600):
        yield from _layer_norm(run, run.size(65536, 16), C)
    R, C = run.size(4096, 16), 768
    x, weight, bias = run.random(R, C, grad=True), run.random(C, grad=True), run.random(C, grad=True)
    grad, leaves = run.random(R, C), (x, weight, bias)
    calls: Calls = {
        "ours": gradient(lambda: ops.layer_norm(x, weight, bias), leaves, grad),
        "torch": gradient(lambda: F.layer_norm(x, (C,), weight, bias), leaves, grad),
    }
    yield compare(run, f"layer_norm forward + backward {R}x{C}, host included", calls, gates={"torch": 1.0}, wall=True)


def _layer_norm(run: Run, R: int, C: int) -> Iterator[Row]:
    x, residual = run.random(R, C, grad=True), run.random(R, C)
    weight, bias, grad = run.random(C, grad=True), run.random(C, grad=True), run.random(R, C)
    moved = 2.0 * R * C * x.element_size()  # one pass in, one out

    def added(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, (C,), weight, bias), total

    plain: Calls = {
        "ours": lambda: ops.layer_norm(x, weight, bias),
        "torch": lambda: F.layer_norm(x, (C,), weight, bias),
    }
    fused: Calls = {"ours": lambda: ops.add_layer_norm(x, residual, weight, bias)}
    if not run.smoke:
        compiled = torch.compile(added)
        fused["compiled"] = lambda: compiled(x, residual)
    with torch.no_grad():
        alone = compare(run, f"layer_norm forward {R}x{C}", plain, moved=moved, gates={"copy": 0.9})
        yield alone
        yield compare(run, f"add_layer_norm forward {R}x{C}", fused, moved=2 * moved, gates={"copy": 0.9})
    both: Calls = {name: gradient(call, (x, weight, bias), grad) for name, call in plain.items()}
    row = compare(run, f"layer_norm forward + backward {R}x{C}", both, moved=2.5 * moved)
    yield backward_alone(alone, row, "torch", 1.3)


def linear(run: Run) -> Iterator[Row]:
    """Gates 7 and 11: GPT-2's products at 64k rows, and what batch invariance costs."""
    M, C = run.size(65536, 16), 768
    for rows, K, N, activation in (
        (M, C, 4 * C, "gelu_tanh"),
        (M, 4 * C, C, None),
        (M, C, 3 * C, None),
        (M // 8, C, run.size(50257, 101), None),
    ):
        yield _linear(run, rows, K, N, activation)
    x, grad = run.random(M, C, grad=True), run.random(M, C)
    w1, b1, w2, b2 = (run.random(*shape, grad=True) for shape in ((4 * C, C), (4 * C,), (C, 4 * C), (C,)))
    leaves = (x, w1, b1, w2, b2)

    def plain() -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)

    calls: Calls = {
        "ours": gradient(lambda: ops.gelu_mlp(*leaves, batch_invariant=False), leaves, grad),
        "batch invariant": gradient(lambda: ops.gelu_mlp(*leaves), leaves, grad),
        "torch": gradient(plain, leaves, grad),
    }
    flops = 3 * 16.0 * M * C * C
    yield compare(run, f"gelu_mlp forward + backward {M}x{C}", calls, flops=flops, gates={"torch": 1.0})


def _linear(run: Run, M: int, K: int, N: int, activation: str | None) -> Row:
    x, weight, bias = run.random(M, K), run.random(N, K), run.random(N)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate="tanh") if activation else y

    calls: Calls = {
        "ours": lambda: ops.linear(x, weight, bias, activation=activation, batch_invariant=False),
        "batch invariant": lambda: ops.linear(x, weight, bias, activation=activation),
        "torch": lambda: plain(x, weight, bias),
    }
    if not run.smoke:
        compiled = torch.compile(plain, mode="max-autotune-no-cudagraphs")
        calls["compiled"] = lambda: compiled(x, weight, bias)
    with torch.no_grad():
        name = f"linear {M}x{K}x{N} {activation or 'plain'}"
        return compare(run, name, calls, flops=2.0 * M * K * N, gates={"compiled": 1.0})


def cross_entropy(run: Run) -> Iterator[Row]:
    """Gate 12: the vocabulary of GPT-2, loss and gradients; and the loss of given logits."""
    R, C, V = run.size(16384, 32), 768, run.size(50257, 101)
    x, weight = run.random(R, C, grad=True), (0.05 * run.random(V, C)).requires_grad_()
    targets = torch.randint(V, (R,), device=run.device)
    one = torch.ones((), device=run.device)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.T).float(), targets)

    calls: Calls = {
        "ours": gradient(lambda: ops.linear_cross_entropy(x, weight, targets), (x, weight), one),
        "torch": gradient(lambda: plain(x, weight), (x, weight), one),
    }
    if not run.smoke:
        compiled = torch.compile(plain)
        calls["compiled"] = gradient(lambda: compiled(x, weight), (x, weight), one)
    name, gates = f"linear_cross_entropy with gradients {R}x{C}x{V}", {"compiled": 1.2}
    row = compare(run, name, calls, flops=6.0 * R * V * C, gates=gates)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calls["ours"]()
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        row["logits_bytes"] = R * V * x.element_size()
    yield row
    logits = run.random(R, V)
    given: Calls = {
        "ours": lambda: ops.cross_entropy(logits, targets),
        "torch": lambda: F.cross_entropy(logits, targets),
    }
    if not run.smoke:
        given_compiled = torch.compile(F.cross_entropy)
        given["compiled"] = lambda: given_compiled(logits, targets)
    with torch.no_grad():
        name = f"cross_entropy forward {R}x{V}"
        yield compare(run, name, given, moved=float(R * V * logits.element_size()), gates={"torch": 1.0})


def generation(run: Run) -> Iterator[Row]:
    """Gates 5 and 6: paged decode over shuffled blocks; and sampling, which has no gate."""
    for S, context in ((2, 40),) if run.smoke else ((384, 2048), (2, 1024), (1, 1024)):
        yield _paged_decode(run, S, context)
    S, V = run.size(256, 2), run.size(50257, 101)
    logits = run.random(S, V)
    options = {
        "temperature": torch.full((S,), 0.8, device=run.device),
        "top_k": torch.full((S,), 40, device=run.device),
        "top_p": torch.ones(S, device=run.device),
        "min_p": torch.zeros(S, device=run.device),
        "seeds": torch.arange(S, device=run.device),
        "positions": torch.arange(S, device=run.device),
    }
    calls: Calls = {"ours": lambda: ops.sample(logits, **options), "torch.topk alone": lambda: logits.topk(40)}
    yield compare(run, f"sample {S}x{V} top-k 40", calls, moved=float(S * V * logits.element_size()), close=0.0)


def _paged_decode(run: Run, S: int, context: int) -> Row:
    H, D, size = 12, 64, 16
    blocks = -(-context // size)
    shape = (S * blocks, H, size, D)  # in memory; an operator sees (blocks, size, H, D)
    k_cache, v_cache = (run.random(*shape).transpose(1, 2) for _ in range(2))
    table = torch.randperm(S * blocks, device=run.device).to(torch.int32).view(S, blocks)
    lens = torch.full((S,), context, dtype=torch.int32, device=run.device)
    cu = torch.arange(S + 1, dtype=torch.int32, device=run.device)
    q = run.random(S, H, D)
    rows = table.long()
    k, v = (c.transpose(1, 2)[rows].transpose(1, 2).flatten(2, 3)[:, :, :context] for c in (k_cache, v_cache))
    calls: Calls = {
        "ours": lambda: ops.paged_attention(q, k_cache, v_cache, table, lens, cu, 1),
        "torch, contiguous keys": lambda: F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0],
    }
    moved = 2.0 * S * context * H * D * q.element_size()
    row = compare(
        run, f"paged decode S={S} context={context}", calls, moved=moved, gates={"copy": 0.8} if S > 2 else {}
    )
    if S <= 2:
        row["gates"]["10 microseconds"] = row["microseconds"]["ours"]["median"] <= 10.0
    return row
