"""The store of the GPU path: its contents, and addresses that must not change."""

from __future__ import annotations

import random
import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders import operators
from builders.facts import Resident, resident
from builders.operators import Make
from gpu_path import CountedWrites, OneStepTables

from turret.server.adapters.device import (
    AdapterMemoryError,
    ExpertShape,
    ProjectionLayout,
    SliceShape,
)
from turret.server.adapters.device import gpu_slot_tables as slot_tables
from turret.server.adapters.device.gpu_store import GpuStore
from turret.server.adapters.lowering import in_one_block
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.low_rank import ExpertLowRank

CPU = torch.device("cpu")
WIDTH = 16
LAYOUT = ProjectionLayout(
    2,
    {
        "qkv": tuple(SliceShape(f"self_attn.{s}_proj", WIDTH, WIDTH) for s in "qkv"),
        "o": (SliceShape("self_attn.o_proj", WIDTH, WIDTH),),
    },
)


def adapter(key: str, *makes: Make, layout: ProjectionLayout = LAYOUT) -> Resident:
    """An adapter with the operators on every module, in the layout of host memory."""
    paths = [one.path for slices in layout.projections.values() for one in slices]
    modules = {
        layout.module(layer, path): ModuleOperators(
            *(make(WIDTH, WIDTH, torch.float32) for make in makes)
        )
        for layer in sorted(range(layout.num_layers), key=str)
        for path in paths
    }
    return resident(key, AdapterOperators(in_one_block(modules)[0]))


def low_rank(key: str, rank: int = 8) -> Resident:
    return adapter(key, operators.low_rank(rank))


def hadamard(key: str) -> Resident:
    return adapter(key, operators.hadamard(3))


def store_of(max_bytes: int = 1 << 24) -> GpuStore:
    return GpuStore(LAYOUT, torch.float32, CPU, max_bytes)


def tensors_on(slot_table: slot_tables.SlotTable) -> dict[int, torch.Tensor]:
    """The rows of a slot table's tensors, flattened, by their addresses."""
    kept = [tensor for own in slot_table._kept.values() for tensor in own]
    return {row.data_ptr(): row for tensor in kept for row in tensor}


def check_addresses(store: GpuStore, adapters: list[Resident]) -> None:
    """Check that all adapters' factors of layer 1 are at the addresses in the slot tables."""
    for place, slot_table in store._slot_tables._slot_tables.items():
        path = LAYOUT.projections[place.projection][place.slice].path
        known = tensors_on(slot_table)
        for adapter in adapters:
            factors = adapter.operators.modules[LAYOUT.module(1, path)].get(Hadamard)
            assert factors is not None
            places = slot_table.table[1, slot_table.slots[adapter.key]].tolist()
            for address, own in zip(places, factors.tensors(), strict=True):
                assert address % 16 == 0
                assert torch.equal(known[address][: own.numel()], own.flatten())


def test_an_adapter_that_did_not_fit_can_be_prepared_again() -> None:
    store = store_of()
    first = [low_rank("here"), hadamard("there")]
    store.prepare(first)
    more, made = [hadamard(f"more {number}") for number in range(6)], []
    apart = slot_tables.apart

    def fails(*args: Any) -> list[int]:
        made.append(args)
        # Fail in the fourth adapter: each has 4 factors in each of 4 slot tables.
        if len(made) > 3 * 4 * 4 + 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return apart(*args)

    with patch.object(slot_tables, "apart", fails), pytest.raises(AdapterMemoryError):
        store.prepare(more)
    entered = [adapter for adapter in more if adapter.bytes_device]
    assert len(entered) == 3
    found = store._slot_tables._slot_tables
    assert len(found) == 4
    for slot_table in found.values():
        assert set(slot_table.slots) == {adapter.key for adapter in entered}, (
            "idle adapters are evicted"
        )
    assert store.is_refused("more 3")
    with pytest.raises(AdapterMemoryError):
        store.prepare(more)
    later = time.monotonic() + 60
    with patch.object(time, "monotonic", lambda: later):
        store.prepare(more)
    assert not store.is_refused("more 3")
    for slot_table in found.values():
        assert len(set(slot_table.slots.values())) == 6
    check_addresses(store, more)


MIXTURE = ProjectionLayout(
    6, LAYOUT.projections, {"experts_down": ExpertShape("mlp.experts.down_proj", 4, WIDTH, 8)}
)


def experts(key: str, rank: int, layers: list[int]) -> Resident:
    updates = {
        MIXTURE.module(layer, "mlp.experts.down_proj"): ExpertLowRank(
            torch.randn(4, rank, 8), torch.randn(4, rank, WIDTH)
        )
        for layer in layers
    }
    return resident(key, AdapterOperators({}, experts=updates))


def test_expert_updates_take_their_exact_size_and_release_it() -> None:
    store = GpuStore(MIXTURE, torch.float32, CPU, 1 << 24)
    adapters = [experts(f"{n}", 2 + n % 3, [n % 6, 5]) for n in range(9)]

    def held() -> list[torch.Tensor]:
        on_slot_tables = store._slot_tables._slot_tables.values()
        return [
            t for slot_table in on_slot_tables for kept in slot_table._kept.values() for t in kept
        ]

    for end in (1, 5, 9):
        store.prepare(adapters[:end])
        assert sum(t.nbytes for t in held()) == sum(a.operators.num_bytes for a in adapters[:end])
    for adapter in adapters[:8]:
        store.drop(adapter.key)
    assert sum(t.nbytes for t in held()) == adapters[8].operators.num_bytes
    store.prepare(adapters[6:])
    for slot_table in store._slot_tables._slot_tables.values():
        known = tensors_on(slot_table)
        for key, slot in slot_table.slots.items():
            own = adapters[int(key)].operators.experts or {}
            for layer, (a, b) in enumerate(slot_table.table[:, slot].tolist()):
                update = own.get(MIXTURE.module(layer, "mlp.experts.down_proj"))
                if update is None:
                    assert (a, b) == (0, 0)
                else:
                    assert torch.equal(known[a], update.a.flatten())
                    assert torch.equal(known[b], update.b.flatten())


def check_all_addresses(
    store: GpuStore, adapters: list[Resident], layout: ProjectionLayout = LAYOUT
) -> None:
    """Check that every factor and gain is at its address in the tables."""
    for adapter in adapters:
        place = store._pack.places[adapter.key]
        for layer in range(layout.num_layers):
            for name, slices in layout.projections.items():
                packed = store._pack.projections[name]
                for s, slice_ in enumerate(slices):
                    ops = adapter.operators.modules[layout.module(layer, slice_.path)]
                    assert ops.low_rank is not None
                    ranks = slice(place.rank_start, place.rank_start + ops.low_rank.rank)
                    assert torch.equal(packed.a[layer, ranks, s], ops.low_rank.a)
                    assert torch.equal(packed.b[s][layer, ranks], ops.low_rank.b)
                    assert packed.slice_ranks[layer, place.slot, s] == ops.low_rank.rank
                    if ops.gain is not None:
                        found = packed.gain_delta[layer, place.slot, packed.columns[s]]
                        assert torch.equal(found, ops.gain - 1.0)


def budget_of(ranks: int) -> int:
    """The smallest budget with this number of ranks, a multiple of 16."""
    budget = 1 << 12
    while len(store_of(budget)._pack.projections["o"].a[0]) < ranks:
        budget += 1 << 8
    return budget


def test_preparing_a_resident_adapter_copies_nothing() -> None:
    store = store_of(budget_of(128))
    adapters = [low_rank(f"{number}") for number in range(8)]
    for adapter in adapters:
        store.prepare([adapter])
    assert all(adapter.bytes_device for adapter in adapters), "idle adapters stay"
    entered = []
    with patch.object(store, "_insert", lambda adapter: entered.append(adapter.key)):
        for adapter in adapters * 3:
            store.prepare([adapter])
    assert entered == []
    check_all_addresses(store, adapters)
    store.prepare([adapters[1]])
    store.prepare([low_rank("new")])
    assert [a.key for a in adapters if not a.bytes_device] == ["0"], "the least recently used"


def test_scattered_ranks_are_compacted_in_place() -> None:
    store = store_of(budget_of(64))
    generator = random.Random(3)
    for _ in range(60):
        left, batch = 64, []
        while left >= 16 and generator.random() < 0.9:
            rank = generator.randint(1, left)
            batch.append(low_rank(f"{generator.random()}", rank))
            left -= max(-(-rank // 8) * 8, 16)
        store.prepare(batch)
        check_all_addresses(store, batch)


@pytest.mark.parametrize("make", [operators.gain, operators.hadamard(3), operators.gate(5, 12)])
def test_new_adapters_of_a_kind_do_not_invalidate_captured_steps(make: Make) -> None:
    store, tables = store_of(), OneStepTables(4, CPU)
    table = tables.load_segments([])
    tables.load_segments = lambda runs: table  # type: ignore[method-assign]

    def signature(key: str) -> object:
        return store.bind([(0, 1, [(key, 1.0)])], tables).signature

    store.prepare([low_rank("plain")])
    plain, found = signature("plain"), []
    for number in range(9):
        store.prepare([adapter(f"{number}", make)])
        found.append(signature(f"{number}"))
    assert set(found) == {found[0]}
    assert found[0] != plain
    assert signature("plain") == plain


def test_adapters_without_ranks_take_slots() -> None:
    store = store_of(budget_of(64))
    gains = [adapter(f"{number}", operators.gain) for number in range(20)]
    for each in gains:
        store.prepare([each])
        assert len({place.slot for place in store._pack.places.values()} - {0}) <= 4
    assert [a.key for a in gains if a.bytes_device] == ["16", "17", "18", "19"]


@pytest.mark.parametrize(
    ("makes", "most"),
    [
        ([operators.low_rank(4)], 60),
        ([operators.low_rank(4), operators.gain], 80),
        ([operators.gate(5, 12)], 60),
    ],
    ids=["low rank", "gain", "gate"],
)
def test_launches_to_copy_an_adapter_do_not_grow_with_its_layers(
    makes: list[Make], most: int
) -> None:
    layout = ProjectionLayout(32, LAYOUT.projections)
    copied = adapter("a", *makes, layout=layout)
    store = GpuStore(layout, torch.float32, CPU, 1 << 24)
    with CountedWrites() as counting:
        store.prepare([copied])
    assert counting.count <= most
    if copied.operators.rank:
        check_all_addresses(store, [copied], layout)
