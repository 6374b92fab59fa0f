"""Arrow, served by the engine and compared with PEFT's routers."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import (
    base_of,
    edit_config,
    edit_tensors,
    linear_modules,
    lower_with_components,
    read_adapter,
    tiny_llama,
)
from builders.methods import ALL, drawing, make_config, quiet, save_adapter
from builders.mixes.gates import gated
from builders.mixes.routers import arrow_model, save_router, write_router
from builders.registries import tiny_base
from hypothesis import given
from hypothesis import strategies as st
from method_oracle import SumOfChanges, check_oracles, check_rounding, twin
from peft import ArrowConfig, LoraConfig
from peft.tuners.lora.layer import LoraLayer
from said import says
from torch import nn

from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.base import BaseModel
from turret.server.adapters.lowering import Lowered
from turret.server.adapters.methods import METHODS
from turret.server.adapters.operators.gate import Gate, PrototypeScore
from turret.server.adapters.registry import AdapterRegistry
from turret.server.errors import (
    AdapterCheckpointError,
    AdapterComponentError,
    AdapterInUseError,
    AdapterMismatchError,
    TurretError,
)

LORAS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"lora_alpha": 3},
    "three": {"use_rslora": True},
    "four": {},
    "five": {},
}
# Experts, general LoRAs, and PEFT's config.
ROUTERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]] = {
    "two-of-three": (("one", "two", "three"), (), {"router_temperature": 0.7}),
    "best": (("three", "one", "five", "four"), (), {"top_k": 1}),
    "all": (("one", "two"), (), {"router_temperature": 3.0, "rng_seed": 11}),
    "subtracted": (("one", "two", "three"), ("four", "five"), {"router_temperature": 0.5}),
    "of-one": (("two", "one"), ("four",), {"top_k": 1}),
}


def save_all(architecture: str, root: Path) -> None:
    model = twin(architecture).model
    for seed, (name, keys) in enumerate(LORAS.items()):
        save_adapter(model, make_config("lora", **keys), root / name, seed=seed)
    for name, (experts, general, keys) in ROUTERS.items():
        save_router(model, root, name, experts, general, **keys)


def oracle_of(model: nn.Module, root: Path, name: str) -> nn.Module:
    experts, general, keys = ROUTERS[name]
    return arrow_model(model, root, experts, general, **keys)


def weighted(model: nn.Module, weight: float) -> nn.Module:
    """Change the router's weight, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, leaf = path.rpartition(".")
            whole = SumOfChanges(module.get_base_layer(), [(module, weight, {})])
            setattr(model.get_submodule(parent), leaf, whole)
    return model


@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen2", marks=pytest.mark.long)])
async def test_scores_and_answers_match_peft(architecture: str, tmp_path: Path) -> None:
    save_all(architecture, tmp_path)
    base = twin(architecture)

    def oracles() -> Iterator[tuple[AdapterRef, nn.Module]]:
        for name in ROUTERS:
            yield AdapterRef(name=name), oracle_of(base.model, tmp_path, name)
        half = weighted(oracle_of(base.model, tmp_path, "two-of-three"), -0.6)
        yield AdapterRef(name="two-of-three", weight=-0.6), half

    await check_oracles(base, tmp_path, [*LORAS, *ROUTERS], oracles())


@pytest.mark.parametrize(
    "name", ["two-of-three", pytest.param("subtracted", marks=pytest.mark.long)]
)
async def test_bfloat16_is_as_close_as_peft_in_bfloat16(name: str, tmp_path: Path) -> None:
    base = twin("llama", torch.bfloat16)
    for seed, (lora, keys) in enumerate(LORAS.items()):
        save_adapter(
            base.model, make_config("lora", **keys), tmp_path / lora, seed=seed, strength=0.3
        )
    experts, general, keys = ROUTERS[name]
    save_router(base.model, tmp_path, name, experts, general, **keys)
    exact = oracle_of(base.model, tmp_path, name)
    # The adapters are served in bfloat16, too; PEFT would keep loaded ones in float32.
    rounded = copy.deepcopy(exact).bfloat16()
    await check_rounding(base, tmp_path, [*LORAS, name], exact, rounded)


# Arrow's routers: their operators, rejections, and the adapters that they keep registered.


EXAMPLES = 20
# Two kinds of experts, which are not mixed, because PEFT's routers need equal ranks and targets.
WIDE = {"target_modules": ALL, "r": 4}
NARROW = {"target_modules": ["q_proj", "down_proj"], "r": 3}
FILE_LORAS: dict[str, dict[str, Any]] = {
    **{f"wide-{i}": {**WIDE, "lora_alpha": 2 + i, "use_rslora": i == 2} for i in range(6)},
    **{f"narrow-{i}": {**NARROW, "lora_alpha": 5 - i} for i in range(4)},
}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRAs in float64, on a model with biases."""
    root = tmp_path_factory.mktemp("loras")
    for seed, (name, keys) in enumerate(FILE_LORAS.items()):
        save_adapter(model(), make_config("lora", **keys), root / name, seed=seed, share=True)
    return root


def model() -> Any:
    return tiny_llama(attention_bias=True, dtype=torch.float64)


def lower(root: Path, base: BaseModel) -> Lowered:
    others = (folder.name for folder in root.iterdir() if folder.name != "router")
    return lower_with_components(root, "router", base, others)


def gate_of(lowered: Lowered) -> Gate:
    gate = lowered.operators.modules[Q].get(Gate)
    assert gate is not None
    return gate


@torch.no_grad()
def check_modules(root: Path, experts: list[str], general: list[str], **keys: Any) -> float:
    """Compare every module's change with PEFT's; returns the largest change."""
    plain = model()
    oracle = save_router(plain, root, "router", experts, general, **keys)
    lowered = lower(root, base_of(plain))
    assert lowered.components == tuple(
        read_adapter(root, name).digest for name in (*experts, *general)
    )
    largest = 0.0
    for path, linear in linear_modules(plain).items():
        generator = torch.Generator().manual_seed(len(path))
        x = torch.randn(1, 5, linear.in_features, generator=generator, dtype=torch.float64)
        with quiet():
            expected = oracle.get_submodule(f"base_model.model.{path}")(x) - linear(x)
        operators = lowered.operators.modules.get(path)
        if operators is None:
            assert expected.abs().max() == 0, path
            continue
        gate = operators.get(Gate)
        assert gate is not None
        error = float((gated(gate, x[0]) - expected[0]).abs().max())
        # Prototypes are fp32, here and in PEFT, and the softmax amplifies their rounding errors.
        bound = 2e-6 / min(1.0, keys["router_temperature"])
        assert error < bound * float(expected.abs().max()), (path, error)
        largest = max(largest, float(expected.abs().max()))
    return largest


def test_drawn_routers_compute_what_peft_computes(made: Path) -> None:
    moved = []

    @drawing(EXAMPLES)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(["wide", "narrow"]))
        names = data.draw(st.permutations([name for name in FILE_LORAS if kind in name]))
        general = data.draw(st.integers(0, 2))
        experts = data.draw(st.integers(2, len(names) - general))
        keys = {
            "top_k": data.draw(st.integers(1, experts)),
            "router_temperature": data.draw(st.sampled_from([0.1, 0.7, 1.0, 4.0])),
            "rng_seed": data.draw(st.integers(0, 1 << 40)),
        }
        try:
            moved.append(check_modules(made, names[:experts], names[experts:][:general], **keys))
        finally:
            shutil.rmtree(made / "router", ignore_errors=True)

    check()
    assert len(moved) >= EXAMPLES
    assert min(moved) > 1e-3


def saved(made: Path, tmp_path: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def refusal(root: Path, kind: type[TurretError]) -> TurretError:
    with pytest.raises(kind) as caught:
        lower(root, base_of(model()))
    return caught.value


TWO = ["wide-0", "wide-1"]
# Changes of ``arrow_config`` and of the other keys, the reported key, and a check of the error.
ARROW = "arrow_config"
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str, Callable[[object], bool]]] = [
    ({"task_adapter_names": None}, {}, ARROW, says("INVALID_ENTRY", entry="task_adapter_names")),
    ({"task_adapter_names": [*TWO, TWO[0]]}, {}, ARROW, says("DUPLICATE", value=TWO[0])),
    ({"task_adapter_names": [*TWO, "x"]}, {}, ARROW, says("COMPONENT_UNLISTED", component="x")),
    (
        {"task_adapter_names": TWO[:1], "top_k": 1},
        {},
        "components",
        says("COMPONENT_UNLISTED", component=TWO[1]),
    ),
    ({"top_k": 0}, {}, ARROW, says("INVALID_ENTRY", entry="top_k")),
    ({"top_k": 3}, {}, ARROW, says("NOT_IN_RANGE", most=2, value=3)),
    ({"router_temperature": 0}, {}, ARROW, says("INVALID_ENTRY", entry="router_temperature")),
    ({"router_temperature": "1"}, {}, ARROW, says("INVALID_ENTRY", entry="router_temperature")),
    ({"rng_seed": "1"}, {}, ARROW, says("INVALID_ENTRY", entry="rng_seed")),
    ({"use_gks": True}, {}, ARROW, says("INVALID_ENTRY", entry="use_gks")),
    ({"gks_adapter_names": ["x"]}, {}, ARROW, says("INVALID_ENTRY", entry="use_gks")),
    (
        {"gks_adapter_names": TWO[:1], "use_gks": True},
        {},
        ARROW,
        says("DUPLICATE", value=TWO[0]),
    ),
    ({"jitter": 0.1}, {}, ARROW, says("INVALID_VALUE")),
    ({}, {"components": ...}, "components", says("REQUIRED")),
    ({}, {"bias": "all"}, "bias", says("UNSUPPORTED_VALUE")),
    ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save", says("UNSUPPORTED_VALUE")),
    ({}, {"trainable_token_indices": [3]}, "trainable_token_indices", says("UNSUPPORTED_VALUE")),
    ({}, {"use_dora": True}, ARROW, says("CONFLICTS_WITH", other="use_dora")),
    (
        {},
        {"init_lora_weights": "pissa"},
        "init_lora_weights",
        says("UNSUPPORTED_VALUE", value="pissa"),
    ),
    ({}, {"target_modules": ["w"]}, "target_modules", says("SELECTS_NOTHING")),
]


@pytest.mark.parametrize(
    ("arrow", "changes", "field", "check"),
    REFUSED,
    ids=lambda value: str(value) if isinstance(value, str | dict) else "",
)
def test_each_key_that_does_not_fit_is_refused_by_name(
    arrow: dict[str, Any],
    changes: dict[str, Any],
    field: str,
    check: Callable[[object], bool],
    made: Path,
    tmp_path: Path,
) -> None:
    root = saved(made, tmp_path, *TWO)
    edit_config(write_router(root, "router", TWO, ALL, **arrow), **changes)
    error = refusal(root, AdapterCheckpointError)
    assert any(name == field and check(why) for name, why in error.violations), error


# Experts, general LoRAs, and the component at fault.
UNFIT: dict[str, tuple[list[str], list[str], str]] = {
    "another target": (["wide-0", "narrow-0"], [], "narrow-0"),
    "a gain": (["wide-0", "dora"], [], "dora"),
    "a bias": (["wide-0", "bias"], [], "bias"),
    "a scaling of 0": (["wide-0", "off"], [], "off"),
    "factors of another kind": (TWO, ["vera"], "vera"),
    "another rank": (TWO, ["rank-2"], ""),
}
OTHERS = {
    "dora": ("dora", {}),
    "bias": ("lora", {"lora_bias": True}),
    "off": ("lora", {"lora_alpha": 0}),
    "vera": ("vera", {}),
    "rank-2": ("lora", {"r": 2}),
}


@pytest.mark.parametrize("case", UNFIT)
def test_components_that_do_not_fit_are_named(case: str, made: Path, tmp_path: Path) -> None:
    experts, general, culprit = UNFIT[case]
    for name in (*experts, *general):
        if name in OTHERS:
            method, keys = OTHERS[name]
            save_adapter(model(), make_config(method, **keys), tmp_path / name, share=True)
        else:
            saved(made, tmp_path, name)
    arrow = {"gks_adapter_names": general, "use_gks": bool(general)}
    directory = write_router(tmp_path, "router", [*experts, *general], ALL, top_k=1)
    edit_config(directory, arrow_config={"top_k": 1, "task_adapter_names": experts, **arrow})
    error = refusal(tmp_path, AdapterCheckpointError)
    if culprit:
        assert says("UNFIT_COMPONENT", component=culprit)(error)
    else:
        assert says("UNEQUAL_RANKS", ranks="2, 4")(error)


def test_experts_of_other_methods_and_ranks_are_routed(made: Path, tmp_path: Path) -> None:
    root = saved(made, tmp_path, "wide-0")
    for name in ("vera", "rank-2"):
        method, keys = OTHERS[name]
        save_adapter(model(), make_config(method, **keys), root / name, share=True)
    write_router(root, "router", ["wide-0", "vera", "rank-2"], ["q_proj"], router_temperature=0.5)
    lowered = lower(root, base_of(model()))
    gate = gate_of(lowered)
    assert gate.rank_indptr == (0, 4, 20, 22)
    score = gate.score
    assert isinstance(score, PrototypeScore)
    assert (score.top_k, score.temperature) == (2, 0.5)
    assert lowered.ranks == (2, 4, 16)
    assert {text.reason for text in lowered.warnings} == {
        "COMPONENTS_ADAPT_MORE",
        "ARROW_WITHOUT_SEED",
    }
    assert {"count": 12} in [text.params for text in lowered.warnings]
    # The direction that the expert's update amplifies most, from its SVD.
    dense = (gate.b[:4].T @ gate.a[:4]).double()
    first = torch.linalg.svd(dense).Vh[0]
    assert abs(float(first @ score.prototypes[0].double())) > 0.9


def test_a_router_saved_by_peft_must_fit_the_base(made: Path, tmp_path: Path) -> None:
    root = saved(made, tmp_path, *TWO)
    save_router(model(), root, "router", TWO)
    lower(root, base_of(model()))
    key = f"base_model.model.{Q}.lora_A.weight"
    edit_tensors(root / "router", lambda tensors: {**tensors, key: torch.zeros(4, 32)})
    ((field, _),) = refusal(root, AdapterMismatchError).violations
    assert field.startswith(Q)
    edit_tensors(root / "router", lambda tensors: {f"{key}.x": torch.zeros(1)})
    ((field, _),) = refusal(root, AdapterCheckpointError).violations
    assert field == f"{Q}.lora_A.weight.x"


def test_every_key_that_peft_writes_has_a_rule(made: Path, tmp_path: Path) -> None:
    root = saved(made, tmp_path, *TWO)
    save_router(model(), root, "router", TWO)
    rules = METHODS["arrow"].rules
    config = read_adapter(root, "router").config
    assert {field.name for field in dataclasses.fields(LoraConfig)} | config.keys() <= rules.keys()
    assert {field.name for field in dataclasses.fields(ArrowConfig)} == config[
        "arrow_config"
    ].keys()


@pytest.fixture
def registry(made: Path, tmp_path: Path) -> Iterator[AdapterRegistry]:
    root = saved(made, tmp_path, *TWO)
    write_router(root, "router", TWO, ALL)
    opened = AdapterRegistry(root, tiny_base(), 1 << 30, 64)
    yield opened
    opened.close()


def test_components_must_be_registered_and_stay(registry: AdapterRegistry) -> None:
    registry.load("wide-0", "wide-0")
    not_registered = says("COMPONENT_NOT_REGISTERED", component="wide-1")
    with pytest.raises(AdapterComponentError, check=not_registered):
        registry.load("router", "router")
    registry.load("another-name", "wide-1")
    assert registry.load("router", "router").facts.method == "arrow"
    with pytest.raises(AdapterInUseError):
        registry.unload("another-name")
    registry.unload("router")
    registry.unload("another-name")
