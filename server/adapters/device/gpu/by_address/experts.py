"""Low-rank updates of experts on the gpu path: an adapter may be as large as a gigabyte."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from turret.kernels.expert_routing import Routing
from turret.kernels.gpu.experts.expert_updates import add_expert_updates
from turret.kernels.gpu.tables.row_table import RowTable
from turret.server.adapters.device.gpu.by_address.addressed_shelf import AddressedShelf
from turret.server.adapters.device.gpu.shelf_kind import GpuShelfKind
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.operators.adapter_operators import AdapterOperators


class GpuExpertShelf(AddressedShelf):
    """Factors of one projection and rank: the addresses of A and B."""

    def __init__(
        self,
        layout: ProjectionLayout,
        projection: str,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layout, projection, dtype, device, 2)
        self._rank = rank
        sizes = layout.experts[projection]
        self._shapes = [
            (sizes.count, rank, width) for width in (sizes.in_features, sizes.out_features)
        ]

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's factors of this projection and rank, and note where they are."""
        found = [
            (layer, update.tensors())
            for layer, update in self._layout.of_experts(operators, self.projection)
            if update.rank == self._rank
        ]
        assert all([factor.shape for factor in factors] == self._shapes for _, factors in found)
        self.keep(slot, found)

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
        add_expert_updates(x, y, self.table[layer], self._rank, table, routing, rows)


class GpuExpertShelves(GpuShelfKind[GpuExpertShelf, int]):
    """Makes a shelf per (projection of experts, rank)."""

    name = "experts"

    def projections(self) -> Iterable[str]:
        return self.layout.experts

    def keys(self, operators: AdapterOperators, projection: str) -> set[int]:
        return {update.rank for _, update in self.layout.of_experts(operators, projection)}

    def make(self, projection: str, key: int) -> GpuExpertShelf:
        return GpuExpertShelf(self.layout, projection, key, self.dtype, self.device)
