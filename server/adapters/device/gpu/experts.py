"""Low-rank updates of experts on the gpu path: tables by slot, of all experts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch

from turret.kernels.expert_routing import Routing
from turret.kernels.gpu.experts.expert_updates import add_expert_updates
from turret.kernels.gpu.tables.row_table import RowTable
from turret.server.adapters.device.hadamard_shelf import grown
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.operators import AdapterOperators, ModuleOperators


class GpuExpertShelves:
    """Makes a shelf per (projection of experts, rank)."""

    # An adapter may be as large as a gigabyte.
    least_slots = 1

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
        """The factors lie on the shelf as they are."""
        return 0


class GpuExpertShelf:
    """Factors of one projection and rank, ``[layers, slots, experts, …]``."""

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
        shape = layout.experts[projection]
        inner = (layout.num_layers, 0, shape.count, rank)
        like = {"dtype": dtype, "device": device}
        self.a = torch.zeros(*inner, shape.in_features, **like)
        self.b = torch.zeros(*inner, shape.out_features, **like)

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` adapters."""
        self.a, self.b = grown(self.a, num_slots), grown(self.b, num_slots)

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's factors of this projection and rank into a slot."""
        for table in (self.a, self.b):
            table[:, slot] = 0
        for layer, update in self._layout.of_experts(operators, self.projection):
            if update.rank == self._rank:
                self.layers.add(layer)
                self.a[layer, slot] = update.a
                self.b[layer, slot] = update.b

    def clear(self, slot: int) -> None:
        """Its factors stay as they are until another adapter's are copied there."""

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
        add_expert_updates(x, y, self.a[layer], self.b[layer], table, routing, rows)

    def addresses(self) -> list[object]:
        """Where its tables are, and how large."""
        return [(table.data_ptr(), table.shape) for table in (self.a, self.b)]
