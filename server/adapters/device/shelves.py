"""Operators that are gathered per row: one table per shape, a slot per adapter.

Hadamard and Kronecker updates do not stack along a rank axis as low-rank ones do; each row
multiplies the factors of its own adapter, picked from a table by slot.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from turret.server.adapters.device.members import Rows, StepMembers
from turret.server.adapters.operators import AdapterOperators, ModuleOperators


class Shelf(Protocol):
    """The tables of adapters with one shape in one group."""

    group: str
    layers: set[int]

    def grow(self, num_slots: int) -> None: ...
    def put(self, slot: int, operators: AdapterOperators) -> None: ...
    def apply(self, layer: int, rows: Rows, x: torch.Tensor, y: torch.Tensor) -> None: ...


class ShelfSlots:
    """A shelf with the slots its adapters hold."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self._slots: dict[str, int] = {}
        self._capacity = 0

    def insert(self, key: str, operators: AdapterOperators) -> None:
        taken = set(self._slots.values())
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        if slot >= self._capacity:
            self._capacity = max(4, 2 * self._capacity)
            self.shelf.grow(self._capacity)
        self._slots[key] = slot
        self.shelf.put(slot, operators)

    def remove(self, key: str) -> None:
        self._slots.pop(key, None)

    def slot(self, key: str) -> int | None:
        """The slot of an adapter, or None if it is not on this shelf."""
        return self._slots.get(key)

    def bind(self, members: StepMembers, device: torch.device) -> list[Rows]:
        """The step's rows by position among the members that are on this shelf."""
        bound: list[Rows] = []
        per_row = [
            [(self._slots[u], w) for u, w in row if u in self._slots] for row in members.short
        ]
        for j in range(max((len(found) for found in per_row), default=0)):
            users = [(*found[j], i) for i, found in enumerate(per_row) if len(found) > j]
            bound.append(_short_rows(sorted(users, key=lambda user: user[0]), device))
        for start, end, mix in members.long:
            for key, weight in mix:
                if key in self._slots:
                    slot = self._slots[key]
                    bound.append(Rows(slice(start, end), slot, weight, slice(slot, slot + 1)))
        return bound


def _short_rows(users: list[tuple[int, float, int]], device: torch.device) -> Rows:
    """Rows from (slot, weight, row), ascending in slots."""
    slots = [slot for slot, _, _ in users]
    rows = torch.tensor([row for _, _, row in users], device=device)
    weights = torch.tensor([[weight] for _, weight, _ in users], device=device)
    mixed = 1.0 if all(weight == 1.0 for _, weight, _ in users) else weights
    if slots[0] == slots[-1]:
        return Rows(rows, slots[0], mixed, slice(slots[0], slots[0] + 1))
    is_run = slots == list(range(slots[0], slots[-1] + 1))
    run = slice(slots[0], slots[-1] + 1) if is_run else None
    return Rows(rows, torch.tensor(slots, device=device), mixed, run)


@dataclass(frozen=True, slots=True)
class StepShelves:
    """A step's rows of every shelf, by group."""

    by_group: dict[str, list[tuple[Shelf, list[Rows]]]]

    def apply(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of one layer's fused projection to ``y``, in place."""
        for shelf, bound in self.by_group.get(group, ()):
            if layer in shelf.layers:
                for rows in bound:
                    shelf.apply(layer, rows, x, y)


class Bank(Protocol):
    """What a kind of operator brings: the shelves an adapter needs, made on demand."""

    def shelves_of(self, operators: AdapterOperators) -> Iterable[tuple[Hashable, Any]]:
        """(shape, function that makes the shelf) for every shape the adapter has."""
        ...

    def extra_bytes(self, ops: ModuleOperators) -> int:
        """Bytes a module takes on its shelf past those it takes in host memory."""
        ...


class Shelves:
    """All shelves of all banks."""

    def __init__(self, banks: Sequence[Bank], device: torch.device) -> None:
        self._banks = banks
        self._device = device
        self._shelves: dict[Hashable, ShelfSlots] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        for bank in self._banks:
            for shape, make in bank.shelves_of(operators):
                if shape not in self._shelves:
                    self._shelves[shape] = ShelfSlots(make())
                self._shelves[shape].insert(key, operators)

    def remove(self, key: str) -> None:
        for slots in self._shelves.values():
            slots.remove(key)

    def extra_bytes(self, operators: AdapterOperators) -> int:
        """Bytes an adapter takes on its shelves past those it takes in host memory."""
        return sum(b.extra_bytes(ops) for ops in operators.modules.values() for b in self._banks)

    def ordered(self) -> list[tuple[Hashable, ShelfSlots]]:
        """All shelves in the order of their shapes, not of their making.

        Sums must not depend on what the pack has held before.
        """
        return sorted(self._shelves.items(), key=lambda item: repr(item[0]))

    def bind(self, members: StepMembers) -> StepShelves | None:
        """The step's rows, or None if no row needs a shelf."""
        by_group: dict[str, list[tuple[Shelf, list[Rows]]]] = {}
        for _, slots in self.ordered():
            bound = slots.bind(members, self._device)
            if bound:
                by_group.setdefault(slots.shelf.group, []).append((slots.shelf, bound))
        return StepShelves(by_group) if by_group else None
