"""Accounting of KV blocks: which sequences own them, and which can be found by content. No torch.

The key of a full block is a hash chain that begins with the base generation, mix and soft tokens,
and covers the token ids up to its end. So only a request that would compute the same values finds a
block. The first block that holds text of the request is keyed with the request's salt, so requests
with different salts share only the blocks before their text: an adapter's prefix or soft tokens. If
more adapters take effect within the text, the key of the block in which they do so includes the
change. Earlier blocks have the keys of the smaller mix.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

# (adapter uuid, generation, weight) of every member, in the request's order.
MixKey = Sequence[tuple[str, int, float]]


def root_key(
    base_generation: int, mix: MixKey, *, is_long: bool = False, is_first_pass: bool = False
) -> bytes:
    """The first key of the chain, which identifies the weights with which a sequence is computed.

    Args:
        base_generation: Changes when the base weights change.
        mix: (adapter uuid, generation, weight) in the request's order. Names are not used, because
            a name may be loaded again with other weights.
        is_long: Whether the sequence's attention keys are rotated like those of long sequences.
        is_first_pass: Whether the sequence is an adapter's first pass, at constant scalings.
    """
    parts = [str(base_generation), *map(_member, mix)]
    if is_long:
        parts.append("long")
    if is_first_pass:
        parts.append("first pass")
    return hashlib.blake2b("|".join(parts).encode(), digest_size=16).digest()


def next_key(
    previous: bytes,
    token_ids: Sequence[int],
    changes: Sequence[tuple[int, MixKey]] = (),
    *,
    salt: bytes = b"",
) -> bytes:
    """Key of the block that holds ``token_ids`` and follows the block with the key ``previous``.

    Args:
        previous: The key of the previous block, or the root key.
        token_ids: The tokens of the block.
        changes: Where in the block another mix begins, and which one.
        salt: A secret of at most 64 bytes, without which the key cannot be computed.
    """
    # Soft tokens have the placeholder id -1. The root key identifies them.
    data = b"".join((token & 0xFFFFFFFF).to_bytes(4, "little") for token in token_ids)
    changed = [f"@{offset}|" + "|".join(map(_member, mix)) for offset, mix in changes]
    chained = previous + data + "".join(changed).encode()
    return hashlib.blake2b(chained, digest_size=16, key=salt).digest()


def _member(member: tuple[str, int, float]) -> str:
    uuid, generation, weight = member
    return f"{uuid}:{generation}:{weight!r}"


class BlockPool:
    """Owner of blocks ``1 … num_blocks − 1``. Block 0 is padding and is never allocated.

    A block is *active* while some sequence holds it, otherwise *free*. A free block may still be
    *cached*, which means that it can be found by key until it is allocated again. Free blocks that
    have no key are allocated first, and after them the least recently freed ones.

    Attributes:
        num_cached: Free blocks that can still be found by key.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2, "one block is padding"
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(1, num_blocks))
        self._references = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Kept up to date, because every step reads it: counting 20,000 free blocks takes 0.7 ms.
        self.num_cached = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_active(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that ``num_tokens`` need."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Allocate ``count`` blocks; returns None and allocates none if there are not enough."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
                self.num_cached -= 1
            assert self._references[block] == 0
            self._references[block] = 1
            taken.append(block)
        return taken

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """Take the cached blocks of ``keys`` until one is missing; each gains a reference."""
        shared = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            if self._references[block] == 0:
                del self._free[block]
                self.num_cached -= 1
            self._references[block] += 1
            shared.append(block)
        return shared

    def release(self, blocks: Sequence[int]) -> None:
        """Give references back. Later blocks of a sequence are reused before earlier ones."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is not held"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block in self._key_of:
                    self.num_cached += 1
                else:
                    # The block cannot be found by key, so allocate it first.
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, key: bytes) -> None:
        """Make a full block findable by a key, unless another block already has that key."""
        assert self._references[block] > 0
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def forget_cached(self) -> None:
        """Drop every key, because the content of some blocks may not match their keys."""
        self._key_of.clear()
        self._block_of.clear()
        self.num_cached = 0
