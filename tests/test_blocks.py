"""BlockPool and prefix hashes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.blocks import BlockPool, chain_hashes


def test_hashes_name_whole_prefixes() -> None:
    a = chain_hashes([1, 2, 3, 4, 5, 6, 7], 2)
    assert len(a) == 3  # the seventh token fills no block
    assert chain_hashes([1, 2, 3, 4], 2) == a[:2]
    b = chain_hashes([9, 2, 3, 4, 5, 6], 2)
    assert not set(a) & set(b)  # equal blocks after a different start are different prefixes
    assert len(set(chain_hashes([1, 1, 1, 1], 2))) == 2


def test_a_cached_prefix_is_found_until_its_block_is_taken() -> None:
    pool = BlockPool(3, 2)
    hashes = chain_hashes([1, 2, 3, 4], 2)
    blocks = pool.allocate(2)
    for block, digest in zip(blocks, hashes):
        pool.publish(block, digest)
    assert pool.match(hashes) == blocks
    pool.release(blocks)
    assert pool.free_blocks == 3 and pool.match(hashes) == blocks
    pool.allocate(1)  # the block without a hash goes first
    assert pool.match(hashes) == blocks
    pool.allocate(1)  # then the end of the prefix, before its beginning
    assert pool.match(hashes) == blocks[:1]
    pool.check()


def test_available_does_not_count_what_is_kept() -> None:
    pool = BlockPool(2, 2)
    (block,) = pool.allocate(1)
    pool.publish(block, b"x")
    pool.release([block])
    assert pool.available() == 2 and pool.available(keep=[block]) == 1
    pool.hold([block])
    assert pool.available(keep=[block]) == 1


def test_asking_for_too_much() -> None:
    pool = BlockPool(2, 2)
    with pytest.raises(RuntimeError, match="3 blocks were asked for and 2 are free"):
        pool.allocate(3)
    assert pool.free_blocks == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 7)), max_size=60))
def test_invariants_hold_whatever_happens(actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(8, 4)
    held: list[list[int]] = []
    hashes = [bytes([i]) for i in range(5)]
    for action, number in actions:
        if action == "take" and number % 3 + 1 <= pool.free_blocks:
            blocks = pool.allocate(number % 3 + 1)
            held.append(blocks)
            for block in blocks:
                pool.publish(block, hashes[(number + block) % 5])
        elif action == "share":
            blocks = pool.match(hashes[: number % 5])
            pool.hold(blocks)
            held.append(blocks)
        elif action == "release" and held:
            pool.release(held.pop(number % len(held)))
        pool.check()
        assert pool.free_blocks == 8 - len({b for blocks in held for b in blocks})
    for blocks in held:
        pool.release(blocks)
    pool.check()
    assert pool.free_blocks == 8
