"""Memory of packed adapters beside what the adapters themselves take."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import MappingProxyType

import torch

from turret.server.adapters.device.layout import ProjectionLayout, SliceShape
from turret.server.adapters.device.packed.store import PackedStore
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.updates import LowRank

WIDTH = 16
LAYOUT = ProjectionLayout(
    1,
    {
        "qkv": tuple(SliceShape(f"self_attn.{s}_proj", WIDTH, WIDTH) for s in "qkv"),
        "o": (SliceShape("self_attn.o_proj", WIDTH, WIDTH),),
    },
)
# Every module has an A and a B of as many bytes.
RANK_BYTES = 4 * 2 * WIDTH * torch.bfloat16.itemsize


@dataclass(eq=False)
class Adapter:
    key: str
    operators: AdapterOperators
    bytes_device: int = 0


def make_adapter(key: str, rank: int) -> Adapter:
    module = ModuleOperators(
        low_rank=LowRank(
            a=torch.ones(rank, WIDTH, dtype=torch.bfloat16),
            b=torch.ones(rank, WIDTH, dtype=torch.bfloat16),
        )
    )
    paths = [slice_.path for slices in LAYOUT.projections.values() for slice_ in slices]
    return Adapter(
        key,
        AdapterOperators(MappingProxyType({LAYOUT.module(0, path): module for path in paths})),
    )


def allocated(pack: PackedStore) -> int:
    matrices = [m for packed in pack._pack.projections.values() for m in (packed.a, *packed.b)]
    return sum(matrix.numel() * matrix.element_size() for matrix in matrices)


def test_whenever_the_pack_grows_a_fifth_of_it_at_most_is_unused() -> None:
    source = random.Random(0)
    adapters = [make_adapter(f"{number}", (8, 16, 32, 64)[number % 4]) for number in range(300)]
    losses = []
    for _ in range(20):
        pack = PackedStore(LAYOUT, torch.bfloat16, torch.device("cpu"), 1 << 30)
        before = 0
        for _ in range(60):
            pack.prepare(source.sample(adapters, source.randint(1, 64)))
            now = allocated(pack)
            if now > before:
                losses.append(1.0 - pack.adapter_bytes / now)
            before = now
    assert len(losses) > 40
    assert max(losses) <= 0.2, max(losses)


def test_an_adapter_is_counted_as_what_it_takes() -> None:
    pack = PackedStore(LAYOUT, torch.bfloat16, torch.device("cpu"), 1 << 30)
    adapters = [make_adapter(f"{rank}", rank) for rank in (8, 16, 64)]
    pack.prepare(adapters)
    assert [a.bytes_device for a in adapters] == [r * RANK_BYTES for r in (8, 16, 64)]
    assert [a.operators.num_bytes for a in adapters] == [a.bytes_device for a in adapters]
    for adapter in adapters:
        assert adapter.operators.num_low_rank_bytes == adapter.operators.num_bytes
        assert adapter.operators.rank == int(adapter.key)
    pack.drop("16")
    assert pack.adapter_bytes == 72 * RANK_BYTES
