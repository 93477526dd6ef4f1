"""Host time of one decode step of the engine, in microseconds: `python -m benchmarks.engine_host`.

Scheduling, block tables, stop checks and text for BATCH requests, with a device that answers at once and the plans that
a GPU would get: DECODE_STEPS tokens of each sequence at a time. At 124M parameters a GPU's step takes about a
millisecond, and the host must be done with the previous plan by then. Measured in CPU time, which other processes do
not affect; uploads to the device are copies in host memory here, while on a GPU they would only be started.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from gpt2 import GPT2, Engine, GPT2Config, SamplingParams, load_tokenizer
from gpt2.decode import Decoder, Drawn
from gpt2.engine import DECODE_STEPS

BATCH, PROMPT, NEW = 256, 64, 512
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "a stop token": {"stop_token_ids": (4000,)},
    "a stop string": {"stop": ("\n\n\n",)},
}


class IdleDecoder(Decoder):
    """Returns every sequence's next tokens at once, the same for all."""

    def run(self, steps: int) -> Drawn:
        return Drawn(torch.full((steps, len(self.samples)), 300, dtype=torch.int64), None)


def microseconds(options: dict[str, Any]) -> dict[str, float]:
    """Median and largest time of a step with all requests running; the largest includes garbage collection."""
    config = GPT2Config(vocab_size=4096, n_embd=64, n_layer=1, n_head=1, eos_token_id=4095)
    torch.manual_seed(0)
    model = GPT2(config).eval()
    engine = Engine(model, load_tokenizer("storybook"), max_batch=BATCH, num_blocks=BATCH * (PROMPT + NEW) // 16)
    engine._steps, engine._most_unread = DECODE_STEPS, 1
    engine._decoder = IdleDecoder(model, engine._cache, rows=BATCH, most_steps=DECODE_STEPS, cuda_graphs=False)
    for i in range(BATCH):
        engine.add([i] * PROMPT, SamplingParams(max_tokens=NEW, ignore_eos=True, seed=i, **options))
    while any(s.prefilling for s in engine._scheduler.running) or engine._scheduler.waiting:
        engine.step()
    engine.step()
    times = []
    while engine.stats()["output_tokens"] < BATCH * NEW // 2:
        start = time.process_time()
        engine.step()
        times.append((time.process_time() - start) * 1e6 / DECODE_STEPS)
    assert engine.stats()["running"] == BATCH
    return {"median": statistics.median(times), "largest": max(times)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_host", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    found = {name: microseconds(options) for name, options in CASES.items()}
    if as_json:
        print(json.dumps({"torch": torch.__version__, "batch": BATCH, "us_per_step": found}))
        return
    print(f"torch {torch.__version__}, {BATCH} requests; us of host time a step")
    for name, times in found.items():
        print(f"{name:16} median {times['median']:7.1f}   largest {times['largest']:7.1f}")


if __name__ == "__main__":
    main()
