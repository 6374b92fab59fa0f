"""Gated adapters as kernels, in Triton's interpreter: every row against float64.

Planted faults, and how many of the tests here each one fails (tried by hand):

- no weight: 2
- no component gated: 2
- components not moved to their bounds: 2
- another slice's keys: 2
- queries of other rows: 2
- expand without the gates: 2
- only the first run of a fusion: 2

That every slice has the ranks of the first fails none: the factors past a slice's own are zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders.mixes.gates import (
    INNER,
    LAYOUT,
    MIXES,
    WIDTH,
    gates_of,
    given_of,
    in_float64,
    operators_of,
    rows_of,
)
from gpu_path import OneStepTables, use_coarse_tiles
from kernel_traffic import DEVICE, error_ratio

from turret.kernels.gpu.shared import tuning as tuning_module
from turret.server.adapters.device.gpu.gates import GpuGates
from turret.server.adapters.device.members import Members
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators

NUM_ROWS = 24


@pytest.fixture(autouse=True)
def coarse_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_coarse_tiles(monkeypatch)
    yield
    monkeypatch.undo()
    tuning_module.tuning.cache_clear()


def tables() -> OneStepTables:
    return OneStepTables(NUM_ROWS, DEVICE)


def held_of(dtype: torch.dtype, gates) -> GpuGates:
    held = GpuGates(LAYOUT, dtype, DEVICE)
    for key, modules in gates.items():
        moved = {n: g.with_tensors(t.to(DEVICE) for t in g.tensors()) for n, g in modules.items()}
        held.insert(key, operators_of(moved))
    return held


def runs_of() -> list[tuple[int, int, Members]]:
    """One row each, but for two segments; rows past it are nobody's."""
    single = [(row, row + 1, MIXES[row % len(MIXES)]) for row in range(10)]
    return [*single, (10, 15, MIXES[5]), (15, 18, MIXES[7]), (18, 20, MIXES[10])]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_rows_get_the_formula(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(3)
    gates = gates_of(dtype)
    held = held_of(dtype, gates)
    x = torch.randn(NUM_ROWS, INNER).to(DEVICE, dtype)
    y = torch.randn(NUM_ROWS, WIDTH).to(DEVICE, dtype)
    found = y.clone()
    given = given_of(NUM_ROWS)
    told = {key: values.to(DEVICE) for key, values in given.items()}
    bound_fusions = held.bind(runs_of(), tables(), told)
    assert bound_fusions.signature == ("a", "b", "c", "d", "e", "f")
    bound_fusions.apply(0, "qkv", x, found)
    for start, end, mix in runs_of():
        rows = slice(start, end)
        if mix == MIXES[4]:
            assert torch.equal(found[rows], y[rows])
            continue
        exact = in_float64(gates, mix, x[rows].cpu(), y[rows].cpu(), rows_of(given, rows))
        assert error_ratio(found[rows].cpu(), exact) < bound, mix
        # What it adds, too, and not only beside a large base result.
        change = found[rows].cpu().double() - y[rows].cpu().double()
        assert error_ratio(change, exact - y[rows].cpu().double()) < 10 * bound, mix
    assert torch.equal(found[20:], y[20:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    """Not in the interpreter: numpy's products round a row by its place."""
    torch.manual_seed(4)
    gates = gates_of(torch.float32)
    held = held_of(torch.float32, gates)
    x, y = torch.randn(NUM_ROWS, INNER).to(DEVICE), torch.randn(NUM_ROWS, WIDTH).to(DEVICE)
    found = y.clone()
    given = {key: values.to(DEVICE) for key, values in given_of(NUM_ROWS).items()}
    held.bind(runs_of(), tables(), given).apply(0, "qkv", x, found)
    for row in (0, 3, 5, 9, 12, 19):
        mix = next(mix for start, end, mix in runs_of() if start <= row < end)
        alone = y[row : row + 1].clone()
        own = rows_of(given, slice(row, row + 1))
        held.bind([(0, 1, mix)], tables(), own).apply(0, "qkv", x[row : row + 1], alone)
        assert torch.equal(alone[0], found[row]), row


def test_adapters_without_gates_and_removed_ones_are_passed_over() -> None:
    held = held_of(torch.float32, gates_of(torch.float32))
    held.insert("plain", AdapterOperators({"model.layers.0.q": ModuleOperators()}))
    assert held.bind([(0, 1, (("plain", 1.0),))], tables(), {}).runs == ()
    before = held.addresses()
    held.remove("b")
    held.remove("never there")
    assert held.bind([(0, 1, MIXES[1])], tables(), {}).runs == ()
    assert held.addresses() != before


def test_a_fusion_that_comes_back_elsewhere_is_noticed() -> None:
    """Whichever of its tensors moved: a captured graph reads all of them."""
    held = held_of(torch.float32, gates_of(torch.float32))
    before = held.addresses()
    assert held.addresses() == before
    for key, names in (("a", ("keys", "query")), ("d", ("prototypes",))):
        fusion = held._fusions[key]
        place, gated = next(iter(fusion.places.items()))
        moved = [dataclasses.replace(fusion, gated=fusion.gated.clone())]
        scores = [
            dataclasses.replace(gated.score, **{name: getattr(gated.score, name).clone()})
            for name in names
        ]
        changes: list[dict[str, Any]] = [{"score": score} for score in scores]
        changes += [{name: getattr(gated, name).clone()} for name in ("a", "slice_ranks")]
        changes.append({"b": (*gated.b[:-1], gated.b[-1].clone())})
        for change in changes:
            changed = dataclasses.replace(gated, **change)
            moved.append(dataclasses.replace(fusion, places={**fusion.places, place: changed}))
        for other in moved:
            held._fusions[key] = other
            assert held.addresses() != before
        held._fusions[key] = fusion
        assert held.addresses() == before
