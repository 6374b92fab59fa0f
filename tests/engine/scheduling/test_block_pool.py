"""The order in which the KV block pool hands blocks out; test_prefix_cache.py tests the rest."""

from __future__ import annotations

import pytest

from turret.server.engine.scheduling.block_pool import BlockPool, next_key, root_key

KEYS = [root_key(0, ())]
for _number in range(12):
    KEYS.append(next_key(KEYS[-1], [_number]))
CHAIN = KEYS[1:]


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


def test_nothing_is_found_after_the_base_changed() -> None:
    pool = BlockPool(6, 4)
    cached_chain(pool, CHAIN[:2])
    assert pool.num_cached == 2
    pool.forget_cached()
    assert pool.num_cached == 0
    assert pool.share(CHAIN[:2]) == []


def test_a_key_keeps_its_first_block_and_a_block_its_first_key() -> None:
    pool = BlockPool(6, 4)
    first, second = pool.allocate(2) or []
    for block, key in ((first, CHAIN[0]), (second, CHAIN[0]), (first, CHAIN[1])):
        pool.register(block, key)
    assert pool.share(CHAIN[:1]) == [first]
    assert pool.share(CHAIN[1:2]) == []
    # A block that follows a gap was computed in another context.
    pool.register(second, CHAIN[2])
    assert pool.share(CHAIN[:3]) == [first]


def test_sharing_saves_a_block_from_reuse() -> None:
    pool = BlockPool(4, 4)
    chain = cached_chain(pool, CHAIN[:2])
    assert pool.share(CHAIN[:1]) == chain[:1]
    taken = pool.allocate(2)
    assert taken is not None
    assert chain[0] not in taken
    assert pool.allocate(1) is None


def test_releasing_a_block_that_is_not_held_is_a_bug() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="not held"):
        pool.release(blocks)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert BlockPool(4, 4).blocks_for(tokens) == blocks
