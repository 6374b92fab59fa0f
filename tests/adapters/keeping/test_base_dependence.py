"""The adapters that a change of the base affects, and their fate in host memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders.adapters import base_of
from builders.methods import make_config, save_adapter
from builders.mixes.fusions import save_fusion
from builders.registries import Gate, Waiter, refs, until
from method_oracle import twin

from turret.server.adapters.adapter import Source
from turret.server.adapters.base import Allowed, BaseModel
from turret.server.adapters.component import ComponentRef
from turret.server.adapters.loader import AdapterLoader, LoadedAdapter
from turret.server.adapters.registry import AdapterRegistry

# Qwen2 has biases, which adapters may replace or scale.
ARCHITECTURE = "qwen2"
METHODS = (
    *("lora", "dora", "loha", "lokr", "ia3", "adalora", "vera"),
    *("prefix_tuning", "prompt_tuning", "p_tuning"),
)
VARIANTS = {
    **{method: (method, {}) for method in METHODS},
    "lora with biases": ("lora", {"bias": "lora_only"}),
    "adalora with biases": ("adalora", {"bias": "all"}),
    "vera with biases": ("vera", {"bias": "vera_only"}),
    "osf": ("osf", {}),
    "frod": ("frod", {}),
    "bat": ("miss", {"init_weights": "bat"}),
    "fourierft": ("fourierft", {}),
    "randlora": ("randlora", {}),
    "ia3 without biases": ("ia3", {"target_modules": ["o_proj"], "feedforward_modules": []}),
}
DEPENDENT = {"dora", "ia3", "lora with biases", "adalora with biases", "vera with biases"}
DEPENDENT |= {"osf", "frod", "bat"}
# Of these components, only KaSA depends on the base.
FUSIONS = {"plain-fusion": ("lora", "vera"), "kasa-fusion": ("lora", "kasa")}


def make_base(generation: int) -> BaseModel:
    """The modules of the test model; every generation has different weights and biases."""
    base = base_of(twin(ARCHITECTURE).model)

    def other(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * (1.0 + 0.1 * generation)

    modules = {
        path: dataclasses.replace(
            module,
            bias=None if module.bias is None else other(module.bias),
            dequantize=lambda module=module: other(module.dequantize()),
        )
        for path, module in base.modules.items()
    }
    sizes = {"num_layers": 2, "hidden_size": 128, "num_kv_heads": 2, "head_dim": 32}
    return dataclasses.replace(base, modules=modules, generation=generation, **sizes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for variant, (method, changes) in VARIANTS.items():
        config = make_config(method, **changes)
        save_adapter(twin(ARCHITECTURE).model, config, folder / variant)
    save_adapter(twin(ARCHITECTURE).model, make_config("kasa"), folder / "kasa")
    for name, components in FUSIONS.items():
        save_fusion(twin(ARCHITECTURE).model, folder, name, components, ["q_proj", "v_proj"])
    return folder


def no_source(ref: ComponentRef) -> Source:
    raise AssertionError(ref)


def tensors_of(loaded: LoadedAdapter) -> list[torch.Tensor]:
    prompt = loaded.operators.soft_prompt
    found = [t for module in loaded.operators.modules.values() for t in module.tensors()]
    return found + ([] if prompt is None else list(prompt.tensors()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_method_declares_whether_its_operators_depend_on_the_base(
    root: Path, variant: str
) -> None:
    """The operators for two bases differ if and only if the method declares it."""
    loaded = []
    for generation in (1, 2):
        loader = AdapterLoader(
            root,
            make_base(generation),
            1 << 30,
            64,
            find_source=no_source,
            allowed=Allowed(dense=True),
        )
        loaded.append(loader.lower(loader.read(Source(variant))))
    one, other = (tensors_of(each) for each in loaded)
    differs = any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert [each.base_generation for each in loaded] == ([1, 2] if differs else [None, None])
    assert differs == (variant in DEPENDENT)


def test_components_are_lowered_for_the_same_base_as_their_fusion(root: Path) -> None:
    """The served base changes between the reading of the fusion and that of its components."""

    def find_source(ref: ComponentRef) -> Source:
        if changes:
            loader.base = make_base(2)
        return Source(ref.name)

    loader = AdapterLoader(root, make_base(1), 1 << 30, 64, find_source=find_source)
    checkpoint = loader.read(Source("kasa-fusion"))
    changes = False
    expected = loader.lower(checkpoint)
    changes = True
    found = loader.lower(checkpoint)
    assert loader.base.generation == 2
    for one, other in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert torch.equal(one, other)


def test_components_of_a_fusion_are_reread_in_the_wanted_dtype(root: Path) -> None:
    base = make_base(1)
    served = dataclasses.replace(base, dtype=torch.bfloat16)
    loader = AdapterLoader(root, served, 1 << 30, 64, find_source=lambda ref: Source(ref.name))
    digest = loader.read(Source("plain-fusion")).digest
    lowered = loader.reread("plain-fusion", Source("plain-fusion"), digest, base)
    found = [t for module in lowered.operators.modules.values() for t in module.tensors()]
    assert {tensor.dtype for tensor in found} == {torch.float32}


@pytest.fixture
def registry(root: Path) -> Iterator[AdapterRegistry]:
    made = AdapterRegistry(root, make_base(1), 1 << 30, 64)
    for name in ("dora", "ia3", "lora"):
        made.load(name, name)
    yield made
    made.close()


def generation_of(registry: AdapterRegistry, name: str) -> int | None:
    return registry._table.find(name).current.base_generation


def residencies(registry: AdapterRegistry) -> dict[str, str]:
    return {record.name: record.residency for record in registry.list()}


def test_idle_adapters_of_another_base_are_dropped(registry: AdapterRegistry) -> None:
    keys = {name: registry._table.find(name).current.key for name in ("dora", "ia3")}
    used = registry.host_bytes_used
    change = registry.change_base(make_base(2))
    assert (change.generation, change.stale) == (2, frozenset(keys.values()))
    assert residencies(registry) == {"dora": "disk", "ia3": "disk", "lora": "host"}
    assert registry.host_bytes_used < used
    assert registry.base.generation == 2
    waiter = Waiter(registry.acquire(refs(["dora", "lora"])))
    assert not waiter.was_resident
    waiter.wait()
    assert (generation_of(registry, "dora"), generation_of(registry, "lora")) == (2, None)
    registry.release(waiter.mix)
    assert registry.change_base(make_base(3)).stale == {keys["dora"]}


def test_an_adapter_in_use_is_read_again_before_it_is_resident(
    registry: AdapterRegistry,
) -> None:
    """The request was told that the adapter is resident, and asks again after the change."""
    held = Waiter(registry.acquire(refs(["dora", "lora"])))
    assert held.was_resident
    used = registry.host_bytes_used
    gate = Gate(registry)
    registry.change_base(make_base(2))
    # An adapter that is read again keeps its space.
    assert registry.host_bytes_used == used - _bytes(registry, "ia3")
    again = Waiter(held.mix)
    late = Waiter(registry.acquire(refs(["dora"])))
    assert (again.was_resident, late.was_resident) == (False, False)
    gate.open()
    for waiter in (again, late):
        waiter.wait()
        registry.release(waiter.mix)
    assert gate.reads == ["dora"]
    assert generation_of(registry, "dora") == 2


def _bytes(registry: AdapterRegistry, name: str) -> int:
    return registry._table.find(name).current.host_bytes_needed


def test_a_request_released_during_the_change_leaves_nothing_behind(
    registry: AdapterRegistry,
) -> None:
    held = Waiter(registry.acquire(refs(["dora"])))
    gate = Gate(registry)
    registry.change_base(make_base(2))
    registry.release(held.mix)
    registry.unload("dora", "DRAIN", 0.0)
    gate.open()
    until(lambda: registry.host_bytes_used == _bytes(registry, "lora"))


def test_a_pinned_adapter_is_read_again_at_once(registry: AdapterRegistry) -> None:
    registry.pin("dora")
    gate = Gate(registry)
    registry.change_base(make_base(2))
    gate.entered.acquire()
    assert (registry.get("dora").pinned, residencies(registry)["dora"]) == (True, "disk")
    # The base changes during the read, so the read is useless.
    registry.change_base(make_base(3))
    gate.open()
    until(lambda: residencies(registry)["dora"] == "host")
    assert generation_of(registry, "dora") == 3
    assert registry.get("dora").pinned


def test_a_pinned_adapter_whose_files_are_gone_loses_its_pin(
    registry: AdapterRegistry, root: Path
) -> None:
    registry.pin("dora")
    (root / "dora").rename(root / "away")
    try:
        registry.change_base(make_base(2))
        until(lambda: not registry.get("dora").pinned)
        assert registry.host_bytes_used == _bytes(registry, "lora")
        assert Waiter(registry.acquire(refs(["lora"]))).was_resident
    finally:
        (root / "away").rename(root / "dora")


def test_a_load_overtaken_by_a_base_change_is_discarded(registry: AdapterRegistry) -> None:
    """The adapter is lowered for the old base, and registered after the change."""
    loader, lower = registry._loader, registry._loader.lower

    def overtaken(checkpoint: object) -> LoadedAdapter:
        loaded = lower(checkpoint)  # type: ignore[arg-type]
        registry.change_base(make_base(2))
        return loaded

    loader.lower = overtaken  # type: ignore[method-assign]
    registry.load("late", "dora")
    del loader.lower
    assert residencies(registry)["late"] == "disk"
    Waiter(registry.acquire(refs(["late"]))).wait()
    assert generation_of(registry, "late") == 2
