"""Shelves of the gpu path whose tensors lie by themselves and are found by their addresses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from turret.kernels.gpu.tables.staged_buffer import upload
from turret.server.adapters.device.hadamard_shelf import grown
from turret.server.adapters.device.layout import ProjectionLayout


class AddressedShelf:
    """Addresses by slot, each adapter's tensors its own.

    For those that are large: in a table of slots an adapter would leave room for others that do
    not come, a table that grows would be there twice for a while, and one that emptied would stay.

    Attributes:
        table: Where the tensors of a slot lie in each layer, ``[layers, slots, …]`` int64; 0 where
            its adapter has none.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        projection: str,
        dtype: torch.dtype,
        device: torch.device,
        *each: int,
    ) -> None:
        self.projection = projection
        self.layers: set[int] = set()
        self._layout = layout
        self._like = {"dtype": dtype, "device": device}
        # By slot: what the addresses are of.
        self._kept: dict[int, list[torch.Tensor]] = {}
        shape = (layout.num_layers, 0, *each)
        self.table = torch.zeros(shape, dtype=torch.int64, device=device)

    def grow(self, num_slots: int) -> None:
        """Make room for the addresses of ``num_slots`` adapters."""
        self.table = grown(self.table, num_slots)

    def clear(self, slot: int) -> None:
        """Let go of its tensors. Their addresses stay, and no step reads them."""
        self._kept.pop(slot, None)

    def addresses(self) -> list[object]:
        """Where its table is, and how large; what it says may differ between steps."""
        return [(self.table.data_ptr(), self.table.shape)]

    def keep(self, slot: int, found: Iterable[tuple[int, Sequence[torch.Tensor]]]) -> None:
        """Copy an adapter's tensors, by layer, and note where they are."""
        addresses = torch.zeros(self.table[:, slot].shape, dtype=torch.int64)
        kept = self._kept[slot] = []
        for layer, tensors in found:
            self.layers.add(layer)
            own = [tensor.to(**self._like, copy=True) for tensor in tensors]
            at = torch.tensor([tensor.data_ptr() for tensor in own])
            addresses[layer] = at.view(addresses[layer].shape)
            kept += own
        self.table[:, slot] = upload(addresses, self.table.device)
