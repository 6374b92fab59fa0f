"""Adapters of whole matrices: rejected unless allowed, and counted against the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders.adapters import base_of, tiny_llama
from builders.methods import make_config, save_adapter
from method_oracle import prompt_of, twin
from said import says
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.adapter import Source
from turret.server.adapters.base import Allowed
from turret.server.adapters.residency.loader import AdapterLoader
from turret.server.errors import BudgetExceededError

# Methods and changes to their configs; each adapts two modules in both layers.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "FOURIERFT": ("fourierft", {}),
    "RANDLORA": ("randlora", {}),
    "OSF": ("osf", {}),
    "FROD": ("frod", {}),
    "MISS": ("miss", {"init_weights": "bat"}),
}
TARGETS = {"target_modules": ["gate_proj", "up_proj"]}
# Two modules in two layers, 64 -> 128, in fp32.
NEEDED = 2 * 2 * 64 * 128 * 4


def loader(
    root: Path, kind: str, host_bytes: int = 1 << 30, allowed: Allowed | None = None
) -> AdapterLoader:
    method, changes = KINDS[kind]
    save_adapter(tiny_llama(), make_config(method, **TARGETS, **changes), root / "a")
    base = base_of(tiny_llama())
    if allowed is None:
        return AdapterLoader(root, base, host_bytes, 128)
    return AdapterLoader(root, base, host_bytes, 128, allowed=allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_adapters_are_refused_with_the_flag_and_their_size(kind: str, tmp_path: Path) -> None:
    reader = loader(tmp_path, kind)
    with pytest.raises(BudgetExceededError) as caught:
        reader.lower(reader.read(Source("a")))
    assert says("DENSE_NOT_ALLOWED", method=kind, flag="--allow-dense-adapters")(caught.value)
    assert caught.value.metadata["bytes"] == str(NEEDED)


@pytest.mark.parametrize("kind", KINDS)
def test_allowed_dense_adapters_report_their_size(kind: str, tmp_path: Path) -> None:
    reader = loader(tmp_path, kind, allowed=Allowed(dense=True))
    loaded = reader.lower(reader.read(Source("a")))
    assert loaded.operators.num_bytes == loaded.facts.bytes_host == NEEDED
    warnings: Any = loaded.facts.warnings
    assert [t.params for t in warnings if t.reason == "LARGE_UPDATES"] == [{"bytes": NEEDED}]


def test_dense_updates_over_the_host_budget_are_never_built(
    tmp_path: Path, monkeypatch: Any
) -> None:
    reader = loader(tmp_path, "FOURIERFT", NEEDED - 1, Allowed(dense=True))
    monkeypatch.setattr("torch.fft.ifft2", lambda *_: pytest.fail("it was made"))
    with pytest.raises(BudgetExceededError, check=says("OVER_HOST_MEMORY", bytes=NEEDED)):
        reader.lower(reader.read(Source("a")))


def test_low_rank_factors_need_no_permission(tmp_path: Path) -> None:
    save_adapter(tiny_llama(), make_config("miss", **TARGETS), tmp_path / "a")
    reader = AdapterLoader(tmp_path, base_of(tiny_llama()), 1 << 30, 128)
    loaded = reader.lower(reader.read(Source("a")))
    warnings: Any = loaded.facts.warnings
    assert "LARGE_UPDATES" not in [warning.reason for warning in warnings]


async def test_dense_adapters_count_against_the_device_budget(tmp_path: Path) -> None:
    base = twin("qwen2")
    for name in ("first", "second"):
        config = make_config("fourierft", target_modules=["q_proj"])
        save_adapter(base.model, config, tmp_path / name, seed=len(name))
    async with EngineHarness.start(base.folder, tmp_path, adapters=["first", "second"]) as harness:
        needed = harness.registry.get("first").facts.bytes_host
        assert needed > 1 << 12
    budget = needed + needed // 2
    async with EngineHarness.start(
        base.folder, tmp_path, adapters=["first", "second"], adapter_device_bytes=budget
    ) as harness:
        requests = [make_request(prompt_of(5), name) for name in ("first", "second")]
        answers = await harness.run_all(requests)
        assert answers[0].token_ids != answers[1].token_ids
        on_device = [harness.registry.get(name).bytes_device for name in ("first", "second")]
        assert sorted(on_device) == [0, needed]
    async with EngineHarness.start(
        base.folder, tmp_path, adapter_device_bytes=needed // 2
    ) as harness:
        with pytest.raises(BudgetExceededError, check=says("OVER_DEVICE_MEMORY", bytes=needed)):
            harness.registry.load("first", "first")
