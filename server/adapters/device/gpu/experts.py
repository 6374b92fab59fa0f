"""Low-rank updates of experts on the gpu path: addresses by slot, each adapter's factors its own.

An adapter may be as large as a gigabyte. In a table of slots it would leave room for others that do
not come, a table that grows would be there twice for a while, and one that emptied would stay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch

from turret.kernels.expert_routing import Routing
from turret.kernels.gpu.experts.expert_updates import add_expert_updates
from turret.kernels.gpu.tables.row_table import RowTable
from turret.kernels.gpu.tables.staged_buffer import upload
from turret.server.adapters.device.hadamard_shelf import grown
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.operators import AdapterOperators, ModuleOperators


class GpuExpertShelves:
    """Makes a shelf per (projection of experts, rank)."""

    least_slots = 4

    def __init__(self, layout: ProjectionLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout = layout
        self._dtype, self._device = dtype, device

    def shelves_of(
        self, operators: AdapterOperators
    ) -> Iterable[tuple[Hashable, Callable[[], GpuExpertShelf]]]:
        for projection in self._layout.experts:
            found = self._layout.of_experts(operators, projection)
            for rank in sorted({update.rank for _, update in found}):
                yield (
                    ("experts", projection, rank),
                    lambda projection=projection, rank=rank: GpuExpertShelf(
                        self._layout, projection, rank, self._dtype, self._device
                    ),
                )

    @staticmethod
    def extra_bytes(ops: ModuleOperators) -> int:
        """The factors lie on the device as they are."""
        return 0


class GpuExpertShelf:
    """Factors of one projection and rank.

    Attributes:
        factors: Where A and B of a slot lie in each layer, ``[layers, slots, 2]`` int64; 0 where
            its adapter has no update.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        projection: str,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.projection = projection
        self.layers: set[int] = set()
        self._layout = layout
        self._rank = rank
        self._like = {"dtype": dtype, "device": device}
        sizes = layout.experts[projection]
        self._shapes = [
            (sizes.count, rank, width) for width in (sizes.in_features, sizes.out_features)
        ]
        # By slot: what the addresses are of.
        self._kept: dict[int, list[torch.Tensor]] = {}
        shape = (layout.num_layers, 0, 2)
        self.factors = torch.zeros(shape, dtype=torch.int64, device=device)

    def grow(self, num_slots: int) -> None:
        """Make room for the addresses of ``num_slots`` adapters."""
        self.factors = grown(self.factors, num_slots)

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's factors of this projection and rank, and note where they are."""
        addresses = torch.zeros(self._layout.num_layers, 2, dtype=torch.int64)
        kept = self._kept[slot] = []
        for layer, update in self._layout.of_experts(operators, self.projection):
            if update.rank == self._rank:
                assert [factor.shape for factor in update.tensors()] == self._shapes
                self.layers.add(layer)
                own = [factor.to(**self._like, copy=True) for factor in update.tensors()]
                addresses[layer] = torch.tensor([factor.data_ptr() for factor in own])
                kept += own
        self.factors[:, slot] = upload(addresses, self.factors.device)

    def clear(self, slot: int) -> None:
        """Let go of its factors. Their addresses stay, and no step reads them."""
        self._kept.pop(slot, None)

    def apply_pairs(
        self,
        layer: int,
        table: RowTable,
        x: torch.Tensor,
        y: torch.Tensor,
        routing: Routing,
        rows: torch.Tensor | None,
    ) -> None:
        """Add the updates of the table's rows to their pairs; see ``AdapterStep``."""
        add_expert_updates(x, y, self.factors[layer], self._rank, table, routing, rows)

    def addresses(self) -> list[object]:
        """Where its table is, and how large; what it says may differ between steps."""
        return [(self.factors.data_ptr(), self.factors.shape)]
