"""Tables of Kronecker factors (LoKr), per group, slice and factor shapes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch

from turret.kernels.kronecker import kronecker_reference
from turret.server.adapters.bank import Rows
from turret.server.adapters.operators import AdapterOperators, Kronecker
from turret.server.adapters.packed_group import PackLayout

_Shapes = tuple[tuple[int, ...], ...]


class KroneckerBank:
    """Makes a shelf per (group, slice, shapes of the factors)."""

    def __init__(self, layout: PackLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout = layout
        self._dtype, self._device = dtype, device

    def shelves_of(
        self, operators: AdapterOperators
    ) -> Iterable[tuple[Hashable, Callable[[], KroneckerShelf]]]:
        for group in self._layout.groups:
            keys = {
                (s, _shapes(ops.kronecker))
                for _, s, ops in self._layout.of(operators, group)
                if ops.kronecker is not None
            }
            for s, shapes in sorted(keys):
                yield (
                    ("kronecker", group, s, shapes),
                    lambda group=group, s=s, shapes=shapes: KroneckerShelf(
                        self._layout, group, s, shapes, self._dtype, self._device
                    ),
                )


def _shapes(factors: Kronecker) -> _Shapes:
    return tuple(tuple(tensor.shape) for tensor in factors.tensors())


class KroneckerShelf:
    """Factors of one module kind and shape, ``[layers, slots, …]``."""

    def __init__(
        self,
        layout: PackLayout,
        group: str,
        index: int,
        shapes: _Shapes,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.group = group
        self.layers: set[int] = set()
        self._layout = layout
        self._index = index
        self._shapes = shapes
        widths = [shape.out_features for shape in layout.groups[group]]
        self._columns = slice(sum(widths[:index]), sum(widths[: index + 1]))
        self._tables = [
            torch.zeros(layout.num_layers, 0, *shape, dtype=dtype, device=device)
            for shape in shapes
        ]

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` adapters."""
        grown = []
        for table in self._tables:
            larger = table.new_zeros(table.shape[0], num_slots, *table.shape[2:])
            larger[:, : table.shape[1]] = table
            grown.append(larger)
        self._tables = grown

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's factors of this shape into a slot."""
        for table in self._tables:
            table[:, slot] = 0
        for layer, s, ops in self._layout.of(operators, self.group):
            factors = ops.kronecker
            if factors is None or s != self._index or _shapes(factors) != self._shapes:
                continue
            self.layers.add(layer)
            for table, tensor in zip(self._tables, factors.tensors(), strict=True):
                table[layer, slot] = tensor

    def apply(self, layer: int, rows: Rows, x: torch.Tensor, y: torch.Tensor) -> None:
        w1, *second = (table[layer] for table in self._tables)
        part = rows.take(y)
        kronecker_reference(
            rows.take(x),
            part[:, self._columns],
            w1,
            second[0] if len(second) == 1 else (second[0], second[1]),
            rows.slots,
            rows.weights,
        )
        rows.put(y, part)
