"""A request's tokens and logits are a function of (weights, prompt, parameters) alone, whatever else the engine does.

Every schedule is compared, bit for bit, with the request run alone in an engine without sharing, chunks or preemption.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import random_checkpoint, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2 import GPT2, Engine, SamplingParams, decode
from gpt2.request import Completion
from gpt2_kernels import _overlap

POSITIONS = 48
VOCABULARY = 90

SHARED = list(range(20))  # a prefix that many prompts share
PROMPTS = [
    [7],
    [3, 1, 4],
    SHARED[:8],
    SHARED[:9],
    SHARED,
    [*SHARED, 50],
    [*SHARED, 60, 61],
    [80 - i for i in range(17)],
    [5] * 31,
]
PARAMS = [
    SamplingParams(max_tokens=10, temperature=0.0, seed=0, ignore_eos=True),
    SamplingParams(max_tokens=14, seed=1, top_k=0),
    SamplingParams(max_tokens=3, seed=2, top_k=5, temperature=2.0),
    SamplingParams(max_tokens=12, seed=3, top_p=0.8, repetition_penalty=1.3),
    SamplingParams(max_tokens=9, seed=4, min_p=0.05, n=3, ignore_eos=True),
    SamplingParams(max_tokens=6, seed=5, logprobs=4),
    SamplingParams(max_tokens=1, seed=6),
    SamplingParams(max_tokens=16, seed=7, top_k=3, stop_token_ids=tuple(range(0, VOCABULARY, 6))),
    SamplingParams(max_tokens=40, seed=8, on_overflow="stop"),
]


# One seed per pair, so that seed and position identify a row of logits.
JOBS = [
    (prompt, dataclasses.replace(params, seed=100 * i + k))
    for i, prompt in enumerate(PROMPTS)
    for k, params in enumerate(PARAMS)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(n_embd=32, n_head=2, n_layer=2, vocab_size=VOCABULARY, n_positions=POSITIONS)
    return random_checkpoint(tmp_path_factory.mktemp("model"), config)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def model(request: pytest.FixtureRequest, folder: Path) -> GPT2:
    return GPT2.from_pretrained(folder, device="cuda" if torch.cuda.is_available() else "cpu", dtype=request.param)


class Logits:
    """Records the row of logits behind every token, by the seed and position that identify it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[tuple[int, int], torch.Tensor] = {}
        real = decode.Rows.draw

        def draw(rows: decode.Rows, logits: torch.Tensor, top: int) -> Any:
            if logits.is_cuda and torch.cuda.is_current_stream_capturing():
                return real(rows, logits, top)  # during capture nothing can be read, and replays do not come here
            active = (rows.contexts > 0).tolist()
            keys = zip(rows.ints[decode.SEED].tolist(), rows.ints[decode.POSITION].tolist(), active)
            for i, (seed, position, is_active) in enumerate(keys):
                if is_active:
                    self.rows[seed, position] = logits[i].clone()
            return real(rows, logits, top)

        monkeypatch.setattr(decode.Rows, "draw", draw)

    def take(self) -> dict[tuple[int, int], torch.Tensor]:
        rows, self.rows = self.rows, {}
        return rows


@pytest.fixture(scope="module")
def recorder() -> Iterator[Logits]:
    with pytest.MonkeyPatch.context() as patch:
        yield Logits(patch)


class Alone:
    """Each request run alone, once."""

    def __init__(self, model: GPT2, recorder: Logits) -> None:
        self.model, self.recorder = model, recorder
        self.known: dict[Any, tuple[Completion, dict]] = {}

    def __call__(self, prompt: list[int], params: SamplingParams) -> tuple[Completion, dict]:
        key = tuple(prompt), params
        if key not in self.known:
            self.recorder.take()
            engine = build(self.model, max_batch=1, num_blocks=1, block_size=64, prefix_caching=False)
            (completion,) = engine.generate([prompt], params)
            self.known[key] = completion, self.recorder.take()
        return self.known[key]


@pytest.fixture(scope="module")
def alone(model: GPT2, recorder: Logits) -> Alone:
    return Alone(model, recorder)


class ReplayedDecoder(decode.Decoder):
    """Steps as CUDA graphs do, on any device: padded batch sizes, a step of idle rows before the first replay."""

    def _capture(self, *key: Any) -> Any:
        self._step(*key)
        return SimpleNamespace(replay=lambda: self._step(*key))


def build(model: GPT2, **options: Any) -> Engine:
    """An engine that, even on a CPU, plans several steps, works ahead of results and replays graphs, as on a GPU."""
    steps, most_unread, prefill_tokens = options.pop("ahead", (1, 0, 2048))
    replayed = options.pop("replayed", False)
    engine = Engine(model, cuda_graphs=False, **options)
    engine._steps, engine._most_unread = steps, most_unread
    if replayed:
        rows = engine._scheduler.max_batch
        engine._decoder = ReplayedDecoder(model, engine._cache, rows=rows, most_steps=steps, cuda_graphs=True)
    engine._scheduler.prefill_tokens = prefill_tokens
    return engine


def same(found: Completion, expected: Completion) -> None:
    assert found.prompt_tokens == expected.prompt_tokens
    assert [dataclasses.replace(o) for o in found.outputs] == expected.outputs


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_schedule(
    production: torch.device, model: GPT2, alone: Alone, recorder: Logits, data: st.DataObject
) -> None:
    """Arrival orders, chunk, block and pool sizes, preemption, prefix hits, samples, aborts, plans ahead of results."""
    draw = data.draw
    block_size = draw(st.sampled_from([4, 8, 16]))
    smallest = -(-POSITIONS // block_size)
    engine = build(
        model,
        block_size=block_size,
        num_blocks=draw(st.integers(smallest, 2 * smallest)),
        max_batch=draw(st.integers(1, 6)),
        prefix_caching=draw(st.booleans()),
        replayed=draw(st.booleans()),
        ahead=(draw(st.integers(1, 8)), draw(st.integers(0, 2)), draw(st.integers(1, 40))),
    )
    jobs = draw(st.lists(st.tuples(st.sampled_from(JOBS), st.integers(0, 3)), min_size=1, max_size=8))
    expected = [alone(*job) for job, _ in jobs]
    recorder.take()
    done: dict[int, Completion] = {}
    numbers = []
    for job, wait in jobs:
        numbers.append(engine.add(*job))
        for _ in range(wait):
            done.update({c.request_id: c for c in engine.step()})
    aborted = draw(st.sampled_from([None, None, *numbers]))
    if aborted is not None:
        engine.abort(aborted)
    while engine.unfinished:
        done.update({c.request_id: c for c in engine.step()})
    logits = recorder.take()
    for number, (completion, rows) in zip(numbers, expected):
        if number != aborted:
            same(done[number], completion)
            for key, row in rows.items():
                assert torch.equal(logits[key], row), key
    engine._scheduler.pool.check()
    assert engine.stats()["free_blocks"] == engine.stats()["num_blocks"]
    assert not engine._sample_of and not engine._swapped and not engine._requests


def test_preemption_is_forced_and_changes_nothing(production: torch.device, model: GPT2, alone: Alone) -> None:
    params = [SamplingParams(max_tokens=24, seed=i, ignore_eos=True) for i in range(6)]
    for ahead, replayed in (((1, 0, 2048), False), ((4, 1, 2048), False), ((4, 1, 2048), True)):
        engine = build(model, num_blocks=14, block_size=4, ahead=ahead, replayed=replayed)
        for found, (prompt, own) in zip(engine.generate(PROMPTS[:6], params), zip(PROMPTS, params)):
            same(found, alone(prompt, own)[0])
        assert engine.stats()["preemptions"] > 0 and engine.stats()["free_blocks"] == 14


def test_padded_batches_write_nothing(production: torch.device, model: GPT2, alone: Alone) -> None:
    """Rows past a replayed step's sequences are idle, though stopped or moved sequences left their slots there."""
    params = [
        SamplingParams(max_tokens=20, seed=i, top_k=0, stop_token_ids=tuple(range(i % 7, VOCABULARY, 5)))
        for i in range(24)
    ]
    prompts = [PROMPTS[i % 8] for i in range(24)]
    for num_blocks, block_size in ((40, 4), (24, 8)):
        engine = build(
            model, num_blocks=num_blocks, block_size=block_size, max_batch=12, ahead=(8, 1, 2048), replayed=True
        )
        for found, prompt, own in zip(engine.generate(prompts, params), prompts, params):
            same(found, alone(prompt, own)[0])


def test_all_at_once_on_the_production_path(production: torch.device, model: GPT2, alone: Alone) -> None:
    """With CUDA graphs where there is a GPU."""
    engine = Engine(model, num_blocks=64, block_size=8)
    found = engine.generate([p for p, _ in JOBS], [q for _, q in JOBS])
    for completion, job in zip(found, JOBS):
        same(completion, alone(*job)[0])


def test_kernels_that_start_before_the_last_ends(model: GPT2) -> None:
    """Programmatic dependent launch, in graphs and outside them, gives what serialized kernels give."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    found = []
    for context in (contextlib.nullcontext, _overlap.disabled):
        with context():
            for graphs in (True, False):
                engine = Engine(model, num_blocks=64, block_size=8, cuda_graphs=graphs)
                found.append([c.outputs for c in engine.generate([p for p, _ in JOBS], [q for _, q in JOBS])])
    assert all(outputs == found[0] for outputs in found)


def test_on_the_kernels(path: torch.device, folder: Path, recorder: Logits) -> None:
    """Over the Triton kernels, interpreted where there is no GPU: prompts cut in two, prefix hits, preemption."""
    model = GPT2.from_pretrained(folder, device=path, dtype=torch.float32)
    alone = Alone(model, recorder)
    jobs = [([*SHARED[:9], i], SamplingParams(max_tokens=5, seed=i, top_k=0, ignore_eos=True)) for i in range(3)]
    expected = [alone(prompt, params) for prompt, params in jobs]
    recorder.take()
    engine = build(model, num_blocks=7, block_size=4, ahead=(2, 1, 8))
    found = engine.generate([p for p, _ in jobs], [q for _, q in jobs])
    logits = recorder.take()
    for completion, (truth, rows) in zip(found, expected):
        same(completion, truth)
        assert all(torch.equal(logits[key], row) for key, row in rows.items())
    assert engine.stats()["preemptions"] > 0
