"""Which tokens the model computes next: continuous batching over a pool of cache blocks. Plain Python over ints."""

from __future__ import annotations

import dataclasses
from collections import deque

from gpt2.blocks import BlockPool, chain_hashes


@dataclasses.dataclass(eq=False)
class Sequence:
    """One text being written: a sample of a request."""

    tokens: list[int]  # the prompt, then what was generated
    prompt_length: int
    max_length: int  # prompt and output together end here at the latest
    leader: Sequence | None = None  # an earlier sample of the same prompt, whose blocks this one will share
    blocks: list[int] = dataclasses.field(default_factory=list)
    hashes: list[bytes] = dataclasses.field(default_factory=list)  # of the prompt's full blocks
    computed: int = 0  # tokens whose keys and values are in the cache

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt_length

    def blocks_needed(self, block_size: int) -> int:
        """Blocks that the longest form of this text fills; its last token is never fed back, so it needs no room."""
        return max(1, -(-(self.max_length - 1) // block_size))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens first..last - 1 of a sequence, to be computed in this step."""

    sequence: Sequence
    first: int
    last: int

    @property
    def is_complete(self) -> bool:
        """Whether nothing of the text remains to be computed after it, so that a new token can be drawn."""
        return self.last == len(self.sequence.tokens)


class Scheduler:
    """Admits waiting sequences in order, cuts prompts into chunks, and batches everything that can decode.

    Invariants:
    - A running sequence holds every block that its longest form can need, so a started text is always finished.
    - The first in the queue is the first admitted: no request starves.
    - A step is either prefill (tokens of prompts) or decode (one generated token for each running sequence); while both
      kinds of work are there they alternate.
    - Blocks are published for sharing once prefill has computed them, and only blocks that prefill computed.
    """

    def __init__(self, pool: BlockPool, *, max_batch: int, prefill_tokens: int, prefix_caching: bool) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.prefill_tokens = prefill_tokens
        self.prefix_caching = prefix_caching
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prefix_hits = 0  # prompt tokens that did not have to be computed
        self._decoded_last = True

    def check(self, sequence: Sequence) -> None:
        """Raise ValueError where the whole cache could not hold a sequence."""
        needed = sequence.blocks_needed(self.pool.block_size)
        if needed > self.pool.num_blocks:
            raise ValueError(
                f"the cache must hold prompt and max_tokens ({sequence.max_length} tokens, {needed} blocks), "
                f"got num_blocks = {self.pool.num_blocks}"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, which `check` must accept."""
        self.check(sequence)
        if self.prefix_caching:
            # The last token of a prompt is computed in any case: its logits decide what comes next.
            shared = sequence.tokens[: sequence.prompt_length - 1]
            sequence.hashes = chain_hashes(shared, self.pool.block_size)
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """What to compute in the next step; empty where there is nothing to do."""
        self._admit()
        prompts = [s for s in self.running if s.prefilling]
        decoding = [s for s in self.running if not s.prefilling]
        self._decoded_last = not prompts or (bool(decoding) and not self._decoded_last)
        if self._decoded_last:
            return [Chunk(s, s.computed, s.computed + 1) for s in decoding]
        chunks: list[Chunk] = []
        budget = self.prefill_tokens
        for s in prompts:
            last = min(s.prompt_length, s.computed + budget)
            chunks.append(Chunk(s, s.computed, last))
            budget -= last - s.computed
            if budget == 0:
                break
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """Note that chunks were computed, and publish the blocks of prompts that they filled."""
        for chunk in chunks:
            s = chunk.sequence
            if s.prefilling:
                size = self.pool.block_size
                for index in range(chunk.first // size, min(chunk.last // size, len(s.hashes))):
                    self.pool.publish(s.blocks[index], s.hashes[index])
            s.computed = chunk.last

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and give its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            s = self.waiting[0]
            if self.prefix_caching and s.leader is not None and s.leader in self.running and s.leader.prefilling:
                return  # one step later the prompt is in the cache
            shared = self.pool.match(s.hashes)
            fresh = s.blocks_needed(self.pool.block_size) - len(shared)
            if fresh > self.pool.available(keep=shared):
                return
            self.pool.hold(shared)
            s.blocks = shared + self.pool.allocate(fresh)
            s.computed = len(shared) * self.pool.block_size
            self.prefix_hits += s.computed
            self.waiting.popleft()
            self.running.append(s)
