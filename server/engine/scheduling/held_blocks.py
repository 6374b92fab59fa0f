"""The blocks that sequences hold: a sequence's own and, where it has one, its guide's. No torch.

A guided sequence (``Sequence.guide``) has two lots of keys and values, of the same positions: its
own and those of the pass that tells it its scalings. They come and go together. Each lot is named
by its own keys, so a guide that is the base model shares its blocks with the base's requests; what
both have need not be computed.
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
        # A guide holds as many blocks as its sequence does.
        each = self._pool.blocks_for(num_tokens) - len(sequence.blocks)
        return each * len(sequence.lots) if each > 0 else 0

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
        lots = sequence.lots
        for index, lot in enumerate(lots):
            lot.blocks.extend(fresh[index :: len(lots)])
        return True

    def free(self, sequence: Sequence) -> None:
        """Free all blocks of a sequence; none of its tokens count as computed any more."""
        for lot in sequence.lots:
            self._pool.release(lot.blocks)
            lot.blocks = []
            lot.num_computed = 0

    def find(self, sequence: Sequence, num_usable: int, base_generation: int) -> None:
        """Take the blocks of the sequence's beginning that are in the cache.

        Args:
            sequence: Holds none.
            num_usable: Blocks of the beginning that it may take.
            base_generation: Of the weights.
        """
        size = self._pool.block_size
        for lot in sequence.lots:
            if not lot.keys:
                lot.keys.append(_root_key(lot, base_generation, lot is sequence.guide))
            lot.extend_keys(num_usable * size, size)
            lot.blocks = self._pool.share(lot.keys[1 : num_usable + 1])
        count = min(len(lot.blocks) for lot in sequence.lots)
        for lot in sequence.lots:
            self._pool.release(lot.blocks[count:])
            lot.blocks = lot.blocks[:count]
            lot.num_computed = count * size

    def computed(self, sequence: Sequence, count: int) -> None:
        """Record that more tokens are in the cache, and make the blocks that they fill findable."""
        size = self._pool.block_size
        for lot in sequence.lots:
            before = lot.num_computed
            lot.num_computed += count
            lot.extend_keys(lot.num_computed, size)
            for index in range(before // size, lot.num_computed // size):
                self._pool.register(lot.blocks[index], lot.keys[index + 1])

    def num_repeated(self, sequences: Iterable[Sequence]) -> int:
        """How many more blocks these sequences would hold if they shared none."""
        held = sum(len(lot.blocks) for sequence in sequences for lot in sequence.lots)
        return held - self._pool.num_active


def _root_key(lot: Sequence, base_generation: int, is_guide: bool) -> bytes:
    mix = lot.stages[0].mix.key
    # A guide without adapters is the base's ordinary pass, so it shares the base's blocks.
    return root_key(base_generation, mix, is_long=lot.is_long, is_guide=is_guide and bool(mix))
