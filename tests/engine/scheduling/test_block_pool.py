"""The KV block pool compared with a simple model of holders and cached blocks."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from turret.server.engine.scheduling.block_pool import BlockPool, next_key, root_key

NUM_BLOCKS = 9
KEYS = [root_key(0, ())]
for _number in range(12):
    KEYS.append(next_key(KEYS[-1], [_number]))
CHAIN = KEYS[1:]


class BlockPoolMachine(RuleBasedStateMachine):
    """Holders allocate, share a cached chain, name their blocks, and release them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 4)
        # The blocks of each holder in order. ``content`` maps a key to its block in the model.
        self.holders: list[list[int]] = []
        self.content: dict[bytes, int] = {}

    def _references(self) -> dict[int, int]:
        held: dict[int, int] = {}
        for blocks in self.holders:
            for block in blocks:
                held[block] = held.get(block, 0) + 1
        return held

    @rule(count=st.integers(0, NUM_BLOCKS))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        held = self._references()
        taken = self.pool.allocate(count)
        if taken is None:
            assert count > free
            assert self.pool.num_free == free
            return
        assert count <= free
        assert len(set(taken)) == count
        assert not set(taken) & held.keys()
        assert 0 not in taken
        # Allocated blocks may be overwritten, so they must not be found any more.
        self.content = {k: b for k, b in self.content.items() if b not in taken}
        if taken:
            self.holders.append(taken)

    @rule(start=st.integers(0, 3), length=st.integers(0, len(CHAIN)))
    def share(self, start: int, length: int) -> None:
        keys = CHAIN[start : start + length]
        expected = []
        for key in keys:
            if key not in self.content:
                break
            expected.append(self.content[key])
        shared = self.pool.share(keys)
        assert shared == expected
        if shared:
            self.holders.append(shared)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for blocks in self.holders for b in blocks]))
        key = data.draw(st.sampled_from(CHAIN[:6]))
        self.pool.register(block, key)
        # A key keeps its first block, and a block its first key.
        if key not in self.content and block not in self.content.values():
            self.content[key] = block

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(number))

    @rule()
    def forget(self) -> None:
        self.pool.forget_cached()
        self.content.clear()

    @invariant()
    def counts_agree(self) -> None:
        held = self._references()
        assert self.pool.num_active == len(held)
        assert self.pool.num_free == NUM_BLOCKS - 1 - len(held)
        cached = [block for block in self.content.values() if block not in held]
        assert self.pool.num_cached == len(cached)
        # The maintained count equals a count over the free blocks.
        assert self.pool.num_cached == sum(b in self.pool._key_of for b in self.pool._free)

    def teardown(self) -> None:
        for blocks in self.holders:
            self.pool.release(blocks)
        assert self.pool.num_active == 0
        assert sorted(self.pool.allocate(NUM_BLOCKS - 1) or []) == list(range(1, NUM_BLOCKS))


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def cached_chain(pool: BlockPool, keys: list[bytes]) -> list[int]:
    """Blocks that were computed under ``keys`` and released."""
    blocks = pool.allocate(len(keys))
    assert blocks is not None
    for block, key in zip(blocks, keys, strict=True):
        pool.register(block, key)
    pool.release(blocks)
    return blocks


def test_blocks_without_content_go_first_then_the_longest_unused() -> None:
    pool = BlockPool(6, 4)
    old = cached_chain(pool, CHAIN[:2])
    new = cached_chain(pool, CHAIN[4:6])
    assert set(pool.allocate(1) or []).isdisjoint({*old, *new})
    # The end of a chain is reused first, because others can still use its beginning.
    assert pool.allocate(1) == [old[1]]
    assert pool.share(CHAIN[:2]) == [old[0]]
    assert pool.share(CHAIN[4:6]) == new


def test_sharing_saves_a_block_from_reuse() -> None:
    pool = BlockPool(4, 4)
    chain = cached_chain(pool, CHAIN[:2])
    assert pool.share(CHAIN[:1]) == chain[:1]
    taken = pool.allocate(2)
    assert taken is not None
    assert chain[0] not in taken
    assert pool.allocate(1) is None


def test_releasing_what_is_not_held_is_a_bug() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="not held"):
        pool.release(blocks)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockPool(4, 4).blocks_for(tokens) == blocks
