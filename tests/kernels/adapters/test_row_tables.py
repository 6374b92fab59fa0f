"""Hadamard and Kronecker updates on a CPU: padded tables against float64, and bit for bit.

Planted faults, and how many of the tests here each one fails (tried by hand):

- hadamard: weight dropped: 3
- hadamard: first rank only: 2 (the third has none but the first)
- hadamard: every slice written to the first one's columns: 2
- kronecker: weight dropped: 4
- kronecker: last rows and columns of the padded result instead of the first: 4
- shelves: any slots taken for a run: 7
- shelves: a run of slots taken one too early: 7
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from turret.server.adapters.device.hadamard_shelf import HadamardShelves
from turret.server.adapters.device.kronecker_shelf import KroneckerShelves
from turret.server.adapters.device.layout import ProjectionLayout, SliceShape
from turret.server.adapters.device.members import StepMembers
from turret.server.adapters.device.shelves import TorchShelves
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.updates import Hadamard, Kronecker

NUM_ADAPTERS = 4
# Rank, inputs, outputs of the slices.
HADAMARD = [(1, 40, (24,)), (3, 100, (70, 33)), (8, 192, (192, 64, 64))]
# out_l, in_m, out_k, in_n, rank of the second factor or None.
KRONECKER = [(2, 3, 24, 3, None), (4, 4, 50, 40, 3), (24, 24, 24, 24, 8), (8, 16, 5, 36, None)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape) / shape[-1] ** 0.5


def stored(
    layout: ProjectionLayout, make: Any
) -> tuple[TorchShelves, list[dict[int, tuple[ModuleOperators, torch.Tensor]]]]:
    """Adapters that ``make(slice)`` makes, with each one's dense updates."""
    like = (layout, torch.device("cpu"))
    store = TorchShelves((HadamardShelves(*like), KroneckerShelves(*like)), like[1])
    made = []
    for number in range(NUM_ADAPTERS):
        parts = {s: make(s) for s in range(len(layout.projections["g"]))}
        modules = {layout.module(0, str(s)): ops for s, (ops, _) in parts.items()}
        store.insert(f"a{number}", AdapterOperators(modules))
        made.append(parts)
    return store, made


def added(store: TorchShelves, short: Any, long: Any, x: torch.Tensor, width: int) -> torch.Tensor:
    y = torch.zeros(len(x), width)
    bound = store.bind(StepMembers(short, long))
    assert bound is not None
    bound.apply(0, "g", x, y)
    return y


def check(layout: ProjectionLayout, make: Any) -> None:
    store, made = stored(layout, make)
    shapes = layout.projections["g"]
    x, width = random(9, shapes[0].in_features), sum(s.out_features for s in shapes)
    # A run of slots that begins past 0, gaps, an adapter on two rows, a mix, a row without any.
    mixes = [
        [("a1", 1.0)],
        [("a2", -0.5)],
        [("a3", 1.0), ("a1", 2.0)],
        [],
        [("a3", 1.0)],
        [("a1", 1.0)],
    ]
    long = [(6, 9, [("a0", 0.25), ("a3", 1.0)])]
    found = added(store, mixes, long, x, width)
    for row, mix in enumerate([*mixes, *[long[0][2]] * 3]):
        exact = torch.zeros(width, dtype=torch.float64)
        for key, weight in mix:
            dense = [made[int(key[1])][s][1] for s in range(len(shapes))]
            exact += weight * torch.cat([one @ x[row].double() for one in dense])
        assert float((found[row] - exact).abs().max()) < 1e-5 * max(1.0, float(exact.abs().max()))
        alone = added(store, [mix], [], x[row : row + 1], width) if mix else torch.zeros(1, width)
        assert torch.equal(alone[0], found[row]), row
    runs = added(store, [[("a1", 1.0)], [("a2", 1.0)], [("a3", 1.0)]], [], x[:3], width)
    same = added(store, [[("a2", 1.0)]] * 3, [], x[:3], width)
    assert torch.equal(runs[1], same[1])
    assert torch.equal(runs[0], found[0])


@pytest.mark.parametrize("shape", HADAMARD)
def test_hadamard_rows(shape: tuple[int, int, tuple[int, ...]]) -> None:
    rank, inner, outs = shape
    torch.manual_seed(rank)

    def make(s: int) -> tuple[ModuleOperators, torch.Tensor]:
        w1a, w2a = random(outs[s], rank), random(outs[s], rank)
        w1b, w2b = torch.randn(rank, inner), torch.randn(rank, inner)
        dense = (w1a.double() @ w1b.double()) * (w2a.double() @ w2b.double())
        return ModuleOperators(hadamard=Hadamard(w1a, w1b, w2a, w2b)), dense

    check(
        ProjectionLayout(1, {"g": tuple(SliceShape(str(s), o, inner) for s, o in enumerate(outs))}),
        make,
    )


@pytest.mark.parametrize("shape", KRONECKER)
def test_kronecker_rows(shape: tuple[int, int, int, int, int | None]) -> None:
    out_l, in_m, out_k, in_n, rank = shape
    torch.manual_seed(out_k)

    def make(s: int) -> tuple[ModuleOperators, torch.Tensor]:
        w1 = random(out_l, in_m)
        factors = None if rank is None else (random(out_k, rank), random(rank, in_n))
        w2 = random(out_k, in_n) if factors is None else factors[0] @ factors[1]
        dense = torch.kron(w1.double(), w2.double())
        return ModuleOperators(kronecker=Kronecker(w1, w2 if factors is None else factors)), dense

    size = (out_l * out_k, in_m * in_n)
    check(ProjectionLayout(1, {"g": (SliceShape("0", *size), SliceShape("1", *size))}), make)
