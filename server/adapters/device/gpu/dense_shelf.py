"""Dense updates on the gpu path: addresses by slot, each adapter's matrices its own.

A matrix is as large as the base's weight in the serving dtype: in a table of slots it would leave
room for three more that do not come.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch

from turret.kernels.gpu.adapters.dense import dense
from turret.kernels.gpu.tables.row_table import RowTable
from turret.kernels.gpu.tables.staged_buffer import upload
from turret.server.adapters.device.hadamard_shelf import grown
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.operators import AdapterOperators, ModuleOperators


class GpuDenseShelves:
    """Makes a shelf per (projection, slice)."""

    least_slots = 4

    def __init__(self, layout: ProjectionLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout = layout
        self._dtype, self._device = dtype, device

    def shelves_of(
        self, operators: AdapterOperators
    ) -> Iterable[tuple[Hashable, Callable[[], GpuDenseShelf]]]:
        for projection in self._layout.projections:
            found = self._layout.of(operators, projection)
            for s in sorted({s for _, s, ops in found if ops.dense is not None}):
                yield (
                    ("dense", projection, s),
                    lambda projection=projection, s=s: GpuDenseShelf(
                        self._layout, projection, s, self._dtype, self._device
                    ),
                )

    @staticmethod
    def extra_bytes(ops: ModuleOperators) -> int:
        """The matrices lie on the device as they are."""
        return 0


class GpuDenseShelf:
    """Matrices of one slice of a projection, in all layers.

    Attributes:
        weights: Where the matrix of a slot lies in each layer, ``[layers, slots]`` int64; 0 where
            its adapter has none.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        projection: str,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.projection = projection
        self.layers: set[int] = set()
        self._layout = layout
        self._index = index
        self._span = layout.columns(projection)[index]
        self._like = {"dtype": dtype, "device": device}
        sizes = layout.projections[projection][index]
        self._shape = (sizes.out_features, sizes.in_features)
        # By slot: what the addresses are of.
        self._kept: dict[int, list[torch.Tensor]] = {}
        self.weights = torch.zeros(layout.num_layers, 0, dtype=torch.int64, device=device)

    def grow(self, num_slots: int) -> None:
        """Make room for the addresses of ``num_slots`` adapters."""
        self.weights = grown(self.weights, num_slots)

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's matrices of this slice, and note where they are."""
        addresses = torch.zeros(self._layout.num_layers, dtype=torch.int64)
        kept = self._kept[slot] = []
        for layer, s, ops in self._layout.of(operators, self.projection):
            if s == self._index and ops.dense is not None:
                assert ops.dense.weight.shape == self._shape
                self.layers.add(layer)
                own = ops.dense.weight.to(**self._like, copy=True)
                addresses[layer] = own.data_ptr()
                kept.append(own)
        self.weights[:, slot] = upload(addresses, self.weights.device)

    def clear(self, slot: int) -> None:
        """Let go of its matrices. Their addresses stay, and no step reads them."""
        self._kept.pop(slot, None)

    def apply_table(self, layer: int, table: RowTable, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of the table's rows to ``y``, in place."""
        dense(x, y[:, self._span], self.weights[layer], table)

    def addresses(self) -> list[object]:
        """Where its table is, and how large; what it says may differ between steps."""
        return [(self.weights.data_ptr(), self.weights.shape)]
