"""Tables of Kronecker factors (LoKr), per projection, slice and factor shapes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch

from turret.kernels.rows.kronecker import KroneckerTables, kronecker_rows_
from turret.kernels.rows.tables import COLUMNS, ROWS, padded
from turret.server.adapters.device.hadamard_shelf import grown
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Rows
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.updates import Kronecker

_Shapes = tuple[tuple[int, ...], ...]
# Shapes of every slice's factors; None where a slice has none.
_Signature = tuple[_Shapes | None, ...]


class KroneckerShelves:
    """Makes a shelf per (projection, shapes of its slices' factors)."""

    least_slots = 4

    def __init__(self, layout: ProjectionLayout, device: torch.device) -> None:
        self._layout = layout
        self._device = device

    def shelves_of(
        self, operators: AdapterOperators
    ) -> Iterable[tuple[Hashable, Callable[[], KroneckerShelf]]]:
        for projection in self._layout.projections:
            found = set(signatures(self._layout, operators, projection).values())
            for signature in sorted(found, key=repr):
                yield (
                    ("kronecker", projection, signature),
                    lambda projection=projection, signature=signature: KroneckerShelf(
                        self._layout, projection, signature, self._device
                    ),
                )

    @staticmethod
    def extra_bytes(ops: ModuleOperators) -> int:
        """Bytes of a module's padded fp32 factors past those of the factors themselves."""
        if ops.kronecker is None:
            return 0
        elements = sum(m * n for m, n in _padded_shapes(_shapes(ops.kronecker)))
        return 4 * elements - sum(tensor.nbytes for tensor in ops.kronecker.tensors())


def signatures(
    layout: ProjectionLayout, operators: AdapterOperators, projection: str
) -> dict[int, _Signature]:
    """The shapes of each layer's factors, of layers with any."""
    count = len(layout.projections[projection])
    found: dict[int, list[_Shapes | None]] = {}
    for layer, s, ops in layout.of(operators, projection):
        if ops.kronecker is not None:
            found.setdefault(layer, [None] * count)[s] = _shapes(ops.kronecker)
    return {layer: tuple(shapes) for layer, shapes in found.items()}


def _padded_shapes(shapes: _Shapes) -> list[tuple[int, int]]:
    """The padded shape of ``w1``, and those of the factors of ``w2ᵀ`` from the input on."""
    (out_l, in_m), *second = shapes
    transposed = [(inner, outer) for outer, inner in reversed(second)]
    return [
        (padded(out_l, ROWS), padded(in_m, COLUMNS)),
        *((padded(rows, COLUMNS), padded(columns, COLUMNS)) for rows, columns in transposed),
    ]


def _shapes(factors: Kronecker) -> _Shapes:
    return tuple(tuple(tensor.shape) for tensor in factors.tensors())


class KroneckerShelf:
    """Factors of one projection and shape, as ``kernels/rows/kronecker.py`` takes them.

    Each table is ``[layers, slots, …]``.
    """

    def __init__(
        self, layout: ProjectionLayout, projection: str, signature: _Signature, device: torch.device
    ) -> None:
        self.projection = projection
        self.layers: set[int] = set()
        self._layout = layout
        self._signature = signature
        self._slices = [
            _Slice(layout.num_layers, s, shapes, device)
            for s, shapes in enumerate(signature)
            if shapes is not None
        ]
        columns = layout.columns(projection)
        self._columns = [columns[one.index] for one in self._slices]

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` adapters."""
        for one in self._slices:
            one.tables = [grown(table, num_slots) for table in one.tables]

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's factors of this shape into a slot."""
        for one in self._slices:
            for table in one.tables:
                table[:, slot] = 0
        there = signatures(self._layout, operators, self.projection)
        slices = {one.index: one for one in self._slices}
        for layer, s, ops in self._layout.of(operators, self.projection):
            if ops.kronecker is not None and there[layer] == self._signature:
                self.layers.add(layer)
                slices[s].put(layer, slot, ops.kronecker)

    def clear(self, slot: int) -> None:
        """Its tables stay as they are until another adapter's are copied there."""

    def apply(self, layer: int, rows: Rows, x: torch.Tensor, y: torch.Tensor) -> None:
        inputs, part = rows.take(x), rows.take(y)
        for one, columns in zip(self._slices, self._columns, strict=True):
            w1, *second = (rows.pick(table[layer]) for table in one.tables)
            tables = KroneckerTables(w1, second, one.shape)
            kronecker_rows_(inputs, part[:, columns], tables, rows.weights)
        rows.put(y, part)


class _Slice:
    """The tables of one slice: ``w1``, then what it takes to multiply by ``w2ᵀ``, padded."""

    def __init__(self, num_layers: int, index: int, shapes: _Shapes, device: torch.device) -> None:
        self.index = index
        (out_l, in_m), *second = shapes
        self.shape = (out_l, in_m, second[0][0], second[-1][1])
        self.tables = [
            torch.zeros(num_layers, 0, *shape, device=device) for shape in _padded_shapes(shapes)
        ]

    def put(self, layer: int, slot: int, factors: Kronecker) -> None:
        w1, *second = factors.tensors()
        for table, tensor in zip(self.tables, [w1, *(f.T for f in reversed(second))], strict=True):
            table[layer, slot, : tensor.shape[0], : tensor.shape[1]] = tensor
