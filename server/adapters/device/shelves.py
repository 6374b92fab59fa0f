"""Operators that are gathered per row: one table per shape, a slot per adapter.

Hadamard, Kronecker and sparse updates do not stack along a rank axis as low-rank ones do; each row
multiplies the factors of its own adapter, picked from a table by slot. A *shelf* is the tables of
one kind of operator and one shape in one fused projection.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from turret.server.adapters.device.members import Rows, StepMembers
from turret.server.adapters.device.part import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators


class Shelf(Protocol):
    """Tables by slot, and the layers in which some adapter has the operator."""

    projection: str
    layers: set[int]

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` adapters."""
        ...

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's factors of the shelf's shape into a slot."""
        ...

    def clear(self, slot: int) -> None:
        """The adapter in a slot has left; the next one may take its place."""
        ...


S = TypeVar("S", bound=Shelf)
S_co = TypeVar("S_co", bound=Shelf, covariant=True)


class ShelfKind(Protocol[S_co]):
    """What a kind of operator brings: the shelves that an adapter needs.

    Attributes:
        least_slots: Of a shelf that holds anything.
    """

    least_slots: int

    def shelves_of(
        self, operators: AdapterOperators
    ) -> Iterable[tuple[Hashable, Callable[[], S_co]]]:
        """(shape, function that makes the shelf) for every shape the adapter has."""
        ...

    def extra_bytes(self, ops: ModuleOperators) -> int:
        """Bytes a module takes on its shelf past those it takes in host memory."""
        ...


class ShelfSlots(Generic[S]):
    """A shelf with the slots its adapters hold.

    Attributes:
        slots: By adapter key.
    """

    def __init__(self, shelf: S, least_slots: int) -> None:
        self.shelf = shelf
        self._least_slots = least_slots
        self.slots: dict[str, int] = {}
        self._capacity = 0

    def insert(self, key: str, operators: AdapterOperators) -> None:
        taken = set(self.slots.values())
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        if slot >= self._capacity:
            capacity = max(self._least_slots, 2 * self._capacity)
            self.shelf.grow(capacity)
            self._capacity = capacity
        self.slots[key] = slot
        self.shelf.put(slot, operators)


class Shelves(Part, Generic[S]):
    """All shelves of some kinds of operators; made when an adapter needs them."""

    def __init__(self, kinds: Sequence[ShelfKind[S]]) -> None:
        self._kinds = kinds
        self._shelves: dict[Hashable, ShelfSlots[S]] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        for kind in self._kinds:
            for shape, make in kind.shelves_of(operators):
                if shape not in self._shelves:
                    self._shelves[shape] = ShelfSlots(make(), kind.least_slots)
                self._shelves[shape].insert(key, operators)

    def remove(self, key: str) -> None:
        for held in self._shelves.values():
            slot = held.slots.pop(key, None)
            if slot is not None:
                held.shelf.clear(slot)

    def extra_bytes(self, operators: AdapterOperators) -> int:
        modules = operators.modules.values()
        return sum(kind.extra_bytes(ops) for ops in modules for kind in self._kinds)

    def ordered(self) -> list[tuple[Hashable, ShelfSlots[S]]]:
        """All shelves in the order of their shapes, not of their making.

        Sums must not depend on what the store has held before.
        """
        return sorted(self._shelves.items(), key=lambda item: repr(item[0]))


class TorchShelf(Shelf, Protocol):
    """A shelf whose updates torch computes."""

    def apply(self, layer: int, rows: Rows, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of these rows to ``y``, in place."""
        ...


@dataclass(frozen=True, slots=True)
class StepShelves:
    """A step's rows of every shelf, by fused projection."""

    by_projection: dict[str, list[tuple[TorchShelf, list[Rows]]]]

    def apply(self, layer: int, projection: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of one layer's fused projection to ``y``, in place."""
        for shelf, bound in self.by_projection.get(projection, ()):
            if layer in shelf.layers:
                for rows in bound:
                    shelf.apply(layer, rows, x, y)


class TorchShelves(Shelves[TorchShelf]):
    """The shelves of the torch path."""

    def __init__(self, kinds: Sequence[ShelfKind[TorchShelf]], device: torch.device) -> None:
        super().__init__(kinds)
        self._device = device

    def bind(self, members: StepMembers) -> StepShelves | None:
        """The step's rows, or None if no row needs a shelf."""
        found: dict[str, list[tuple[TorchShelf, list[Rows]]]] = {}
        for _, held in self.ordered():
            bound = _rows_of(held.slots, members, self._device)
            if bound:
                found.setdefault(held.shelf.projection, []).append((held.shelf, bound))
        return StepShelves(found) if found else None


def _rows_of(slots: Mapping[str, int], members: StepMembers, device: torch.device) -> list[Rows]:
    """The step's rows by position among the members that are on a shelf."""
    bound: list[Rows] = []
    per_row = [[(slots[key], w) for key, w in row if key in slots] for row in members.short]
    for j in range(max((len(found) for found in per_row), default=0)):
        users = [(*found[j], i) for i, found in enumerate(per_row) if len(found) > j]
        bound.append(_short_rows(sorted(users, key=lambda user: user[0]), device))
    for start, end, mix in members.long:
        for key, weight in mix:
            if key in slots:
                slot = slots[key]
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
