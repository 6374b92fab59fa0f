"""Where adapters lie in packed matrices: a range of ranks and a slot each. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Rank ranges start at multiples of this.
RANK_ALIGNMENT = 8


@dataclass(slots=True)
class Place:
    """Ranks ``[rank_start, rank_end)`` of every matrix, and a slot of every table."""

    rank_start: int
    rank_end: int
    slot: int


class Placement:
    """Gives places to adapters, by key.

    Args:
        capacity: Ranks there are places for.
        num_slots: Number of slots at first, without the neutral slot 0.

    Attributes:
        num_slots: Slots there are places for, slot 0 included.
    """

    def __init__(self, capacity: int, num_slots: int) -> None:
        self._capacity = capacity
        self._places: dict[str, Place] = {}
        self.num_slots = num_slots + 1

    @property
    def places(self) -> Mapping[str, Place]:
        return self._places

    @staticmethod
    def width_of(rank: int) -> int:
        """Number of ranks that an adapter with this largest rank occupies."""
        return -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT

    def has_room(self, width: int) -> bool:
        """Whether ``width`` ranks are free side by side."""
        return self._find(width) is not None

    def has_slots(self, count: int) -> bool:
        """Whether ``count`` slots are free, so that no table has to grow."""
        return len(self._places) + count < self.num_slots

    def put(self, key: str, width: int) -> Place:
        """Places an adapter at the first gap that fits; the caller has made room."""
        start = self._find(width)
        assert start is not None, "the pack makes room before an adapter is placed"
        place = self._places[key] = Place(start, start + width, self._find_slot())
        return place

    def remove(self, key: str) -> None:
        self._places.pop(key, None)

    def compact(self) -> list[tuple[int, int, int]]:
        """Bring all adapters together at the front.

        Returns:
            What moved: first rank and end, and the first rank from now on. No adapter moves up, and
            made in this order within the same matrices no move overwrites what a later one takes.
        """
        cursor, moves = 0, []
        for place in sorted(self._places.values(), key=lambda place: place.rank_start):
            size = place.rank_end - place.rank_start
            moves.append((place.rank_start, place.rank_end, cursor))
            place.rank_start = cursor
            cursor = place.rank_end = cursor + size
        return moves

    def _find(self, width: int) -> int | None:
        if width == 0:
            return 0
        taken = sorted((p.rank_start, p.rank_end) for p in self._places.values())
        cursor = 0
        for start, end in (*taken, (self._capacity, self._capacity)):
            if cursor + width <= start:
                return cursor
            cursor = max(cursor, end)
        return None

    def _find_slot(self) -> int:
        taken = {place.slot for place in self._places.values()}
        slot = next(i for i in range(1, len(taken) + 2) if i not in taken)
        while self.num_slots <= slot:
            self.num_slots *= 2
        return slot
