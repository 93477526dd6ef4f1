"""Which tokens the model computes next: continuous batching over a pool of cache blocks. Plain Python over ints.

`Scheduler.schedule` makes a plan, the engine launches it on the device, and `Scheduler.commit` records that it was
started. A plan may be made before the results of the previous one are known: the device executes work in launch order,
and a text grows by one token per step until it ends, so its length is known in advance.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

from gpt2.blocks import BlockPool, chain_hashes


@dataclasses.dataclass(eq=False)
class Family:
    """The samples of one request: they have the same prompt, and share its blocks."""

    holder: Sequence | None = None  # the running sample that computes, or has computed, the prompt
    hashes: list[bytes] | None = None  # of the prompt's full blocks, once the first sample is queued


@dataclasses.dataclass(eq=False)
class Sequence:
    """One text being written: a sample of a request."""

    tokens: list[int]  # the prompt, then what was generated and has come back from the device
    prompt_length: int
    max_length: int  # most tokens of prompt and output together
    family: Family = dataclasses.field(default_factory=Family)
    blocks: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0  # prompt tokens whose keys and values are in the cache
    planned: int = 0  # length once all work started so far is done, unless the text ends earlier
    swapped: bool = False  # its keys and values are in host memory, and it waits to resume

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt_length

    @property
    def hashes(self) -> list[bytes]:
        return self.family.hashes or []

    def blocks_for(self, length: int, block_size: int) -> int:
        """Blocks that this text needs at `length`; its last token has not been fed back yet, so it needs no slot."""
        return (min(length, self.max_length) - 2) // block_size + 1


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens first..last - 1 of a prompt, to be computed in this step."""

    sequence: Sequence
    first: int
    last: int

    @property
    def is_complete(self) -> bool:
        """Whether the prompt ends with this chunk, so that a token can be drawn."""
        return self.last == self.sequence.prompt_length


@dataclasses.dataclass
class Plan:
    """What the device does next, in this order."""

    swap_out: list[tuple[Sequence, list[int]]] = dataclasses.field(default_factory=list)  # save these blocks' contents
    swap_in: list[tuple[Sequence, int]] = dataclasses.field(default_factory=list)  # restore them, from this index on
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # from block, to block
    decode: list[Sequence] = dataclasses.field(default_factory=list)  # `steps` more tokens for each, or until it ends
    steps: int = 0
    grown: list[tuple[Sequence, int]] = dataclasses.field(default_factory=list)  # and the first index of its new blocks
    prefill: list[Chunk] = dataclasses.field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.decode or self.prefill or self.swap_out or self.swap_in)


class Scheduler:
    """Admits waiting sequences in order, prefills prompts in chunks, and decodes everything else.

    Invariants:
    - Every running sequence arrived before every waiting one, and both are kept in order of arrival. The oldest is
      never preempted while another runs, and by itself it fits: no request starves.
    - A sequence holds the blocks of all its computed tokens. When blocks run out, the youngest running sequence is
      preempted: an incomplete prompt starts over; any other text is swapped out to host memory and restored later, so
      that none of it is recomputed.
    - A block is written by one sequence. The full blocks of a prompt are shared once prefill has computed them; a
      sample that joins another's prompt gets its own copy of the block that both write next.
    """

    def __init__(self, pool: BlockPool, *, max_batch: int, prefill_tokens: int, prefix_caching: bool) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.prefill_tokens = prefill_tokens
        self.prefix_caching = prefix_caching
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.running: dict[Sequence, None] = {}
        self.prefix_hits = 0  # prompt tokens that did not have to be computed
        self.preemptions = 0

    def check(self, sequence: Sequence) -> None:
        """Raise ValueError if even the whole cache could not hold a sequence."""
        needed = sequence.blocks_for(sequence.max_length, self.pool.block_size)
        if needed > self.pool.num_blocks:
            raise ValueError(
                f"the cache must hold prompt and max_tokens ({sequence.max_length} tokens, {needed} blocks), "
                f"got num_blocks = {self.pool.num_blocks}"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, which `check` must accept."""
        self.check(sequence)
        if self.prefix_caching and sequence.family.hashes is None:
            # The last token of a prompt is always computed: its logits decide what comes next.
            shared = sequence.tokens[: sequence.prompt_length - 1]
            sequence.family.hashes = chain_hashes(shared, self.pool.block_size)
        sequence.planned = sequence.prompt_length
        self.waiting[sequence] = None

    def schedule(self, steps: int = 1) -> Plan:
        """What to compute next, at most `steps` tokens for each text; an empty plan if there is nothing to start.

        While prompts are being computed, texts decode one token at a time, so that neither waits long for the other.
        """
        plan = Plan()
        before = self.preemptions
        self._grow(plan, 1 if any(s.prefilling for s in self.running) else steps)
        if self.preemptions == before:  # otherwise a newcomer would take the blocks just given up
            self._admit(plan)
        budget = self.prefill_tokens
        for s in self.running:
            if budget and s.prefilling:
                last = min(s.prompt_length, s.computed + budget)
                plan.prefill.append(Chunk(s, s.computed, last))
                budget -= last - s.computed
        return plan

    def commit(self, plan: Plan) -> None:
        """Record that a plan was started, and publish the prompt blocks that it fills."""
        size = self.pool.block_size
        for s in plan.decode:
            s.planned = min(s.planned + plan.steps, s.max_length)
        for chunk in plan.prefill:
            s = chunk.sequence
            for index in range(chunk.first // size, min(chunk.last // size, len(s.hashes))):
                self.pool.publish(s.blocks[index], s.hashes[index])
            s.computed = chunk.last
            s.planned += chunk.is_complete

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and release its blocks."""
        self.running.pop(sequence, None)
        self.waiting.pop(sequence, None)
        self._release(sequence)

    def reset(self) -> None:
        """Forget every sequence and every prefix, in whatever state an interrupted call has left them."""
        for sequence in (*self.running, *self.waiting):
            sequence.blocks = []
        self.running.clear()
        self.waiting.clear()
        self.pool = BlockPool(self.pool.num_blocks, self.pool.block_size)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        if sequence.family.holder is sequence:
            sequence.family.holder = None

    def _grow(self, plan: Plan, steps: int) -> None:
        """Allocate the blocks that every text needs to continue; plans fewer steps before it preempts any sequence."""
        size = self.pool.block_size
        decoding = [s for s in self.running if s.computed >= s.prompt_length and s.planned < s.max_length]
        steps = min(steps, max((s.max_length - s.planned for s in decoding), default=0))
        while True:
            growing = [(s, s.blocks_for(s.planned + steps, size) - len(s.blocks)) for s in decoding]
            growing = [(s, more) for s, more in growing if more > 0]
            if sum(more for _, more in growing) <= self.pool.free_blocks:
                break
            if steps > 1:
                steps //= 2
                continue
            youngest = next(reversed(self.running))
            self._preempt(youngest, plan)
            decoding = [s for s in decoding if s is not youngest]
        for s, more in growing:
            plan.grown.append((s, len(s.blocks)))
            s.blocks += self.pool.allocate(more)
        plan.decode, plan.steps = decoding, steps if decoding else 0

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        del self.running[sequence]
        if sequence.prefilling:
            sequence.computed = 0
        else:
            sequence.swapped = True
            plan.swap_out.append((sequence, sequence.blocks))
        self._release(sequence)
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)
        self.preemptions += 1

    def _admit(self, plan: Plan) -> None:
        size = self.pool.block_size
        while self.waiting and len(self.running) < self.max_batch:
            s = next(iter(self.waiting))
            holder = s.family.holder
            if s.swapped:
                if len(s.tokens) < s.planned:
                    return  # its last tokens are still on their way from the device
                kept, length = self.pool.match(s.hashes), s.planned + 1
            elif holder is not None:
                if holder.prefilling:
                    return  # the prompt will soon be in the cache
                kept, length = holder.blocks[: (s.prompt_length - 1) // size], s.prompt_length + 2
            else:
                kept, length = self.pool.match(s.hashes), s.prompt_length + 2
            fresh = s.blocks_for(length, size) - len(kept)
            # One block is left for each running text, so that admitting one does not cause a preemption at once.
            if fresh + len(self.running) > self.pool.available(keep=kept):
                return
            self.pool.hold(kept)
            s.blocks = kept + self.pool.allocate(fresh)
            if s.swapped:
                plan.swap_in.append((s, len(kept)))
                s.swapped = False
            elif holder is not None:
                if (s.prompt_length - 1) % size:
                    plan.copies.append((holder.blocks[len(kept)], s.blocks[len(kept)]))
                s.computed = s.prompt_length - 1
                self.prefix_hits += s.computed
            else:
                s.computed = len(kept) * size
                self.prefix_hits += s.computed
                s.family.holder = s
            del self.waiting[s]
            self.running[s] = None
