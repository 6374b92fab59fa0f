"""Tables of Hadamard factors (LoHa), per projection and rank."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch

from turret.kernels.rows.hadamard import HadamardTables, hadamard_rows_
from turret.kernels.rows.tables import COLUMNS, ROWS, padded
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Rows
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators


class HadamardShelves:
    """Makes a shelf per (projection, rank); slices of other ranks are zero there."""

    least_slots = 4

    def __init__(self, layout: ProjectionLayout, device: torch.device) -> None:
        self._layout = layout
        self._device = device

    def shelves_of(
        self, operators: AdapterOperators
    ) -> Iterable[tuple[Hashable, Callable[[], HadamardShelf]]]:
        for projection in self._layout.projections:
            found = self._layout.of(operators, projection)
            ranks = {ops.hadamard.rank for _, _, ops in found if ops.hadamard is not None}
            for rank in sorted(ranks):
                yield (
                    ("hadamard", projection, rank),
                    lambda projection=projection, rank=rank: HadamardShelf(
                        self._layout, projection, rank, self._device
                    ),
                )

    @staticmethod
    def extra_bytes(ops: ModuleOperators) -> int:
        """Bytes of a module's padded fp32 factors past those of the factors themselves."""
        factors = ops.hadamard
        if factors is None:
            return 0
        width = factors.w1b.shape[1] + padded(factors.w1a.shape[0], COLUMNS)
        ranks = padded(factors.rank, COLUMNS) + padded(factors.rank, ROWS)
        return 4 * ranks * width - sum(tensor.nbytes for tensor in factors.tensors())


class HadamardShelf:
    """Factors of one projection and rank, as ``kernels/rows/hadamard.py`` takes them.

    Each table is ``[layers, slots, …]``.
    """

    def __init__(
        self, layout: ProjectionLayout, projection: str, rank: int, device: torch.device
    ) -> None:
        self.projection = projection
        self.layers: set[int] = set()
        self._layout = layout
        self._rank = rank
        slices = layout.projections[projection]
        self._widths = [s.out_features for s in slices]
        i, j, inner = padded(rank, COLUMNS), padded(rank, ROWS), slices[0].in_features
        wide = [padded(width, COLUMNS) for width in self._widths]

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(layout.num_layers, 0, *shape, device=device)

        self._w1b = empty(len(slices), inner, i)
        self._w2b = empty(len(slices), j, inner)
        self._w1a = [empty(i, width) for width in wide]
        self._w2a = [empty(j, width) for width in wide]

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` adapters."""
        self._w1b, self._w2b = (grown(table, num_slots) for table in (self._w1b, self._w2b))
        self._w1a = [grown(table, num_slots) for table in self._w1a]
        self._w2a = [grown(table, num_slots) for table in self._w2a]

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's factors of this projection and rank into a slot."""
        for table in (self._w1b, self._w2b, *self._w1a, *self._w2a):
            table[:, slot] = 0
        rank = self._rank
        for layer, s, ops in self._layout.of(operators, self.projection):
            factors = ops.hadamard
            if factors is not None and factors.rank == rank:
                self.layers.add(layer)
                self._w1b[layer, slot, s, :, :rank] = factors.w1b.T
                self._w2b[layer, slot, s, :rank] = factors.w2b
                self._w1a[s][layer, slot, :rank, : self._widths[s]] = factors.w1a.T
                self._w2a[s][layer, slot, :rank, : self._widths[s]] = factors.w2a.T

    def clear(self, slot: int) -> None:
        """Its tables stay as they are until another adapter's are copied there."""

    def apply(self, layer: int, rows: Rows, x: torch.Tensor, y: torch.Tensor) -> None:
        tables = HadamardTables(
            rows.pick(self._w1b[layer]),
            rows.pick(self._w2b[layer]),
            [rows.pick(table[layer]) for table in self._w1a],
            [rows.pick(table[layer]) for table in self._w2a],
        )
        part = rows.take(y)
        hadamard_rows_(rows.take(x), part, tables, self._widths, rows.weights)
        rows.put(y, part)


def grown(table: torch.Tensor, num_slots: int) -> torch.Tensor:
    """A larger table with the old one's content."""
    larger = table.new_zeros(table.shape[0], num_slots, *table.shape[2:])
    larger[:, : table.shape[1]] = table
    return larger
