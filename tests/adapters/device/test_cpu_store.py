"""The store of the CPU path reuses a step's tables as long as rows and adapters stay the same."""

from __future__ import annotations

import pytest
import torch
from builders.facts import Resident, resident

from turret.kernels.cpu import library
from turret.server.adapters.device import ProjectionLayout, SliceShape, StepMembers
from turret.server.adapters.device.cpu import CpuStore
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.low_rank import LowRank, piece_sums
from turret.server.models.decoding.adapted_linear import AdaptedLinear

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")

SIZE = 64
CPU = torch.device("cpu")
LAYOUT = ProjectionLayout(1, {"o": (SliceShape("o_proj", SIZE, SIZE),)})


def low_rank(key: str) -> Resident:
    a, b = torch.randn(4, SIZE).bfloat16(), torch.randn(4, SIZE).bfloat16()
    operators = ModuleOperators(low_rank=LowRank(a, b))
    return resident(key, AdapterOperators({LAYOUT.module(0, "o_proj"): operators}))


class Base:
    def __call__(self, x: torch.Tensor, ahead: object = None) -> torch.Tensor:
        return torch.zeros(x.shape[0], SIZE, dtype=torch.bfloat16)


def members(*rows: tuple[str, float]) -> StepMembers:
    return StepMembers(short=[[row] for row in rows], long=[])


def update(store: CpuStore, x: torch.Tensor, step: StepMembers) -> torch.Tensor:
    return AdaptedLinear(0, "o", Base(), None)(x, store.step(step))  # type: ignore[arg-type]


def expected(adapter: Resident, x: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    (operators,) = adapter.operators.modules.values()
    factors = operators.low_rank
    assert factors is not None
    return weight * (x.float() @ factors.a.float().T) @ factors.b.float()


@pytest.fixture
def store() -> CpuStore:
    return CpuStore(LAYOUT, torch.bfloat16, CPU, 1 << 30)


def test_a_step_is_reused_for_the_same_rows_and_adapters(store: CpuStore) -> None:
    one, two = low_rank("one"), low_rank("two")
    store.prepare([one, two])
    x = torch.randn(2, SIZE).bfloat16()
    first = store.step(members(("one", 1.0), ("two", 0.5)))
    before = update(store, x, members(("one", 1.0), ("two", 0.5)))
    assert store.step(members(("one", 1.0), ("two", 0.5))) is first
    assert torch.equal(update(store, x, members(("one", 1.0), ("two", 0.5))), before)
    torch.testing.assert_close(before[1].float(), expected(two, x[1], 0.5), rtol=0.01, atol=0.01)
    # These steps differ from the first one in the rows, the order or a weight.
    for other in (members(("one", 1.0)), members(("two", 0.5), ("one", 1.0))):
        assert store.step(other) is not first
    found = update(store, x, members(("one", 1.0), ("two", 0.25)))
    torch.testing.assert_close(found[1].float(), expected(two, x[1], 0.25), rtol=0.01, atol=0.01)


def test_an_adapter_that_is_loaded_again_is_not_confused_with_its_predecessor(
    store: CpuStore,
) -> None:
    """The adapter is unloaded and loaded again, or evicted from host memory and read again."""
    x = torch.randn(1, SIZE).bfloat16()
    for is_dropped in (True, False):
        adapter = low_rank("one")
        store.prepare([adapter])
        update(store, x, members(("one", 1.0)))
        adapter.operators = low_rank("one").operators
        if is_dropped:
            store.drop("one")
        store.prepare([adapter])
        found = update(store, x, members(("one", 1.0)))
        torch.testing.assert_close(found.float(), expected(adapter, x), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("rank", [1, 5, 16, 40])
def test_factors_that_only_sum_inputs_are_not_read(store: CpuStore, rank: int) -> None:
    """The factors are those of MiSS; a factor that differs in a single element is read."""
    x = torch.randn(3, SIZE).bfloat16()
    for key, is_other in (("sums", False), ("other", True)):
        a, b = piece_sums(rank, SIZE, torch.bfloat16), torch.randn(rank, SIZE).bfloat16()
        if is_other:
            a[-1, -1] += 1
        module = ModuleOperators(low_rank=LowRank(a, b))
        adapter = resident(key, AdapterOperators({LAYOUT.module(0, "o_proj"): module}))
        store.prepare([adapter])
        like = expected(adapter, x, 0.5)
        if not is_other:
            a.fill_(float("nan"))
        found = update(store, x, members(*[(key, 0.5)] * 3))
        torch.testing.assert_close(found.float(), like, rtol=0.02, atol=0.02)
