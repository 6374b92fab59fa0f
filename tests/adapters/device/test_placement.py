"""Places of adapters in packed matrices: the rules they must keep, and what moves with them."""

from __future__ import annotations

import random
from types import MappingProxyType

import torch

from turret.server.adapters.device.layout import ProjectionLayout, SliceShape
from turret.server.adapters.device.packed.pack import Pack
from turret.server.adapters.device.packed.placement import RANK_ALIGNMENT, Placement
from turret.server.adapters.device.packed.projection import PackedProjection
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.updates import LowRank

WINDOW = 64
RANKS = (0, 1, 8, 12, 64, 70, 150)


def check(placement: Placement) -> None:
    places = sorted(placement.places.values(), key=lambda p: (p.rank_start, p.rank_end))
    end = 0
    for place in places:
        if place.rank_end > place.rank_start:
            assert place.rank_start >= end, "two adapters share a rank"
            end = place.rank_end
            assert place.rank_start % RANK_ALIGNMENT == 0
            # Whoever crosses a boundary begins at one, and fits into no window.
            first, last = place.rank_start // WINDOW, (place.rank_end - 1) // WINDOW
            assert first == last or place.rank_start % WINDOW == 0
    assert end <= placement.capacity
    slots = [place.slot for place in places]
    assert len(set(slots)) == len(slots)
    assert all(0 < slot < placement.num_slots for slot in slots)


def test_places_keep_the_rules_whoever_comes_and_goes() -> None:
    source = random.Random(0)
    for _ in range(30):
        placement, grown = Placement(WINDOW), 0
        for number in range(60):
            if placement.places and source.random() < 0.4:
                placement.remove(source.choice(list(placement.places)))
            width = Placement.width_of(source.choice(RANKS))
            if not placement.has_room(width):
                before = {k: (p.rank_start, p.rank_end) for k, p in placement.places.items()}
                moves = placement.grow(width)
                after = [(*before[k], p.rank_start) for k, p in placement.places.items()]
                assert sorted(moves) == sorted(after)
                grown += 1
            place = placement.put(str(number), width)
            assert place.rank_end - place.rank_start == width
            check(placement)
        assert grown > 1
        placement.remove("never there")


def test_a_pack_that_grows_keeps_what_it_holds() -> None:
    layout = ProjectionLayout(
        2,
        {"qkv": (SliceShape("q", 24, 16), SliceShape("k", 8, 16)), "o": (SliceShape("o", 16, 16),)},
    )
    like = (torch.float32, torch.device("cpu"))
    pack = Pack(layout, {n: PackedProjection(layout, n, *like) for n in layout.projections})
    source, held = random.Random(1), dict[str, AdapterOperators]()
    for number in range(40):
        if held and source.random() < 0.3:
            gone = source.choice(list(held))
            pack.remove(gone)
            del held[gone]
        rank = source.choice((3, 8, 30))
        operators = AdapterOperators(
            MappingProxyType(
                {
                    layout.module(layer, shape.path): ModuleOperators(
                        low_rank=LowRank(
                            torch.randn(rank, 16), torch.randn(rank, shape.out_features)
                        )
                    )
                    for layer in range(2)
                    for shapes in layout.projections.values()
                    for shape in shapes
                }
            )
        )
        pack.insert(str(number), operators)
        held[str(number)] = operators
        for key, kept in held.items():
            place = pack.places[key]
            for name, packed in pack.projections.items():
                for layer, s, ops in layout.of(kept, name):
                    assert ops.low_rank is not None
                    end = place.rank_start + ops.low_rank.rank
                    a, b = packed.layers[layer]
                    assert torch.equal(a[place.rank_start : end, s], ops.low_rank.a)
                    assert torch.equal(b[s][place.rank_start : end], ops.low_rank.b)
                    # The ranks up to the adapter's end are nobody's values.
                    assert not a[end : place.rank_end, s].any()
                    assert not b[s][end : place.rank_end].any()
