"""Fusions and the registered adapters that they consist of: found by digest, kept, or rejected."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import edit_config, edit_tensors, read_adapter, tiny_llama
from builders.methods import make_config, save_adapter
from builders.mixes.fusions import PREFIX, save_fusion
from builders.registries import Waiter, in_thread, refs, stage_directory, tiny_base
from said import fields_of, says

from turret.server.adapters.adapter import AdapterInfo
from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import StateDir
from turret.server.errors import (
    AdapterChangedError,
    AdapterCheckpointError,
    AdapterComponentError,
    AdapterInUseError,
    AdapterMismatchError,
    BudgetExceededError,
    TurretError,
)

COMPONENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "a": ("lora", {"target_modules": ["q_proj", "v_proj"]}),
    "b": ("rslora", {"target_modules": ["v_proj", "down_proj"]}),
    "dora": ("dora", {}),
    "loha": ("loha", {"r": 3}),
    "lokr": ("lokr", {}),
    "ia3": ("ia3", {}),
    "bias": ("lora", {"lora_bias": True}),
    "prompt": ("prompt_tuning", {}),
    "prefix": ("prefix_tuning", {}),
}
TARGETS = ("q_proj", "v_proj", "down_proj")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All components, and the fusion ``f`` of a and b."""
    root = tmp_path_factory.mktemp("made")
    for seed, (name, (method, changes)) in enumerate(COMPONENTS.items()):
        save_adapter(tiny_llama(), make_config(method, **changes), root / name, seed=seed)
    save_fusion(tiny_llama(), root, "f", ("a", "b"), TARGETS)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


@pytest.fixture
def open_registry(root: Path) -> Iterator[Callable[..., AdapterRegistry]]:
    opened: list[AdapterRegistry] = []

    def make(load: str = "", **options: Any) -> AdapterRegistry:
        budget, rank = options.pop("host_bytes", 1 << 30), options.pop("max_rank", 64)
        registry = AdapterRegistry(root, tiny_base(), budget, rank, **options)
        opened.append(registry)
        for name in load:
            registry.load(name, name)
        return registry

    yield make
    for registry in opened:
        registry.close()


def refusal(call: Callable[[], object], kind: type[TurretError], status: str) -> TurretError:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.code.name == status
    return caught.value


def test_a_fusion_is_a_registered_adapter(open_registry: Any) -> None:
    record = open_registry("abf").get("f")
    assert (record.facts.method, record.facts.ranks) == ("learned_fusion", (4, 6))
    assert record.facts.target_modules == ("down_proj", "q_proj", "v_proj")
    assert record.residency == "host"
    assert record.facts.warnings == ()
    # The fusion holds its own tensors and padded copies of the components' factors.
    assert record.bytes_host > open_registry("ab").get("a").bytes_host


def test_missing_components_are_all_named(open_registry: Any, root: Path) -> None:
    registry = open_registry()
    error = refusal(lambda: registry.load("f", "f"), AdapterComponentError, "FAILED_PRECONDITION")
    assert fields_of(error) == ["components", "components"]
    digest = read_adapter(root, "b").digest
    assert says("COMPONENT_NOT_REGISTERED", component="a")(error)
    assert says("COMPONENT_NOT_REGISTERED", component="b", digest=digest)(error)
    assert [record.name for record in registry.list()] == []
    registry.load("a", "a")
    registry.load("b", "dora")
    error = refusal(lambda: registry.load("f", "f"), AdapterComponentError, "FAILED_PRECONDITION")
    assert len(error.violations) == 1
    wrong = read_adapter(root, "dora").digest
    assert says("COMPONENT_IS_OTHER", component="b", found=wrong)(error)


@pytest.mark.parametrize(
    ("component", "parts"),
    [
        ("dora", "gain"),
        ("loha", "hadamard"),
        ("lokr", "kronecker"),
        ("ia3", "gain, input gain"),
        ("bias", "bias"),
        ("prompt", "soft prompt"),
        ("prefix", "soft prompt"),
        ("f", None),
    ],
)
def test_components_that_cannot_be_fused_are_named(
    component: str, parts: str | None, open_registry: Any, root: Path
) -> None:
    save_fusion(tiny_llama(), root, "g", ("a", component), ("q_proj",))
    registry = open_registry("ab")
    registry.load(component, component)
    error = refusal(lambda: registry.load("g", "g"), AdapterCheckpointError, "INVALID_ARGUMENT")
    assert fields_of(error) == ["components"]
    ((_, text),) = error.violations
    assert text.params["component"] == component
    assert text.reason == ("NESTED_COMPONENT" if parts is None else "UNFIT_COMPONENT")
    assert parts is None or parts in text.params["why"]


_ZEROS = "0" * 64
# A value of the key, and its invalid part.
BAD_COMPONENTS: dict[str, tuple[Any, Any]] = {
    "one": ([{"name": "a", "digest": _ZEROS}], [{"name": "a", "digest": _ZEROS}]),
    "none": ([], []),
    "no list": ("a", "a"),
    "no object": (["a", "b"], "a"),
    "more keys": (
        [{"name": "a", "digest": _ZEROS, "weight": 1}] * 2,
        {"name": "a", "digest": _ZEROS, "weight": 1},
    ),
    "no digest": ([{"name": "a"}] * 2, {"name": "a"}),
    "bad digest": ([{"name": "a", "digest": "A" * 64}] * 2, "A" * 64),
    "bad name": ([{"name": "", "digest": _ZEROS}] * 2, ""),
    "twice": ([{"name": "a", "digest": _ZEROS}] * 2, _ZEROS),
}


@pytest.mark.parametrize("case", BAD_COMPONENTS)
def test_bad_components_are_refused(case: str, open_registry: Any, root: Path) -> None:
    value, wrong = BAD_COMPONENTS[case]
    edit_config(root / "f", components=value)
    error = refusal(lambda: open_registry("abf"), AdapterCheckpointError, "INVALID_ARGUMENT")
    ((field, why),) = error.violations
    reason = "DUPLICATE" if case == "twice" else "INVALID_VALUE"
    assert field == "components"
    assert says(reason, value=wrong)(why)


def test_every_invalid_key_and_tensor_is_reported_at_once(open_registry: Any, root: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{PREFIX}{Q}.fusion_key.weight"]
        key = f"{PREFIX}model.layers.1.self_attn.v_proj.fusion_query.weight"
        tensors[key] = tensors[key][:5].clone()
        tensors[f"{PREFIX}{Q}.fusion_value.weight"] = torch.ones(8, 8)
        tensors["base_model.model.model.layers.1.self_attn.o_proj.fusion_query.weight"] = (
            torch.ones(8, 64)
        )

    edit_tensors(root / "f", edit)
    components = read_adapter(root, "f").config["components"]
    edit_config(root / "f", components=..., temperature=2.0, layers_to_transform="x")
    registry = open_registry("ab")
    error = refusal(lambda: registry.load("f", "f"), AdapterCheckpointError, "INVALID_ARGUMENT")
    assert {"components", "temperature", "layers_to_transform", f"{Q}.fusion_value.weight"} <= set(
        fields_of(error)
    )
    edit_config(root / "f", components=components, temperature=..., layers_to_transform=None)
    error = refusal(lambda: registry.load("f", "f"), AdapterCheckpointError, "INVALID_ARGUMENT")
    assert set(fields_of(error)) == {
        f"{Q}.fusion_value.weight",
        f"{Q}.fusion_key.weight",
        "model.layers.1.self_attn.v_proj.fusion_query.weight",
        # The config omits this module, so its other missing tensors are not reported.
        "model.layers.1.self_attn.o_proj.fusion_query.weight",
    }


def test_a_module_that_no_component_adapts_is_refused(open_registry: Any, root: Path) -> None:
    save_fusion(tiny_llama(), root, "g", ("a", "b"), ("q_proj", "up_proj"))
    registry = open_registry("ab")
    error = refusal(lambda: registry.load("g", "g"), AdapterCheckpointError, "INVALID_ARGUMENT")
    assert fields_of(error) == [
        f"model.layers.{layer}.mlp.up_proj.fusion_query.weight" for layer in (0, 1)
    ]


def test_a_fusion_for_another_base_is_a_mismatch(open_registry: Any, root: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        key = f"{PREFIX}{Q}.fusion_query.weight"
        tensors[key] = torch.ones(8, 65)

    edit_tensors(root / "f", widen)
    registry = open_registry("ab")
    error = refusal(lambda: registry.load("f", "f"), AdapterMismatchError, "FAILED_PRECONDITION")
    assert fields_of(error) == [f"{Q}.fusion_query.weight"]


def test_d_k_counts_as_a_rank(open_registry: Any) -> None:
    registry = open_registry("ab", max_rank=7)
    error = refusal(lambda: registry.load("f", "f"), BudgetExceededError, "RESOURCE_EXHAUSTED")
    assert says("RANK_OVER_LIMIT", name="d_k", rank=8)(error)


@pytest.mark.parametrize("mode", ["DRAIN", "FORCE"])
def test_a_component_cannot_be_unloaded_before_its_fusion(mode: Any, open_registry: Any) -> None:
    registry = open_registry("abf")
    for call in (lambda: registry.unload("a", mode), lambda: registry.replace("a", "dora")):
        error = refusal(call, AdapterInUseError, "FAILED_PRECONDITION")
        assert says("ADAPTER_IS_COMPONENT", adapter="a", fusions="'f'")(error)
    # The component is still served, and changes that keep its content are allowed.
    registry.release(registry.acquire(refs("a")))
    assert registry.replace("a", "a").generation == 1
    # Another name for the same weights suffices.
    registry.load("twin", "a")
    registry.unload("a", mode)
    refusal(lambda: registry.unload("twin", mode), AdapterInUseError, "FAILED_PRECONDITION")
    registry.unload("f", mode)
    registry.unload("twin", mode)
    registry.replace("b", "dora")


def test_a_replaced_fusion_frees_its_components(open_registry: Any, root: Path) -> None:
    save_adapter(tiny_llama(), make_config("lora", target_modules=["q_proj"]), root / "c", seed=50)
    save_fusion(tiny_llama(), root, "g", ("a", "c"), ("q_proj",))
    registry = open_registry("abcf")
    mix = registry.acquire(refs("f"))
    assert registry.replace("f", "g").generation == 2
    # A request still runs on the generation that uses b.
    refusal(lambda: registry.unload("b"), AdapterInUseError, "FAILED_PRECONDITION")
    registry.release(mix)
    registry.unload("b")
    refusal(lambda: registry.unload("c"), AdapterInUseError, "FAILED_PRECONDITION")


def test_an_evicted_fusion_is_read_again_with_its_components(
    open_registry: Any, root: Path
) -> None:
    size = open_registry("abf").get("f").bytes_host
    registry = open_registry("abf", host_bytes=size + 100)
    first = registry.acquire(refs("a"))
    assert Waiter(first).wait().error is None
    assert registry.get("f").residency == "disk"
    registry.release(first)
    mix = registry.acquire(refs("f"))
    assert Waiter(mix).wait().error is None
    assert registry.get("f").residency == "host"
    registry.release(mix)
    # The component's files have changed, so its digest no longer matches.
    again = registry.acquire(refs("a"))
    assert Waiter(again).wait().error is None
    registry.release(again)
    assert registry.get("f").residency == "disk"
    edit_config(root / "b", lora_dropout=0.25)
    late = registry.acquire(refs("f"))
    assert isinstance(Waiter(late).wait().error, AdapterChangedError)
    registry.release(late)


def test_a_fusion_survives_a_restart(open_registry: Any, tmp_path: Path, root: Path) -> None:
    state = StateDir(tmp_path / "state", 1 << 24)
    registry = open_registry("ab", state=state)
    staged = stage_directory(registry, root / "f")
    registry.upload("f", staged, pinned=True)
    with registry.export("f") as export:
        names = [file.name for file in export.files]
        content = b"".join(data for _, data in export.chunks())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert content == b"".join((root / "f" / name).read_bytes() for name in names)
    registry.close()
    restored = open_registry(state=StateDir(tmp_path / "state", 1 << 24))
    assert restored.restore() == 3
    assert restored.get("f").residency == "host"
    refusal(lambda: restored.unload("a"), AdapterInUseError, "FAILED_PRECONDITION")


def test_components_stay_while_a_fusion_of_them_is_loading(open_registry: Any) -> None:
    registry = open_registry("ab")
    lower, entered, proceed = registry._loader.lower, threading.Event(), threading.Event()

    def slow(checkpoint: Any) -> Any:
        entered.set()
        assert proceed.wait(10)
        return lower(checkpoint)

    registry._loader.lower = slow
    thread, results = in_thread(lambda: registry.load("f", "f"))
    assert entered.wait(10)
    error = refusal(lambda: registry.unload("a"), AdapterInUseError, "FAILED_PRECONDITION")
    assert says("ADAPTER_IS_COMPONENT", adapter="a")(error)
    refusal(lambda: registry.replace("b", "dora"), AdapterInUseError, "FAILED_PRECONDITION")
    proceed.set()
    thread.join(10)
    (loaded,) = results
    assert isinstance(loaded, AdapterInfo), loaded
    assert loaded.facts.method == "learned_fusion"


def test_a_component_that_is_being_unloaded_cannot_be_fused(open_registry: Any) -> None:
    registry = open_registry("ab")
    mix = registry.acquire(refs("a"))
    thread, results = in_thread(lambda: registry.unload("a", timeout_seconds=10.0))
    while registry.get("a").state != "DELETING":
        pass
    error = refusal(lambda: registry.load("f", "f"), AdapterComponentError, "FAILED_PRECONDITION")
    assert says("COMPONENT_LEAVING", component="a")(error)
    registry.release(mix)
    thread.join(10)
    assert results == [None]
