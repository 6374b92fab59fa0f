"""Dense updates on the gpu path: each matrix is as large as the base's weight."""

from __future__ import annotations

import torch

from turret.kernels.gpu.adapters.dense import dense
from turret.kernels.gpu.tables.row_table import RowTable
from turret.server.adapters.device.gpu.by_address.addressed_shelf import AddressedShelf
from turret.server.adapters.device.gpu.shelf_kind import GpuShelfKind
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.operators.adapter_operators import AdapterOperators


class GpuDenseShelf(AddressedShelf):
    """Matrices of one slice of a projection, in all layers: an address each."""

    def __init__(
        self,
        layout: ProjectionLayout,
        projection: str,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layout, projection, dtype, device)
        self._index = index
        self._span = layout.columns(projection)[index]
        sizes = layout.projections[projection][index]
        self._shape = (sizes.out_features, sizes.in_features)

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's matrices of this slice, and note where they are."""
        found = [
            (layer, ops.dense.tensors())
            for layer, s, ops in self._layout.of(operators, self.projection)
            if s == self._index and ops.dense is not None
        ]
        assert all(weight.shape == self._shape for _, (weight,) in found)
        self.keep(slot, found)

    def apply_table(self, layer: int, table: RowTable, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of the table's rows to ``y``, in place."""
        dense(x, y[:, self._span], self.table[layer], table)


class GpuDenseShelves(GpuShelfKind[GpuDenseShelf, int]):
    """Makes a shelf per (projection, slice)."""

    name = "dense"

    def keys(self, operators: AdapterOperators, projection: str) -> set[int]:
        found = self.layout.of(operators, projection)
        return {s for _, s, ops in found if ops.dense is not None}

    def make(self, projection: str, key: int) -> GpuDenseShelf:
        return GpuDenseShelf(self.layout, projection, key, self.dtype, self.device)
