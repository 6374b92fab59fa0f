"""Where adapters lie in packed matrices: a range of ranks and a slot each. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Rank ranges start at multiples of this: bf16 dot products take ranks in pairs, and a shifted
# pairing would change the rounding.
RANK_ALIGNMENT = 8
_MIN_RANK_CAPACITY = 16
_MIN_SLOTS = 4


@dataclass(slots=True)
class Place:
    """Ranks ``[rank_start, rank_end)`` of every matrix, and a slot of every table."""

    rank_start: int
    rank_end: int
    slot: int


class Placement:
    """Gives places to adapters, by key.

    Args:
        window: Ranks per window: no adapter that fits into one crosses a boundary.

    Attributes:
        capacity: Ranks there are places for.
        num_slots: Slots there are places for. Slot 0 is the neutral one, and nobody's.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._places: dict[str, Place] = {}
        self.capacity = 0
        self.num_slots = 1

    @property
    def places(self) -> Mapping[str, Place]:
        return self._places

    @staticmethod
    def width_of(rank: int) -> int:
        """Ranks that an adapter occupies whose largest rank this is."""
        return -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT

    def has_room(self, width: int) -> bool:
        """Whether ``width`` ranks are free side by side."""
        return self._find(width) is not None

    def has_slots(self, count: int) -> bool:
        """Whether so many slots are free, so that no table has to grow."""
        return len(self._places) + count < self.num_slots

    def reserve(self, capacity: int, num_slots: int) -> None:
        """Start with places for so many ranks, and slots besides slot 0."""
        assert not self._places
        self.capacity, self.num_slots = capacity, num_slots + 1

    def put(self, key: str, width: int) -> Place:
        """Place an adapter, first fit; there is room for it."""
        start = self._find(width)
        assert start is not None, "the pack grows before an adapter is placed"
        place = self._places[key] = Place(start, start + width, self._find_slot())
        return place

    def remove(self, key: str) -> None:
        self._places.pop(key, None)

    def grow(self, width: int) -> list[tuple[int, int, int]]:
        """Make room for ``width`` more ranks, behind all adapters, which become neighbours.

        The widest come first: the narrow ones then fill what is left of a window.

        Returns:
            What moved: first rank and end, and the first rank from now on. Moves are to be made
            from the matrices as they were.
        """
        cursor, moves = 0, []
        for place in sorted(self._places.values(), key=lambda p: p.rank_start - p.rank_end):
            size = place.rank_end - place.rank_start
            start = self._fit(cursor, size)
            moves.append((place.rank_start, place.rank_end, start))
            place.rank_start = start
            cursor = place.rank_end = start + size
        self.capacity = max(self.capacity, _rounded(self._fit(cursor, width) + width))
        return moves

    def compact(self) -> list[tuple[int, int, int]]:
        """Bring all adapters together at the front; there are no windows.

        Returns:
            What moved, as from ``grow``. No adapter moves up, and made in this order within the
            same matrices no move overwrites what a later one takes.
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
        for start, end in (*taken, (self.capacity, self.capacity)):
            place = self._fit(cursor, width)
            if place + width <= start:
                return place
            cursor = max(cursor, end)
        return None

    def _fit(self, cursor: int, width: int) -> int:
        """The first place from ``cursor`` on that crosses no rank window it need not cross."""
        left = -cursor % self._window
        return cursor if width <= left else cursor + left

    def _find_slot(self) -> int:
        taken = {place.slot for place in self._places.values()}
        slot = next(i for i in range(1, len(taken) + 2) if i not in taken)
        while self.num_slots <= slot:
            self.num_slots = max(_MIN_SLOTS, 2 * self.num_slots)
        return slot


def _rounded(ranks: int) -> int:
    """Room for so many ranks and at most an eighth more, so that not every adapter grows it."""
    grain = max(_MIN_RANK_CAPACITY, 1 << max(ranks.bit_length() - 4, 0))
    return -(-ranks // grain) * grain
