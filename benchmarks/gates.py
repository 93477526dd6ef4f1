"""What the measurements are judged by: 18 goals for one NVIDIA H200, and gates that a kernel has to pass to be done.

Each line reads one quantity from the rows that match its pattern; of several rows, the worst counts. A line whose row,
rival or figure is absent is shown as missing, never as met.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.measure import Row

Quantity = Callable[[Row], "float | None"]


def times_faster(rival: str) -> Quantity:
    return lambda row: row.get("faster_than", {}).get(rival)


def ours(figure: str) -> Quantity:
    return lambda row: row["rivals"].get("ours", {}).get(figure)


def us_a_token(row: Row) -> float | None:
    rate = ours("per_second")(row)
    return 1e6 / rate if rate else None


def cost_of_invariance(row: Row) -> float | None:
    """How many times as long the batch-invariant product takes."""
    return row.get("faster_than", {}).get("batch invariant")


def share_of_logits(row: Row) -> float | None:
    """Memory that the loss takes beyond its gradients, as a share of the logits' size."""
    peak = ours("peak_bytes")(row)
    if peak is None or "logits_bytes" not in row:
        return None
    return max(peak - row["gradient_bytes"], 0) / row["logits_bytes"]


def same_bits(row: Row) -> float | None:
    return None if "same_bits" not in row else float(row["same_bits"])


@dataclasses.dataclass(frozen=True)
class Gate:
    number: int
    item: str
    pattern: str  # matched against row names, from their start
    quantity: Quantity
    what: str  # the quantity in words
    gate: float | None  # None: no gate, only a goal
    goal: float | None
    at_most: bool = False  # smaller is better

    def values(self, rows: Iterable[Row]) -> list[float]:
        found = [self.quantity(row) for row in rows if "rivals" in row and re.match(self.pattern, row["name"])]
        return [] if None in found else [value for value in found if value is not None]

    def judge(self, rows: Iterable[Row]) -> tuple[float | None, str]:
        """(the worst value, "goal" | "gate" | "missed" | "missing")."""
        values = self.values(rows)
        if not values:
            return None, "missing"
        worst = max(values) if self.at_most else min(values)

        def reached(level: float | None) -> bool:
            return level is not None and (worst <= level if self.at_most else worst >= level)

        if reached(self.goal) and (self.gate is None or reached(self.gate)):
            return worst, "goal"
        if reached(self.gate):
            return worst, "gate" if self.goal is not None else "goal"
        return worst, "missed" if self.gate is not None else "below goal"


def rows_of(stages: dict[str, dict[str, Any]]) -> list[Row]:
    """The rows that gates apply to: those at GPU sizes, without the candidates of the launch tables."""
    return [
        row for name, entry in stages.items() if name != "tuner" and entry["sizes"] == "gpu" for row in entry["rows"]
    ]


def _gates() -> tuple[Gate, ...]:
    T1k, long, longer = "B=16 T=1024 H=12", "B=. T=(2048|4096|8192|16384) H=12", "B=. T=(4096|8192|16384) H=12"
    forward, backward = "attention forward ", "attention backward "
    static, continuous = "transformers, static cache + compile", "transformers, continuous batching"
    latency, large = "paged decode batch=[12] context=1024", "paged decode batch=384 "
    G = Gate
    return (
        G(1, "attention forward, T=1024", forward + T1k, times_faster("cudnn"), "x SDPA cuDNN", 1.0, 1.25),
        G(1, "attention forward, T=1024", forward + T1k, times_faster("flash"), "x SDPA flash", 1.3, 1.7),
        G(1, "attention forward, T=1024", forward + T1k, ours("of_matmul"), "of matmul", None, 0.5),
        G(2, "attention forward, T=2k..16k", forward + long, times_faster("cudnn"), "x SDPA cuDNN", 0.95, 1.1),
        G(2, "attention forward, T=16k", forward + "B=1 T=16384", ours("of_matmul"), "of matmul", None, 0.6),
        G(3, "attention backward, T=1024", backward + T1k, times_faster("cudnn"), "x SDPA cuDNN", 1.0, 1.25),
        G(4, "attention backward, T=4k..16k", backward + longer, times_faster("cudnn"), "x SDPA cuDNN", 0.9, 1.05),
        G(5, "paged decode, 2.4 GB of keys and values", large, ours("of_copy"), "of copy", 0.8, 0.95),
        G(5, "shuffled blocks", large, times_faster("blocks in order"), "x blocks in order", None, 0.97),
        G(6, "paged decode latency, batch 1 and 2", latency, ours("us"), "us", 10.0, 5.5, at_most=True),
        G(7, "linear: same bits in any batch", "linear ", same_bits, "holds", 1.0, 1.0),
        G(7, "linear: what that costs", "linear ", cost_of_invariance, "x the time", None, 1.08, at_most=True),
        G(8, "layer_norm, with residual too, forward", "(add_)?layer_norm forward \\d+x\\d+$", ours("of_copy"),
          "of copy", 0.9, 0.98),
        G(8, "layer_norm forward", "layer_norm forward \\d+x\\d+$", times_faster("torch"), "x F.layer_norm", None, 1.3),
        G(9, "layer_norm backward", "layer_norm backward", times_faster("torch"), "x torch", 1.3, 2.0),
        G(9, "layer_norm backward", "layer_norm backward", ours("of_copy"), "of copy", None, 0.9),
        G(10, "layer_norm forward + backward, eager, 4096x768", "layer_norm forward . backward", times_faster("torch"),
          "x torch", 1.0, 1 / 0.7),
        G(11, "linear + bias + GELU, M=64k", "linear .* gelu_tanh", times_faster("compiled"), "x compiled", 1.0, 1.15),
        G(11, "linear + bias + GELU, M=64k", "linear .* gelu_tanh", ours("of_matmul"), "of matmul", None, 0.88),
        G(12, "linear_cross_entropy", "linear_cross_entropy", times_faster("compiled"), "x compiled", 1.2, None),
        G(12, "linear_cross_entropy", "linear_cross_entropy", ours("of_matmul"), "of matmul", None, 0.85),
        G(12, "linear_cross_entropy", "linear_cross_entropy", share_of_logits, "of the logits' memory", None, 1 / 16,
          at_most=True),
        G(13, "decode, batch 1, 124M", "decode gpt2 batch=1 ", times_faster(static), "x static cache + compile", 1.3,
          None),
        G(13, "decode, batch 1, 124M", "decode gpt2 batch=1 ", times_faster("transformers"), "x transformers", None,
          25.0),
        *(G(13, f"decode, batch 1, {size}", f"decode {name} batch=1 ", us_a_token, "us a token", None, goal, True)
          for name, size, goal in (("gpt2", "124M", 110.0), ("gpt2-medium", "355M", 265.0),
                                   ("gpt2-large", "774M", 500.0), ("gpt2-xl", "1.5B", 950.0))),
        G(14, "decode, batch 8..64, 124M", "decode gpt2 batch=(8|64) ", ours("of_copy"), "of copy", 0.6, 0.8),
        G(15, "batch job, 256 requests, 124M", "batch job gpt2 ", times_faster(continuous),
          "x continuous batching", 3.0, None),
        G(15, "batch job, 256 requests, 124M", "batch job gpt2 ", ours("of_copy"), "of its bound", None, 0.65),
        G(15, "batch job, 256 requests, 1.5B", "batch job gpt2-xl ", times_faster(continuous),
          "x continuous batching", 3.0, None),
        G(15, "batch job, 256 requests, 1.5B", "batch job gpt2-xl ", ours("of_copy"), "of its bound", None, 0.8),
        G(16, "fp8 cache", "paged decode fp8", times_faster("half precision"), "x half precision", None, 1.8),
        G(17, "prefill, 16k tokens", "prefill ", ours("of_matmul"), "of matmul", 0.55, 0.72),
        G(18, "training step, 124M", "training step gpt2 ", times_faster("compiled"), "x compiled", 1.0, 1.3),
        G(18, "training step, 124M", "training step gpt2 ", ours("per_second"), "tokens/s", None, 620e3),
    )  # fmt: skip


GATES = _gates()
