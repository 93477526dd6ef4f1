"""Scheduler: what is computed when. No tensors here: a step is played by `commit` and an appended token."""

from __future__ import annotations

import random

import pytest

from gpt2.blocks import BlockPool
from gpt2.scheduler import Chunk, Scheduler, Sequence


def make(
    num_blocks: int = 64, *, max_batch: int = 4, prefill_tokens: int = 10, prefix_caching: bool = True
) -> Scheduler:
    pool = BlockPool(num_blocks, 4)
    return Scheduler(pool, max_batch=max_batch, prefill_tokens=prefill_tokens, prefix_caching=prefix_caching)


def text(length: int, output: int = 3, first: int = 0) -> Sequence:
    return Sequence(tokens=list(range(first, first + length)), prompt_length=length, max_length=length + output)


def play(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    """One step: everything is computed, complete texts get a token, long enough ones leave."""
    scheduler.commit(chunks)
    for chunk in chunks:
        if chunk.is_complete:
            chunk.sequence.tokens.append(7)
            if len(chunk.sequence.tokens) == chunk.sequence.max_length:
                scheduler.remove(chunk.sequence)
    scheduler.pool.check()


def test_a_long_prompt_is_cut_and_only_its_end_is_complete() -> None:
    scheduler = make()
    scheduler.add(text(25))
    seen = []
    for _ in range(3):
        chunks = scheduler.schedule()
        seen.append([(c.first, c.last, c.is_complete) for c in chunks])
        play(scheduler, chunks)
    assert seen == [[(0, 10, False)], [(10, 20, False)], [(20, 25, True)]]


def test_short_prompts_share_a_step_within_the_budget() -> None:
    scheduler = make()
    for i in range(3):
        scheduler.add(text(4, first=100 * i))
    assert [(c.first, c.last) for c in scheduler.schedule()] == [(0, 4), (0, 4), (0, 2)]


def test_prefill_and_decode_alternate() -> None:
    scheduler = make()
    scheduler.add(text(2, output=50))
    play(scheduler, scheduler.schedule())
    scheduler.add(text(40, first=100))
    kinds = []
    for _ in range(6):
        chunks = scheduler.schedule()
        kinds.append("prefill" if chunks[0].sequence.prefilling else "decode")
        play(scheduler, chunks)
    assert kinds == ["decode", "prefill"] * 3


def test_no_more_than_max_batch_run_and_the_queue_keeps_its_order() -> None:
    scheduler = make(max_batch=2)
    texts = [text(3, first=10 * i) for i in range(5)]
    for t in texts:
        scheduler.add(t)
    order = []
    while chunks := scheduler.schedule():
        assert len(scheduler.running) <= 2
        order += [texts.index(c.sequence) for c in chunks if c.first == 0]
        play(scheduler, chunks)
    assert order == [0, 1, 2, 3, 4]


def test_a_text_waits_for_blocks_and_is_never_started_without_them() -> None:
    scheduler = make(num_blocks=3)
    scheduler.add(text(5, output=4))  # 8 cached tokens: two blocks
    scheduler.add(text(5, output=4, first=50))
    assert len(scheduler.schedule()) == 1 and len(scheduler.waiting) == 1
    while chunks := scheduler.schedule():
        play(scheduler, chunks)
    assert scheduler.pool.free_blocks == 3 and not scheduler.waiting


def test_a_text_that_can_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the cache must hold prompt and max_tokens .* got num_blocks = 3"):
        make(num_blocks=3).add(text(10, output=10))


def test_prefix_is_shared_after_it_was_computed_and_its_last_token_is_not() -> None:
    scheduler = make(prefill_tokens=100)
    scheduler.add(text(12))
    scheduler.add(text(12))  # admitted in the same step: nothing is published yet
    play(scheduler, scheduler.schedule())
    assert scheduler.prefix_hits == 0
    scheduler.add(text(12))
    chunks = [c for _ in range(2) for c in scheduler.schedule() if c.sequence.prefilling]
    # Three full blocks hold the prompt, but its last token must be computed: two blocks are shared.
    assert [(c.first, c.last) for c in chunks][:1] == [(8, 12)] and scheduler.prefix_hits == 8


def test_samples_of_one_prompt_wait_for_the_first() -> None:
    scheduler = make(prefill_tokens=8)
    first = text(20)
    scheduler.add(first)
    scheduler.add(Sequence(tokens=list(first.tokens), prompt_length=20, max_length=23, leader=first))
    for _ in range(3):
        chunks = scheduler.schedule()
        assert [c.sequence for c in chunks] == [first]
        play(scheduler, chunks)
    scheduler.schedule()
    assert scheduler.prefix_hits == 16


def test_without_prefix_caching_nothing_is_shared() -> None:
    scheduler = make(prefill_tokens=100, prefix_caching=False)
    for _ in range(2):
        scheduler.add(text(12))
        while chunks := scheduler.schedule():
            play(scheduler, chunks)
    assert scheduler.prefix_hits == 0 and not scheduler.pool.match([b""])


def test_random_traffic_ends_with_every_block_free() -> None:
    rng = random.Random(0)
    for _ in range(20):
        scheduler = make(num_blocks=rng.randint(8, 20), max_batch=rng.randint(1, 5), prefill_tokens=rng.randint(1, 9))
        texts = []
        for _ in range(15):
            texts.append(text(rng.randint(1, 14), output=rng.randint(1, 8), first=rng.choice([0, 0, 50])))
            scheduler.add(texts[-1])
        steps = 0
        while chunks := scheduler.schedule():
            play(scheduler, chunks)
            if rng.random() < 0.1 and scheduler.running:
                scheduler.remove(rng.choice(scheduler.running))
            steps += 1
            assert steps < 2000
        assert scheduler.pool.free_blocks == scheduler.pool.num_blocks
        assert not scheduler.running and not scheduler.waiting
