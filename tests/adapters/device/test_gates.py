"""Gated adapters on the torch path: a row has the same bits in any batch and kind of segment."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
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
from torch import Tensor

from turret.server.adapters.device.reference import Reference
from turret.server.adapters.device.store import StepMembers
from turret.server.adapters.operators.gate import Gate

NUM_ROWS = 90
# Gates do not use the base.
NO_BASE: Any = SimpleNamespace(part=lambda index: None)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def held_of(dtype: torch.dtype) -> tuple[Reference, dict[str, dict[str, Gate]]]:
    held, gates = Reference(LAYOUT, torch.device("cpu")), gates_of(dtype)
    for key, modules in gates.items():
        held.insert(key, operators_of(modules))
    return held, gates


def apply(held: Reference, members: StepMembers, x: Tensor, y: Tensor) -> Tensor:
    y = y.clone()
    bound = held.bind(members)
    assert bound is not None
    bound.apply(0, "qkv", x, y, NO_BASE)
    return y


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_keeps_its_bits_in_any_company(dtype: torch.dtype) -> None:
    held, _ = held_of(dtype)
    x, y = torch.randn(NUM_ROWS, INNER).to(dtype), torch.randn(NUM_ROWS, WIDTH).to(dtype)
    mixes = [MIXES[i % len(MIXES)] for i in range(NUM_ROWS)]
    given = given_of(NUM_ROWS)
    together = apply(held, StepMembers(short=mixes, long=[], given=given), x, y)
    for i in range(NUM_ROWS):
        if mixes[i] == (("other", 1.0),):
            assert torch.equal(together[i], y[i])
            continue
        row = slice(i, i + 1)
        own = StepMembers(short=[mixes[i]], long=[], given=rows_of(given, row))
        alone = apply(held, own, x[row], y[row])
        assert torch.equal(alone[0], together[i]), i
    for mix in (MIXES[0], MIXES[3], MIXES[5], MIXES[7], MIXES[10]):
        segment = StepMembers(short=[], long=[(5, 84, mix)], given=given)
        long = apply(held, segment, x, y)
        assert torch.equal(long[:5], y[:5])
        assert torch.equal(long[84:], y[84:])
        for i in (5, 6, 40, 83):
            row = slice(i, i + 1)
            own = StepMembers(short=[mix], long=[], given=rows_of(given, row))
            alone = apply(held, own, x[row], y[row])
            assert torch.equal(alone[0], long[i]), (mix, i)


def test_rows_get_the_formula() -> None:
    held, gates = held_of(torch.float32)
    x, y = torch.randn(3, INNER), torch.randn(3, WIDTH)
    for mix in (MIXES[3], *MIXES[6:]):
        given = given_of(3)
        found = apply(held, StepMembers(short=[mix] * 3, long=[], given=given), x, y)
        expected = in_float64(gates, mix, x, y, given)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_removed_adapter_is_gone() -> None:
    held, _ = held_of(torch.float32)
    members = StepMembers(short=[(("a", 1.0),)], long=[])
    assert held.bind(members) is not None
    held.remove("a")
    held.remove("never there")
    assert held.bind(members) is None
