"""Sparse updates on the torch path: one adapter's entries by their place in their rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch

from turret.kernels.adapters.sparse import Jagged, sparse_reference
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Rows
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators


class SparseShelves:
    """Makes a shelf per projection: entries differ in number, so each adapter's stand alone."""

    least_slots = 4

    def __init__(self, layout: ProjectionLayout, device: torch.device) -> None:
        self._layout = layout
        self._device = device

    def shelves_of(
        self, operators: AdapterOperators
    ) -> Iterable[tuple[Hashable, Callable[[], SparseShelf]]]:
        for projection in self._layout.projections:
            if any(ops.sparse is not None for _, _, ops in self._layout.of(operators, projection)):
                yield (
                    ("sparse", projection),
                    lambda projection=projection: SparseShelf(
                        self._layout, projection, self._device
                    ),
                )

    @staticmethod
    def extra_bytes(ops: ModuleOperators) -> int:
        """Bytes of fp32 values, int32 columns and int64 outputs past those of the operator."""
        if ops.sparse is None:
            return 0
        entries, outputs = len(ops.sparse.values), len(ops.sparse.row_starts) - 1
        return max(8 * entries + 8 * outputs - ops.sparse.num_bytes, 0)


class SparseShelf:
    """The entries of one projection's modules, by slot."""

    def __init__(self, layout: ProjectionLayout, projection: str, device: torch.device) -> None:
        self.projection = projection
        self.layers: set[int] = set()
        self._layout = layout
        self._device = device
        self._columns = layout.columns(projection)
        # By slot, then by (layer, slice).
        self._slots: dict[int, dict[tuple[int, int], Jagged]] = {}

    def grow(self, num_slots: int) -> None:
        """A slot takes no memory before it is used."""

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's entries into a slot."""
        held = self._slots[slot] = {}
        for layer, s, ops in self._layout.of(operators, self.projection):
            if ops.sparse is not None:
                self.layers.add(layer)
                parts = (part.to(self._device) for part in ops.sparse.tensors())
                held[layer, s] = Jagged.of(*parts)

    def clear(self, slot: int) -> None:
        """Give a slot's memory back."""
        del self._slots[slot]

    def apply(self, layer: int, rows: Rows, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of these rows to ``y``, in place."""
        inputs, part = rows.take(x), rows.take(y)
        for slot, those in _by_slot(rows):
            mixed = rows.weights
            weights = mixed[those] if isinstance(mixed, torch.Tensor) else mixed
            mine = part if those is _ALL else part[those]
            for s, columns in enumerate(self._columns):
                entries = self._slots[slot].get((layer, s))
                if entries is not None:
                    sparse_reference(inputs[those], mine[:, columns], entries, weights)
            if those is not _ALL:
                part[those] = mine
        rows.put(y, part)


_ALL = slice(None)


def _by_slot(rows: Rows) -> Iterable[tuple[int, torch.Tensor | slice]]:
    """Slots, and which of the rows have each."""
    if isinstance(rows.slots, int):
        return [(rows.slots, _ALL)]
    slots = rows.slots.tolist()
    return [
        (slot, torch.tensor([i for i, one in enumerate(slots) if one == slot]))
        for slot in dict.fromkeys(slots)
    ]
