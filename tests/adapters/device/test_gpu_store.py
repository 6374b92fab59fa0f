"""The gpu path's store: what it holds, and what stays where it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch

from turret.server.adapters.device.gpu_shelves import GpuHadamardShelf
from turret.server.adapters.device.gpu_store import GpuStore
from turret.server.adapters.device.layout import ProjectionLayout, SliceShape
from turret.server.adapters.operators import (
    AdapterOperators,
    Hadamard,
    LowRank,
    ModuleOperators,
)

CPU = torch.device("cpu")
WIDTH = 16
LAYOUT = ProjectionLayout(
    2,
    {
        "qkv": tuple(SliceShape(f"self_attn.{s}_proj", WIDTH, WIDTH) for s in "qkv"),
        "o": (SliceShape("self_attn.o_proj", WIDTH, WIDTH),),
    },
)
PATHS = [
    LAYOUT.module(layer, slice_.path)
    for layer in range(LAYOUT.num_layers)
    for slices in LAYOUT.projections.values()
    for slice_ in slices
]


@dataclass(eq=False)
class Adapter:
    key: str
    operators: AdapterOperators
    bytes_device: int = 0


def low_rank(key: str, rank: int = 8, **more: Any) -> Adapter:
    def module() -> ModuleOperators:
        return ModuleOperators(LowRank(torch.randn(rank, WIDTH), torch.randn(rank, WIDTH)), **more)

    return Adapter(key, AdapterOperators({path: module() for path in PATHS}))


def hadamard(key: str) -> Adapter:
    def module() -> ModuleOperators:
        narrow, wide = torch.randn(3, WIDTH), torch.randn(WIDTH, 3)
        return ModuleOperators(hadamard=Hadamard(wide, narrow, wide, narrow))

    return Adapter(key, AdapterOperators({path: module() for path in PATHS}))


def store_of(max_bytes: int = 1 << 24) -> GpuStore:
    return GpuStore(LAYOUT, torch.float32, CPU, max_bytes)


def test_an_adapter_that_found_no_memory_can_come_again() -> None:
    store = store_of()
    store.prepare([low_rank("here"), hadamard("there")])
    more = [hadamard(f"more {number}") for number in range(6)]
    grow = GpuHadamardShelf.grow

    def fails(shelf: GpuHadamardShelf, num_slots: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        patch.object(GpuHadamardShelf, "grow", fails),
        pytest.raises(torch.OutOfMemoryError),
    ):
        store.prepare(more)
    assert GpuHadamardShelf.grow is grow
    entered = [adapter for adapter in more if adapter.bytes_device]
    assert len(entered) == 3
    for _, held in store._shelves.ordered():
        assert set(held.slots) == {"there", *(adapter.key for adapter in entered)}
    store.prepare(more)
    for _, held in store._shelves.ordered():
        assert len(set(held.slots.values())) == 7
        assert isinstance(held.shelf, GpuHadamardShelf)
        for adapter in more:
            factors = adapter.operators.modules[LAYOUT.module(1, PATHS[0].split(".", 3)[3])]
            if held.shelf.projection == "qkv":
                assert factors.hadamard is not None
                stored = held.shelf.w1b[1, held.slots[adapter.key], 0]
                assert torch.equal(stored, factors.hadamard.w1b)
