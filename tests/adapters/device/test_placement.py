"""Places of adapters in packed matrices: invariants under any arrivals and departures."""

from __future__ import annotations

import random

from turret.server.adapters.device.gpu.pack import RANK_ALIGNMENT, Placement

CAPACITY = 256
RANKS = (0, 1, 8, 12, 64, 70)


def check(placement: Placement) -> None:
    places = sorted(placement.places.values(), key=lambda p: (p.rank_start, p.rank_end))
    end = 0
    for place in places:
        if place.rank_end > place.rank_start:
            assert place.rank_start >= end, "two adapters share a rank"
            end = place.rank_end
            assert place.rank_start % RANK_ALIGNMENT == 0
    assert end <= CAPACITY
    slots = [place.slot for place in places]
    assert len(set(slots)) == len(slots)
    assert all(slot > 0 for slot in slots)


def test_placement_stays_valid_as_adapters_enter_and_leave() -> None:
    source, compacted = random.Random(0), 0
    for _ in range(30):
        placement = Placement(CAPACITY)
        for number in range(60):
            width = Placement.width_of(source.choice(RANKS))
            taken = sum(p.rank_end - p.rank_start for p in placement.places.values())
            while taken + width > CAPACITY or (placement.places and source.random() < 0.4):
                gone = source.choice(list(placement.places))
                taken -= placement.places[gone].rank_end - placement.places[gone].rank_start
                placement.remove(gone)
            if not placement.has_room(width):
                before = {k: (p.rank_start, p.rank_end) for k, p in placement.places.items()}
                moves = placement.compact()
                after = [(*before[k], p.rank_start) for k, p in placement.places.items()]
                assert sorted(moves) == sorted(after)
                assert all(first <= start for start, end, first in moves if start < end)
                compacted += 1
            place = placement.put(str(number), width)
            assert place.rank_end - place.rank_start == width
            assert place.slot <= len(placement.places), "tables have a slot for each adapter"
            check(placement)
        placement.remove("never there")
    assert compacted > 10
