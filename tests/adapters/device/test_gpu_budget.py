"""The memory of adapters on the GPU path, counted on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from builders.adapters import tiny_llama
from builders.facts import resident
from builders.operators import Make, every_operator, everywhere, hadamard, low_rank
from said import says

from turret.server.adapters.device import ExpertShape
from turret.server.adapters.device.gpu_slot_tables import GpuSlotTables
from turret.server.adapters.device.gpu_store import GpuStore
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.low_rank import ExpertLowRank
from turret.server.adapters.operators.sparse import Sparse
from turret.server.errors import BudgetExceededError
from turret.server.models.describe import describe_projections
from turret.server.models.families import read_arch

META = torch.device("meta")
ARCH = read_arch(tiny_llama().config)
EXPERTS = {"experts_down": ExpertShape("mlp.experts.down_proj", 4, 64, 24)}
LAYOUT = replace(describe_projections(ARCH), experts=EXPERTS)


def adapter(make: Make) -> AdapterOperators:
    """An adapter with the operator on every module."""
    return everywhere(ARCH, lambda out, inner: ModuleOperators(make(out, inner, torch.float32)))


def every_kind() -> dict[str, AdapterOperators]:
    experts = {
        LAYOUT.module(1, "mlp.experts.down_proj"): ExpertLowRank(
            torch.randn(4, 3, 24), torch.randn(4, 3, 64)
        )
    }
    return {
        **every_operator(ARCH, torch.float32),
        **{f"hadamard {rank}": adapter(hadamard(rank)) for rank in (1, 3, 8)},
        "low rank 24": adapter(low_rank(24)),
        "experts": AdapterOperators({}, experts=experts),
    }


def tensors_in(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that an object reaches through attributes and containers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    parts: list[object] = []
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    elif type(value).__module__.startswith("turret."):
        names = list(getattr(value, "__dict__", ()))
        names += [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [getattr(value, name) for name in names if hasattr(value, name)]
    for part in parts:
        yield from tensors_in(part, seen)


def bytes_on_device(store: GpuStore) -> int:
    """The bytes of the storages that a store holds on a device, each counted once."""
    found = [tensor for tensor in tensors_in(store, set()) if tensor.device == META]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in found}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.fixture(autouse=True)
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GpuSlotTables, "compile", lambda *_: None)


@pytest.mark.parametrize("budget", [3 << 20, 8 << 20, 32 << 20])
def test_adapters_of_every_kind_keep_to_the_budget(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The shape of a sparse update depends on its values, which meta tensors do not have.
    monkeypatch.setattr(Sparse, "prepare", lambda self: None)
    store = GpuStore(LAYOUT, torch.float32, META, budget)
    empty = bytes_on_device(store)
    assert empty <= budget
    assert empty + store.later_bytes <= budget + budget // 8, "of which an eighth is for copies"
    fullest = 0
    for number in range(6):
        for key, operators in every_kind().items():
            try:
                store.admit(operators)
            except BudgetExceededError:
                continue
            store.prepare([resident(f"{key} {number}", operators)])
            held = bytes_on_device(store)
            assert held <= budget
            fullest = max(fullest, held)
    assert len(store._entries) > 1
    store.prepare([])
    store.drop_idle()
    assert bytes_on_device(store) == empty
    assert fullest > 0.8 * budget


def test_an_adapter_that_can_never_fit_is_refused_as_it_is_loaded() -> None:
    store = GpuStore(LAYOUT, torch.float32, META, 1 << 20)
    for make, rank in ((low_rank, 48), (hadamard, 9)):
        store.admit(adapter(make(rank)))
    for make in (low_rank(104), hadamard(40)):
        with pytest.raises(BudgetExceededError, check=says("OVER_DEVICE_MEMORY")):
            store.admit(adapter(make))
