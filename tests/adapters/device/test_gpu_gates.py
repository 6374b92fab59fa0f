"""Gated adapters in the pack of the GPU path, in Triton's interpreter, compared with float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from builders.facts import Resident, resident
from builders.mixes.gates import (
    INNER,
    LAYOUT,
    MIXES,
    OUTS,
    WIDTH,
    gates_of,
    in_float64,
    operators_of,
    rows_of,
    scalings_of,
)
from gpu_path import OneStepTables
from kernel_traffic import DEVICE, error_ratio
from torch import Tensor

from turret.kernels.gpu.low_rank import Shrink
from turret.server.adapters.device import Members
from turret.server.adapters.device.gpu_store import GpuStore
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.gate import Gate
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.low_rank import LowRank

pytestmark = pytest.mark.usefixtures("coarse_tiles")
NUM_ROWS = 24
# An adapter without gates, in some of the mixes.
OTHER = AdapterOperators({"model.layers.0.q": ModuleOperators()})


class Base:
    """A stand-in for the base's projection, with known results for the step's rows.

    A slice returns the first columns of whatever input it is called with.
    """

    takes_own_inputs = False

    def __init__(self, y: Tensor) -> None:
        self._y = y

    def __call__(self, x: Tensor, ahead: object = None) -> Tensor:
        return self._y.clone()

    def part(self, index: int) -> Any:
        return _Part([*OUTS.values()][index])

    def with_shrink(self, x: Tensor, shrink: Shrink) -> tuple[Tensor, Tensor]:
        return self(x), shrink(x)


class _Part:
    """A slice of the base."""

    def __init__(self, width: int) -> None:
        self._width = width

    def alone(self, *, is_decode: bool) -> _Part:
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return x[:, : self._width].contiguous()


Gates = Mapping[str, Mapping[str, Gate]]


def adapters_of(gates: Gates) -> dict[str, Resident]:
    found = {key: resident(key, operators_of(dict(modules))) for key, modules in gates.items()}
    return {**found, "other": resident("other", OTHER)}


def store_of(dtype: torch.dtype, adapters: Mapping[str, Resident]) -> GpuStore:
    store = GpuStore(LAYOUT, dtype, DEVICE, 1 << 22)
    store.prepare(adapters.values())
    return store


def project(
    store: GpuStore,
    runs: Sequence[tuple[int, int, Members]],
    x: Tensor,
    y: Tensor,
    scalings: Mapping[str, Tensor] | None = None,
) -> Tensor:
    step = store.bind(runs, OneStepTables(NUM_ROWS, DEVICE), scalings or {})
    base: Any = Base(y)
    return step.project(0, "qkv", x, bias=None, base=base)


def runs_of() -> list[tuple[int, int, Members]]:
    """Runs of one row each, except for two segments; later rows belong to no run."""
    single = [(row, row + 1, MIXES[row % len(MIXES)]) for row in range(10)]
    return [*single, (10, 15, MIXES[5]), (15, 18, MIXES[7]), (18, 20, MIXES[10])]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_rows_match_the_formula(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(3)
    gates = gates_of(dtype)
    store = store_of(dtype, adapters_of(gates))
    x = torch.randn(NUM_ROWS, INNER).to(DEVICE, dtype)
    y = torch.randn(NUM_ROWS, WIDTH).to(DEVICE, dtype)
    scalings = scalings_of(NUM_ROWS)
    told = {key: values.to(DEVICE) for key, values in scalings.items()}
    found = project(store, runs_of(), x, y, told)
    for start, end, mix in runs_of():
        rows = slice(start, end)
        # The adapter of this mix has no operators, so it changes nothing.
        if mix == MIXES[4]:
            assert torch.equal(found[rows], y[rows])
            continue
        exact = in_float64(gates, mix, x[rows].cpu(), y[rows].cpu(), rows_of(scalings, rows))
        assert error_ratio(found[rows].cpu(), exact) < bound, mix
        # Compare the change as well, because the base result is large.
        change = found[rows].cpu().double() - y[rows].cpu().double()
        assert error_ratio(change, exact - y[rows].cpu().double()) < 10 * bound, mix
    assert torch.equal(found[20:], y[20:])


def test_a_row_has_the_bits_that_it_has_alone() -> None:
    """The mixes are of three fusions, two routers and an adapter with gates from a first pass."""
    torch.manual_seed(4)
    store = store_of(torch.float16, adapters_of(gates_of(torch.float16)))
    x = torch.randn(NUM_ROWS, INNER).to(DEVICE, torch.float16)
    y = torch.randn(NUM_ROWS, WIDTH).to(DEVICE, torch.float16)
    scalings = {key: values.to(DEVICE) for key, values in scalings_of(NUM_ROWS).items()}
    runs = [(row, row + 1, mix) for row, mix in enumerate(MIXES)]
    together = project(store, runs, x, y, scalings)
    for row, _, mix in runs:
        one, own = slice(row, row + 1), rows_of(scalings, slice(row, row + 1))
        alone = project(store, [(0, 1, mix)], x[one], y[one], own)
        assert torch.equal(alone[0], together[row]), mix
        with_base = project(
            store,
            [(0, 1, ()), (1, 2, mix)],
            x[[0, row]],
            y[[0, row]],
            {key: values[[0, row]] for key, values in scalings.items()},
        )
        assert torch.equal(with_base[1], together[row]), mix
    assert not torch.equal(together[0], together[1])


def without_gates(dtype: torch.dtype) -> dict[str, Resident]:
    """Adapters with low-rank updates, gains and biases, which the pack has in tables by slot."""

    def module(out: int) -> ModuleOperators:
        return ModuleOperators(
            low_rank=LowRank(torch.randn(8, INNER, dtype=dtype), torch.randn(8, out, dtype=dtype)),
            gain=1 + torch.rand(out),
            bias=torch.randn(out),
        )

    made = {f"gain {n}": {m: module(out) for m, out in OUTS.items()} for n in range(14)}
    return {
        key: resident(
            key, AdapterOperators({f"model.layers.0.{m}": ops for m, ops in modules.items()})
        )
        for key, modules in made.items()
    }


def test_a_reused_slot_gives_the_same_results() -> None:
    """The slots and ranks of the adapters held other adapters' factors, gains and biases before."""
    torch.manual_seed(6)
    adapters = adapters_of(gates_of(torch.float32))
    x, y = torch.randn(5, INNER, device=DEVICE), torch.randn(5, WIDTH, device=DEVICE)
    fresh, used = store_of(torch.float32, adapters), store_of(torch.float32, {})
    others = without_gates(torch.float32)
    used.prepare(others.values())
    before = {place.slot for place in used._pack.places.values()}
    # Because of the adapters that stay, the kernels read the tables for every row of the batch.
    stay = ("gain 7", "gain 10")
    for key in others.keys() - set(stay):
        used.drop(key)
    used.prepare(adapters.values())
    own = [place.slot for key in "ab" if (place := used._pack.gates(key))]
    assert len(own) == 2
    assert set(own) <= before
    runs = [(0, 1, MIXES[0]), (1, 2, MIXES[3]), (2, 3, MIXES[5])]
    beside = [*runs, *((3 + n, 4 + n, ((key, 1.0),)) for n, key in enumerate(stay))]
    expected, found = project(fresh, runs, x, y), project(used, beside, x, y)
    assert torch.equal(found[:3], expected[:3])
    for row in range(3, 5):
        assert not torch.equal(found[row], y[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unused_parts_of_a_step_do_not_change_its_bits(dtype: torch.dtype) -> None:
    """A step may launch more kernels (``form``) than its rows need; these find empty tables."""
    torch.manual_seed(8)
    factors = (torch.randn(OUTS["q"], 4), torch.randn(4, INNER)) * 2
    hadamard = ModuleOperators(hadamard=Hadamard(*(f.to(DEVICE, dtype) for f in factors)))
    low = ModuleOperators(
        low_rank=LowRank(*(torch.randn(8, n).to(DEVICE, dtype) / 8 for n in (INNER, OUTS["k"])))
    )
    adapters = {
        **adapters_of(gates_of(dtype)),
        "gain 0": without_gates(dtype)["gain 0"],
        "loha": resident("loha", AdapterOperators({"model.layers.0.q": hadamard})),
        "low": resident("low", AdapterOperators({"model.layers.0.k": low})),
    }
    store = store_of(dtype, adapters)
    everything = store.form(((key, 1.0), ("loha", 0.5)) for key in adapters)
    x = torch.randn(3, INNER).to(DEVICE, dtype)
    y = torch.randn(3, WIDTH).to(DEVICE, dtype)
    base: Any = Base(y)
    for key in ("low", "gain 0", "loha", "a"):
        runs = [(0, 1, ()), (1, 3, ((key, 0.7),))]
        found = [
            store.bind(runs, OneStepTables(NUM_ROWS, DEVICE), form=form).project(
                0, "qkv", x, bias=None, base=base
            )
            for form in (None, everything)
        ]
        assert store.form(mix for _, _, mix in runs) < everything
        assert torch.equal(*found), key
        assert torch.equal(found[1][0], y[0]), "the base's row changed"
