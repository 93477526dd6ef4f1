"""The blocks of the paged key-value cache, by number: which are held, which are free, and what they hold."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def chain_hashes(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """One hash per full block of `tokens`, over that block and all before it: equal hashes mean equal prefixes."""
    hashes: list[bytes] = []
    digest = b""
    for first in range(0, len(tokens) - block_size + 1, block_size):
        block = array("q", tokens[first : first + block_size]).tobytes()
        digest = hashlib.blake2b(digest + block, digest_size=16).digest()
        hashes.append(digest)
    return hashes


class BlockPool:
    """Counts references to blocks 0..num_blocks - 1 and remembers which hold the start of a known text.

    Invariants, which `check` asserts:
    - A block is held (at least one reference) or free (none), never both.
    - A published block keeps its contents and its hash while it is held, and then until it is allocated again.
    - A hash names at most one block, and a block has at most one hash.
    - Free blocks without a hash are allocated first, the most recently freed one first, so that little memory is
      touched while they last; then those with a hash, the least recently freed one first (LRU).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        # Free blocks in the order they were freed: those without useful contents, and those known by a hash.
        self._plain: OrderedDict[int, None] = OrderedDict.fromkeys(reversed(range(num_blocks)))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds, including those that still cache a known text."""
        return len(self._plain) + len(self._cached)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix. They are not held yet: see `hold`."""
        blocks = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def available(self, keep: Iterable[int] = ()) -> int:
        """Blocks that `allocate` can return once the blocks of `keep` are held."""
        return self.free_blocks - sum(self._references[b] == 0 for b in keep)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block."""
        for block in blocks:
            if self._references[block] == 0:
                self._plain.pop(block, None)
                self._cached.pop(block, None)
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference. Raises RuntimeError if there are fewer."""
        if count > self.free_blocks:
            raise RuntimeError(f"BlockPool: {count} blocks were asked for and {self.free_blocks} are free")
        blocks = []
        for _ in range(count):
            if self._plain:
                block, _ = self._plain.popitem()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._hash_of.pop(block)]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Register the contents of a held block by hash. The first block published under a hash keeps it."""
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def release(self, blocks: Iterable[int]) -> None:
        """Drop a reference to each block, the last one first, so that cached prefixes stay longest."""
        for block in reversed(list(blocks)):
            self._references[block] -= 1
            if self._references[block] == 0:
                (self._cached if block in self._hash_of else self._plain)[block] = None

    def check(self) -> None:
        """Assert the invariants of the class."""
        free = set(self._plain) | set(self._cached)
        assert len(free) == self.free_blocks, "a block is free twice"
        assert all((self._references[b] == 0) == (b in free) for b in range(self.num_blocks)), "held and free disagree"
        assert all(b in self._hash_of for b in self._cached) and not any(b in self._hash_of for b in self._plain)
        assert {b: d for d, b in self._block_of.items()} == self._hash_of, "hashes and blocks disagree"
