"""Scheduler: what is computed when. No tensors: a device made of lists carries out the plans and checks them."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.blocks import BlockPool
from gpt2.scheduler import Family, Plan, Scheduler, Sequence

BLOCK = 4


def make(num_blocks: int = 64, *, max_batch: int = 4, prefill_tokens: int = 10, **options: Any) -> Scheduler:
    options = {"prefix_caching": True, **options}
    return Scheduler(BlockPool(num_blocks, BLOCK), max_batch=max_batch, prefill_tokens=prefill_tokens, **options)


def text(length: int, output: int = 3, first: int = 0, family: Family | None = None) -> Sequence:
    tokens = list(range(first, first + length))
    return Sequence(tokens, prompt_length=length, max_length=length + output, family=family or Family())


class Device:
    """Carries out plans as the engine does, with a cache that remembers what was written.

    A slot of the cache holds the whole sequence up to its token and the path that wrote it, so that a read of anything
    but the sequence's own past is caught. Results come back when `receive` is called.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.cache: list[list[Any]] = [[None] * BLOCK for _ in range(scheduler.pool.num_blocks)]
        self.saved: dict[Sequence, list[list[Any]]] = {}
        self.written: dict[Sequence, list[int]] = {}  # texts as the device knows them
        self.unread: deque[list[tuple[Sequence, list[int]]]] = deque()
        self.ended: set[Sequence] = set()

    def start(self, plan: Plan) -> None:
        for s, blocks in plan.swap_out:
            self.saved[s] = [list(self.cache[b]) for b in blocks]
        for s, first in plan.swap_in:
            assert s.tokens == self.written[s], "a text went on before the host knew it"
            for block, content in list(zip(s.blocks, self.saved.pop(s)))[first:]:
                self.cache[block] = list(content)
        for source, target in plan.copies:
            self.cache[target] = list(self.cache[source])
        results = []
        for s in plan.decode:
            new = []
            for _ in range(plan.steps):
                if len(self.written[s]) < s.max_length:
                    self._compute(s, len(self.written[s]) - 1, "decode")
                    new.append(self._draw(s))
            results.append((s, new))
        for chunk in plan.prefill:
            s = chunk.sequence
            self.written.setdefault(s, list(s.tokens))
            for position in range(chunk.first, chunk.last):
                self._compute(s, position, "prefill")
            if chunk.is_complete:
                results.append((s, [self._draw(s)]))
        self.unread.append(results)

    def _compute(self, s: Sequence, position: int, path: str) -> None:
        block, offset = s.blocks[position // BLOCK], position % BLOCK
        known = self.written[s]
        self.cache[block][offset] = (tuple(known[: position + 1]), path)
        for p in range(position + 1):
            content = self.cache[s.blocks[p // BLOCK]][p % BLOCK]
            expected = "prefill" if p < s.prompt_length else "decode"
            assert content == (tuple(known[: p + 1]), expected), (p, content)

    def _draw(self, s: Sequence) -> int:
        self.written[s].append(hash((id(s), len(self.written[s]))))
        return self.written[s][-1]

    def receive(self) -> None:
        for s, new in self.unread.popleft():
            if s in self.ended:
                continue
            s.tokens += new
            if len(s.tokens) == s.max_length:
                self.end(s)

    def end(self, s: Sequence) -> None:
        self.ended.add(s)
        self.saved.pop(s, None)
        self.scheduler.remove(s)

    def step(self, steps: int = 1, most_unread: int = 0) -> Plan:
        plan = self.scheduler.schedule(steps)
        self.scheduler.pool.check()
        if not plan.is_empty:
            self.start(plan)
            self.scheduler.commit(plan)
        while len(self.unread) > (0 if plan.is_empty else most_unread):
            self.receive()
        return plan

    def run(self, steps: int = 1, most_unread: int = 0) -> list[Plan]:
        plans = []
        while self.scheduler.waiting or self.scheduler.running:
            plans.append(self.step(steps, most_unread))
            assert len(plans) < 3000, "no end"
        return plans


def test_a_long_prompt_is_cut_and_only_its_end_is_complete() -> None:
    scheduler = make()
    scheduler.add(text(25))
    device = Device(scheduler)
    seen = [[(c.first, c.last, c.is_complete) for c in device.step().prefill] for _ in range(3)]
    assert seen == [[(0, 10, False)], [(10, 20, False)], [(20, 25, True)]]


def test_short_prompts_share_a_step_within_the_budget() -> None:
    scheduler = make()
    for i in range(3):
        scheduler.add(text(4, first=100 * i))
    assert [(c.first, c.last) for c in scheduler.schedule().prefill] == [(0, 4), (0, 4), (0, 2)]


def test_texts_under_way_go_on_beside_a_prompt_one_token_at_a_time() -> None:
    scheduler = make()
    device = Device(scheduler)
    scheduler.add(text(2, output=50))
    device.step(8)
    scheduler.add(text(40, first=100))
    plans = [device.step(8) for _ in range(6)]
    # The new prompt is seen when the first plan is made, so the sequences get eight tokens once more before it.
    assert [(p.steps, sum(c.last - c.first for c in p.prefill)) for p in plans] == [
        (8, 10), (1, 10), (1, 10), (1, 10), (8, 0), (8, 0),
    ]  # fmt: skip


def test_no_more_than_max_batch_run_and_the_queue_keeps_its_order() -> None:
    scheduler = make(max_batch=2)
    texts = [text(3, first=10 * i) for i in range(5)]
    for t in texts:
        scheduler.add(t)
    order = []
    for plan in Device(scheduler).run():
        order += [texts.index(c.sequence) for c in plan.prefill if c.first == 0]
        assert len(plan.decode) <= 2
    assert order == [0, 1, 2, 3, 4]


def test_the_youngest_is_preempted_saved_and_restored() -> None:
    scheduler = make(num_blocks=8)
    texts = [text(5, output=20, first=100 * i) for i in range(3)]
    for t in texts:
        scheduler.add(t)
    device = Device(scheduler)
    plans = device.run()
    moved = [texts.index(s) for p in plans for s, _ in p.swap_out]
    assert moved and moved[0] == 2 and 0 not in moved  # the oldest is never preempted
    assert scheduler.preemptions == len(moved) == sum(len(p.swap_in) for p in plans)
    assert device.ended == set(texts)
    assert scheduler.pool.free_blocks == 8


def test_a_preempted_prompt_begins_anew() -> None:
    scheduler = make(num_blocks=8, prefill_tokens=4, prefix_caching=False)
    scheduler.add(text(4, output=28))
    device = Device(scheduler)
    for _ in range(14):
        device.step()
    late = text(14, output=2, first=100)
    scheduler.add(late)
    plans = device.run()
    begun = [c.first for p in plans for c in p.prefill if c.sequence is late]
    assert begun.count(0) >= 1 and begun[-1] == 12 and not any(p.swap_out for p in plans)


def test_fewer_steps_come_before_preemption() -> None:
    scheduler = make(num_blocks=6, prefix_caching=False)
    for i in range(2):
        scheduler.add(text(4, output=8, first=100 * i))
    device = Device(scheduler)
    steps = [p.steps for p in device.run(8) if p.decode]
    assert scheduler.preemptions == 0 and steps[0] == 7


def test_a_text_that_can_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the cache must hold prompt and max_tokens .* got num_blocks = 3"):
        make(num_blocks=3).add(text(10, output=10))
    make(num_blocks=3).add(text(10, output=3))  # its last token is never fed back


def test_prefix_is_shared_after_it_was_computed_and_its_last_token_is_not() -> None:
    scheduler = make(prefill_tokens=100)
    device = Device(scheduler)
    scheduler.add(text(12, output=9))
    scheduler.add(text(12))  # admitted in the same step: nothing is published yet
    device.step()
    assert scheduler.prefix_hits == 0
    scheduler.add(text(12))
    # Three full blocks hold the prompt, but its last token must be computed, so two blocks are shared.
    assert [(c.first, c.last) for c in device.step().prefill] == [(8, 12)] and scheduler.prefix_hits == 8


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize(("length", "copied"), [(20, 1), (21, 0)])
def test_samples_take_over_the_prompt_and_a_copy_of_its_last_block(
    prefix_caching: bool, length: int, copied: int
) -> None:
    scheduler = make(prefill_tokens=8, prefix_caching=prefix_caching)
    device = Device(scheduler)
    first = text(length, output=9)
    others = [text(length, output=9, family=first.family) for _ in range(2)]
    for s in (first, *others):
        scheduler.add(s)
    for _ in range(3):
        assert [c.sequence for c in device.step().prefill] == [first]
    plan = device.step()
    assert [(c.sequence, c.first, c.last) for c in plan.prefill] == [(s, length - 1, length) for s in others]
    assert len(plan.copies) == 2 * copied and scheduler.prefix_hits == 2 * (length - 1)
    assert others[0].blocks[: (length - 1) // BLOCK] == first.blocks[: (length - 1) // BLOCK]
    device.run()
    assert scheduler.pool.free_blocks == 64


def test_without_prefix_caching_nothing_is_shared() -> None:
    scheduler = make(prefill_tokens=100, prefix_caching=False)
    device = Device(scheduler)
    for _ in range(2):
        scheduler.add(text(12))
        device.run()
    assert scheduler.prefix_hits == 0 and not scheduler.pool.match([b""])


def test_a_request_that_goes_on_forever_starves_nobody() -> None:
    """The oldest waiting request is admitted next, even if younger and smaller ones would fit."""
    scheduler = make(num_blocks=12, max_batch=4)
    device = Device(scheduler)
    large = text(30, output=14)
    for i in range(3):
        scheduler.add(text(4, output=6, first=100 * i))
    device.step()
    scheduler.add(large)
    for step in range(60):
        scheduler.add(text(2, output=4, first=1000 + 10 * step))
        device.step()
    assert large in device.ended


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_traffic_reads_its_own_past_and_ends_with_every_block_free(data: st.DataObject) -> None:
    """Pools small enough to force preemption, shared prefixes, samples, aborts, plans ahead of their results."""
    draw = data.draw
    scheduler = make(
        num_blocks=draw(st.integers(8, 16)),
        max_batch=draw(st.integers(1, 6)),
        prefill_tokens=draw(st.integers(1, 12)),
        prefix_caching=draw(st.booleans()),
    )
    device = Device(scheduler)
    steps, most_unread = draw(st.integers(1, 5)), draw(st.integers(0, 2))
    texts: list[Sequence] = []
    for _ in range(draw(st.integers(1, 10))):
        length, output = draw(st.integers(1, 14)), draw(st.integers(1, 12))
        family, first = Family(), draw(st.sampled_from([0, 0, 50]))
        for _ in range(draw(st.sampled_from([1, 1, 3]))):
            texts.append(text(length, output, first, family))
            scheduler.add(texts[-1])
        for _ in range(draw(st.integers(0, 4))):
            device.step(steps, most_unread)
        if draw(st.integers(0, 5)) == 0:
            alive = [s for s in texts if s not in device.ended]
            if alive:
                device.end(draw(st.sampled_from(alive)))
    device.run(steps, most_unread)
    while device.unread:
        device.receive()
    assert set(texts) == device.ended and not device.saved
    assert scheduler.pool.free_blocks == scheduler.pool.num_blocks
    scheduler.pool.check()
