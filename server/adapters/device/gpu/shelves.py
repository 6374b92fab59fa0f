"""Hadamard, Kronecker and circulant updates on the gpu path: tables by slot."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from turret.kernels.expert_routing import Routing
from turret.kernels.gpu.adapters.circulant import circulant
from turret.kernels.gpu.adapters.hadamard_expand import hadamard_expand
from turret.kernels.gpu.adapters.hadamard_shrink import hadamard_shrink
from turret.kernels.gpu.adapters.kronecker import kronecker
from turret.kernels.gpu.tables.row_table import RowTable
from turret.server.adapters.device.gpu.by_address.dense_shelf import GpuDenseShelf
from turret.server.adapters.device.gpu.by_address.experts import GpuExpertShelf
from turret.server.adapters.device.gpu.shelf_kind import GpuShelfKind
from turret.server.adapters.device.gpu.sparse_shelf import GpuSparseShelf
from turret.server.adapters.device.gpu.tables import GpuTables
from turret.server.adapters.device.hadamard_shelf import grown
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.shelves import Shelves
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.updates import Kronecker

_Shapes = tuple[tuple[int, ...], ...]


class GpuHadamardShelf:
    """Factors of one projection and rank, ``[layers, slots, …]``, as the kernels take them."""

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
        slices = layout.projections[projection]
        inner = (0, len(slices), rank, slices[0].in_features)
        like = {"dtype": dtype, "device": device}
        self.w1b = torch.zeros(layout.num_layers, *inner, **like)
        self.w2b = torch.zeros(layout.num_layers, *inner, **like)
        self.w1a = [torch.zeros(layout.num_layers, 0, s.out_features, rank, **like) for s in slices]
        self.w2a = [torch.zeros_like(table) for table in self.w1a]

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` adapters."""
        self.w1b, self.w2b = (grown(table, num_slots) for table in (self.w1b, self.w2b))
        self.w1a = [grown(table, num_slots) for table in self.w1a]
        self.w2a = [grown(table, num_slots) for table in self.w2a]

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's factors of this projection and rank into a slot."""
        for table in (self.w1b, self.w2b, *self.w1a, *self.w2a):
            table[:, slot] = 0
        for layer, s, ops in self._layout.of(operators, self.projection):
            factors = ops.hadamard
            if factors is not None and factors.rank == self._rank:
                self.layers.add(layer)
                self.w1b[layer, slot, s] = factors.w1b
                self.w2b[layer, slot, s] = factors.w2b
                self.w1a[s][layer, slot] = factors.w1a
                self.w2a[s][layer, slot] = factors.w2a

    def clear(self, slot: int) -> None:
        """Its tables stay as they are until another adapter's are copied there."""

    def apply_table(self, layer: int, table: RowTable, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of the table's rows to ``y``, in place."""
        u = hadamard_shrink(x, self.w1b[layer], self.w2b[layer], table)
        left = [factor[layer] for factor in self.w1a]
        right = [factor[layer] for factor in self.w2a]
        hadamard_expand(y, u, left, right, table)

    def addresses(self) -> list[object]:
        """Where its tables are, and how large."""
        return [(t.data_ptr(), t.shape) for t in (self.w1b, self.w2b, *self.w1a, *self.w2a)]


class GpuHadamardShelves(GpuShelfKind[GpuHadamardShelf, int]):
    """Makes a shelf per (projection, rank); slices of other ranks are zero there."""

    name = "hadamard"

    def keys(self, operators: AdapterOperators, projection: str) -> set[int]:
        found = self.layout.of(operators, projection)
        return {ops.hadamard.rank for _, _, ops in found if ops.hadamard is not None}

    def make(self, projection: str, key: int) -> GpuHadamardShelf:
        return GpuHadamardShelf(self.layout, projection, key, self.dtype, self.device)


def _shapes(factors: Kronecker) -> _Shapes:
    return tuple(tuple(tensor.shape) for tensor in factors.tensors())


class GpuKroneckerShelf:
    """Factors of one module kind and shape, ``[layers, slots, …]``."""

    def __init__(
        self,
        layout: ProjectionLayout,
        projection: str,
        index: int,
        shapes: _Shapes,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.projection = projection
        self.layers: set[int] = set()
        self._layout = layout
        self._index = index
        self._shapes = shapes
        self.columns = layout.columns(projection)[index]
        self.tables = [
            torch.zeros(layout.num_layers, 0, *shape, dtype=dtype, device=device)
            for shape in shapes
        ]

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` adapters."""
        self.tables = [grown(table, num_slots) for table in self.tables]

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's factors of this shape into a slot."""
        for table in self.tables:
            table[:, slot] = 0
        for layer, s, ops in self._layout.of(operators, self.projection):
            factors = ops.kronecker
            if factors is None or s != self._index or _shapes(factors) != self._shapes:
                continue
            self.layers.add(layer)
            for table, tensor in zip(self.tables, factors.tensors(), strict=True):
                table[layer, slot] = tensor

    def clear(self, slot: int) -> None:
        """Its tables stay as they are until another adapter's are copied there."""

    def apply_table(self, layer: int, table: RowTable, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of the table's rows to ``y``, in place."""
        w1, *second = (factor[layer] for factor in self.tables)
        w2 = second[0] if len(second) == 1 else (second[0], second[1])
        kronecker(x, y[:, self.columns], w1, w2, table)

    def addresses(self) -> list[object]:
        """Where its tables are, and how large."""
        return [(table.data_ptr(), table.shape) for table in self.tables]


class GpuKroneckerShelves(GpuShelfKind[GpuKroneckerShelf, tuple[int, _Shapes]]):
    """Makes a shelf per (projection, slice, shapes of the factors)."""

    name = "kronecker"

    def keys(self, operators: AdapterOperators, projection: str) -> set[tuple[int, _Shapes]]:
        found = self.layout.of(operators, projection)
        return {(s, _shapes(ops.kronecker)) for _, s, ops in found if ops.kronecker is not None}

    def make(self, projection: str, key: tuple[int, _Shapes]) -> GpuKroneckerShelf:
        return GpuKroneckerShelf(self.layout, projection, *key, self.dtype, self.device)


class GpuCirculantShelf:
    """Kernels of one module kind and shape, ``[layers, slots, …]``."""

    def __init__(
        self,
        layout: ProjectionLayout,
        projection: str,
        index: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.projection = projection
        self.layers: set[int] = set()
        self._layout = layout
        self._index = index
        self._shape = shape
        self.columns = layout.columns(projection)[index]
        self.kernel = torch.zeros(layout.num_layers, 0, *shape, dtype=dtype, device=device)

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` adapters."""
        self.kernel = grown(self.kernel, num_slots)

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's kernels of this shape into a slot."""
        self.kernel[:, slot] = 0
        for layer, s, ops in self._layout.of(operators, self.projection):
            update = ops.circulant
            if update is not None and s == self._index and update.kernel.shape == self._shape:
                self.layers.add(layer)
                self.kernel[layer, slot] = update.kernel

    def clear(self, slot: int) -> None:
        """Its tables stay as they are until another adapter's are copied there."""

    def apply_table(self, layer: int, table: RowTable, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of the table's rows to ``y``, in place."""
        circulant(x, y[:, self.columns], self.kernel[layer], table)

    def addresses(self) -> list[object]:
        """Where its table is, and how large."""
        return [(self.kernel.data_ptr(), self.kernel.shape)]


class GpuCirculantShelves(GpuShelfKind[GpuCirculantShelf, tuple[int, tuple[int, ...]]]):
    """Makes a shelf per (projection, slice, shape of the kernels)."""

    name = "circulant"

    def keys(
        self, operators: AdapterOperators, projection: str
    ) -> set[tuple[int, tuple[int, ...]]]:
        found = self.layout.of(operators, projection)
        return {
            (s, tuple(ops.circulant.kernel.shape))
            for _, s, ops in found
            if ops.circulant is not None
        }

    def make(self, projection: str, key: tuple[int, tuple[int, ...]]) -> GpuCirculantShelf:
        return GpuCirculantShelf(self.layout, projection, *key, self.dtype, self.device)


GpuShelf = (
    GpuHadamardShelf
    | GpuKroneckerShelf
    | GpuCirculantShelf
    | GpuSparseShelf
    | GpuDenseShelf
    | GpuExpertShelf
)


@dataclass(frozen=True, slots=True)
class GpuStepShelves:
    """A step's rows of every shelf, by fused projection.

    Attributes:
        by_projection: Shelves with the tables of their rows, by position in the mixes.
        signature: Names the shelves and how many tables each has: the launches of a step.
    """

    by_projection: dict[str, list[tuple[GpuShelf, list[RowTable]]]]
    signature: tuple[tuple[Hashable, int], ...]

    def apply(self, layer: int, projection: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of one layer's fused projection to ``y``, in place."""
        for shelf, tables in self.by_projection.get(projection, ()):
            if layer in shelf.layers and not isinstance(shelf, GpuExpertShelf):
                for table in tables:
                    shelf.apply_table(layer, table, x, y)

    def apply_experts(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        y: torch.Tensor,
        routing: Routing,
        rows: torch.Tensor | None,
    ) -> None:
        """Add the updates of one layer's projection of experts to ``y``, in place."""
        for shelf, tables in self.by_projection.get(projection, ()):
            if layer in shelf.layers and isinstance(shelf, GpuExpertShelf):
                for table in tables:
                    shelf.apply_pairs(layer, table, x, y, routing, rows)


class GpuShelves(Shelves[GpuShelf]):
    """The shelves of the gpu path."""

    def bind(self, runs: Sequence[tuple[int, int, Members]], tables: GpuTables) -> GpuStepShelves:
        """Load a step's tables.

        Args:
            runs: Runs of rows: first, end, and their mix.
            tables: Hold the row tables.
        """
        by_projection: dict[str, list[tuple[GpuShelf, list[RowTable]]]] = {}
        signature = []
        used = {key for _, _, mix in runs for key, _ in mix}
        for shape, held in self.ordered():
            # Shelves stay when they are empty.
            if used.isdisjoint(held.slots):
                continue
            found = [
                [(held.slots[key], w) for key, w in mix if key in held.slots] for _, _, mix in runs
            ]
            bound = []
            for j in range(max((len(places) for places in found), default=0)):
                rows: list[int] = []
                chosen: list[tuple[int, float]] = []
                for (start, end, _), places in zip(runs, found, strict=True):
                    if len(places) > j:
                        rows.extend(range(start, end))
                        chosen.extend([places[j]] * (end - start))
                table = tables.row_table((shape, j))
                if isinstance(held.shelf, GpuExpertShelf):
                    rows, chosen = _all_rows(rows, chosen)
                table.load(rows, [slot for slot, _ in chosen], [weight for _, weight in chosen])
                bound.append(table)
            if bound:
                by_projection.setdefault(held.shelf.projection, []).append((held.shelf, bound))
                signature.append((shape, len(bound)))
        return GpuStepShelves(by_projection, tuple(signature))

    def addresses(self) -> list[object]:
        """Everything a captured graph knows of the shelves."""
        known: list[object] = []
        for shape, held in self.ordered():
            known += [shape, sorted(held.shelf.layers), held.shelf.addresses()]
        return known


def _all_rows(
    rows: list[int], chosen: list[tuple[int, float]]
) -> tuple[list[int], list[tuple[int, float]]]:
    """Every row up to the last one, slot -1 for those without an update: pairs look theirs up."""
    table = [(-1, 0.0)] * (max(rows) + 1 if rows else 0)
    for row, place in zip(rows, chosen, strict=True):
        table[row] = place
    return [*range(len(table))], table
