"""The paged KV cache's tensors. The engine assigns the blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.kernels.gpu.tables import upload
from turret.server.models.decoding.arch import Arch


class KvCache:
    """Keys and values of all layers, ``[layers, num_blocks, block_size, kv_heads, head_dim]``.

    Block 0 is never allocated, because it pads tiles. The memory is only reserved: a block takes
    RAM when it is first allocated (and cleared).
    """

    def __init__(
        self, arch: Arch, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (arch.num_layers, num_blocks, block_size, arch.num_kv_heads, arch.head_dim)
        self.block_size = block_size
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.clear([0])

    @staticmethod
    def block_bytes(arch: Arch, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        per_token = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim
        return per_token * block_size * dtype.itemsize

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks that change owner.

        The value at a masked position is still multiplied by 0, so a NaN of the previous owner
        would spread.
        """
        if blocks:
            index = torch.tensor(blocks, device=self.keys.device)
            self.keys.index_fill_(1, index, 0)
            self.values.index_fill_(1, index, 0)

    def fill(
        self, blocks: Sequence[int], keys: torch.Tensor, values: torch.Tensor, first: int
    ) -> None:
        """Copy stored keys and values of all layers into whole blocks.

        Args:
            blocks: Block numbers, in position order.
            keys: ``[layers, positions, kv_heads, head_dim]``, as attention reads them.
            values: Same shape.
            first: The stored position that goes into the first slot. Negative if padding slots,
                which stay zero, come first.
        """
        skip = max(-first, 0)
        places = [b * self.block_size + o for b in blocks for o in range(self.block_size)][skip:]
        slots = upload(torch.tensor(places), self.keys.device)
        rows = slice(first + skip, first + skip + len(places))
        for cache, stored in ((self.keys, keys), (self.values, values)):
            part = upload(stored[:, rows].to(cache.dtype), cache.device)
            cache.flatten(1, 2).index_copy_(1, slots, part)

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store new tokens.

        Args:
            layer: Layer number.
            slots: ``block · block_size + offset`` per row, ``[rows]`` int64.
            keys: Rotated, ``[rows, kv_heads, head_dim]``.
            values: ``[rows, kv_heads, head_dim]``.
        """
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys.to(self.keys.dtype))
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values.to(self.values.dtype))
