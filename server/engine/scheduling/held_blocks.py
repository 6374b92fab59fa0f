"""The blocks that sequences hold: their own and those of their first passes. No torch.

A sequence with a first pass (``Sequence.first_pass``) has keys and values of two passes over the
same positions, which come and go together. The blocks of each pass have keys of their own, so a
first pass of the base model shares blocks with the base's requests. What the cache has of both
passes need not be computed.
"""

from __future__ import annotations

from collections.abc import Iterable

from turret.server.engine.scheduling.block_pool import BlockPool, root_key
from turret.server.engine.scheduling.sequence import Sequence


class HeldBlocks:
    """Takes blocks from a pool for sequences, and names what is in them.

    Args:
        pool: The KV blocks.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Number of blocks that the sequence lacks to hold this many tokens."""
        # A first pass holds as many blocks as its sequence does.
        each = self._pool.blocks_for(num_tokens) - len(sequence.blocks)
        return each * len(sequence.passes) if each > 0 else 0

    def reserve(self, sequence: Sequence, num_tokens: int, new_blocks: list[int]) -> bool:
        """Allocate all blocks that the sequence needs for this many tokens, or none.

        Args:
            sequence: Who needs them.
            num_tokens: From its beginning.
            new_blocks: What it got is added.

        Returns:
            Whether there were enough.
        """
        count = self.missing(sequence, num_tokens)
        if not count:
            # Common case: a decode step needs no new block.
            return True
        fresh = self._pool.allocate(count)
        if fresh is None:
            return False
        new_blocks.extend(fresh)
        passes = sequence.passes
        for index, each in enumerate(passes):
            each.blocks.extend(fresh[index :: len(passes)])
        return True

    def free(self, sequence: Sequence) -> None:
        """Free all blocks of a sequence; none of its tokens count as computed any more."""
        for each in sequence.passes:
            self._pool.release(each.blocks)
            each.blocks = []
            each.num_computed = 0

    def find(self, sequence: Sequence, num_usable: int, base_generation: int) -> None:
        """Take the blocks of the sequence's beginning that are in the cache.

        Args:
            sequence: Holds none.
            num_usable: Blocks of the beginning that it may take.
            base_generation: Of the weights.
        """
        size = self._pool.block_size
        for each in sequence.passes:
            if not each.keys:
                each.keys.append(_root_key(each, base_generation, each is sequence.first_pass))
            each.extend_keys(num_usable * size, size)
            each.blocks = self._pool.share(each.keys[1 : num_usable + 1])
        count = min(len(each.blocks) for each in sequence.passes)
        for each in sequence.passes:
            self._pool.release(each.blocks[count:])
            each.blocks = each.blocks[:count]
            each.num_computed = count * size

    def computed(self, sequence: Sequence, count: int) -> None:
        """Record that more tokens are in the cache, and make the blocks that they fill findable."""
        size = self._pool.block_size
        for each in sequence.passes:
            before = each.num_computed
            each.num_computed += count
            each.extend_keys(each.num_computed, size)
            for index in range(before // size, each.num_computed // size):
                self._pool.register(each.blocks[index], each.keys[index + 1])

    def num_repeated(self, sequences: Iterable[Sequence]) -> int:
        """How many more blocks these sequences would hold if they shared none."""
        held = sum(len(each.blocks) for sequence in sequences for each in sequence.passes)
        return held - self._pool.num_active


def _root_key(sequence: Sequence, base_generation: int, is_first_pass: bool) -> bytes:
    mix = sequence.stages[0].mix.key
    # A first pass without adapters is the base's ordinary pass, so it shares the base's blocks.
    return root_key(
        base_generation, mix, is_long=sequence.is_long, is_first_pass=is_first_pass and bool(mix)
    )
