"""Tables of Hadamard factors (LoHa), per group and rank."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch

from turret.kernels.hadamard_expand import hadamard_expand_reference
from turret.kernels.hadamard_shrink import hadamard_shrink_reference
from turret.server.adapters.bank import Rows
from turret.server.adapters.operators import AdapterOperators
from turret.server.adapters.packed_group import PackLayout


class HadamardBank:
    """Makes a shelf per (group, rank); slices of other ranks are zero there."""

    def __init__(self, layout: PackLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout = layout
        self._dtype, self._device = dtype, device

    def shelves_of(
        self, operators: AdapterOperators
    ) -> Iterable[tuple[Hashable, Callable[[], HadamardShelf]]]:
        for group in self._layout.groups:
            found = self._layout.of(operators, group)
            ranks = {ops.hadamard.rank for _, _, ops in found if ops.hadamard is not None}
            for rank in sorted(ranks):
                yield (
                    ("hadamard", group, rank),
                    lambda group=group, rank=rank: HadamardShelf(
                        self._layout, group, rank, self._dtype, self._device
                    ),
                )


class HadamardShelf:
    """Factors of one group and rank, ``[layers, slots, …]``; see ``kernels/hadamard_shrink.py``."""

    def __init__(
        self, layout: PackLayout, group: str, rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.group = group
        self.layers: set[int] = set()
        self._layout = layout
        self._rank = rank
        slices = layout.groups[group]
        inner = (0, len(slices), rank, slices[0].in_features)
        like = {"dtype": dtype, "device": device}
        self._w1b = torch.zeros(layout.num_layers, *inner, **like)
        self._w2b = torch.zeros(layout.num_layers, *inner, **like)
        self._w1a = [
            torch.zeros(layout.num_layers, 0, s.out_features, rank, **like) for s in slices
        ]
        self._w2a = [torch.zeros_like(table) for table in self._w1a]

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` adapters."""
        self._w1b, self._w2b = (_grown(table, num_slots) for table in (self._w1b, self._w2b))
        self._w1a = [_grown(table, num_slots) for table in self._w1a]
        self._w2a = [_grown(table, num_slots) for table in self._w2a]

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's factors of this group and rank into a slot."""
        for table in (self._w1b, self._w2b, *self._w1a, *self._w2a):
            table[:, slot] = 0
        for layer, s, ops in self._layout.of(operators, self.group):
            factors = ops.hadamard
            if factors is not None and factors.rank == self._rank:
                self.layers.add(layer)
                self._w1b[layer, slot, s] = factors.w1b
                self._w2b[layer, slot, s] = factors.w2b
                self._w1a[s][layer, slot] = factors.w1a
                self._w2a[s][layer, slot] = factors.w2a

    def apply(self, layer: int, rows: Rows, x: torch.Tensor, y: torch.Tensor) -> None:
        u = hadamard_shrink_reference(rows.take(x), self._w1b[layer], self._w2b[layer], rows.slots)
        part = rows.take(y)
        hadamard_expand_reference(
            part,
            u,
            [table[layer] for table in self._w1a],
            [table[layer] for table in self._w2a],
            rows.slots,
            rows.weights,
        )
        rows.put(y, part)


def _grown(table: torch.Tensor, num_slots: int) -> torch.Tensor:
    grown = table.new_zeros(table.shape[0], num_slots, *table.shape[2:])
    grown[:, : table.shape[1]] = table
    return grown
