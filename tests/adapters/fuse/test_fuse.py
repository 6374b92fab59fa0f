"""Fusions of adapters of every method, compared with PEFT's updates in float64, and rejections."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import BASE_NAME, logits, tiny_llama, with_operators
from builders.methods import ALL, load_adapter, make_config, save_adapter
from builders.mixes.fuse import Fusions, difference, peft_weighted, truncated
from builders.mixes.fusions import save_fusion
from said import fields_of, says

from turret.server.adapters import module_fuser as fused_module
from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.combination import NAMES, Combination
from turret.server.adapters.module_fuser import Factors, energy_rank, ratio, side_by_side
from turret.server.adapters.operators import Operator
from turret.server.adapters.operators.adapter_operators import (
    AdapterOperators,
    ModuleOperators,
    beyond_low_rank,
    beyond_updates,
)
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.errors import (
    AdapterChangedError,
    AdapterExistsError,
    AdapterNotFoundError,
    BudgetExceededError,
    InvalidRequestError,
    StateDirRequiredError,
    TurretError,
)

CLOSE = 1e-5
METHODS = ("lora", "rslora", "dora", "loha", "lokr", "ia3", "adalora", "vera")
DENSE = ("dora", "loha", "lokr", "ia3")


# Methods that have no operators of their own.
LOW_RANK_METHODS = (
    *("bd_lora", "kasa", "delora", "miss", "gralora", "pvera", "vblora", "unilora", "tinylora"),
    *("hra", "deft", "peanut"),
)
SPARSE = ("shira", "supertuning", "waveft")
DENSE_METHODS = ("fourierft", "randlora", "osf", "frod")
PROMPTS = ("prefix_tuning", "prompt_tuning", "cpt", "cartridge")


@pytest.fixture(scope="module")
def fusions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fusions]:
    """An adapter of each method under the method's name."""
    made = Fusions(tmp_path_factory.mktemp("fuse"), max_rank=96)
    for methods in (METHODS, (*LOW_RANK_METHODS, "glora", *SPARSE, *DENSE_METHODS), PROMPTS):
        for seed, method in enumerate(methods):
            made.add(method, method, seed)
    made.add("narrow", r=2, lora_alpha=4, target_modules=["q_proj"])
    save_fusion(tiny_llama(), made.root, "gated", ("lora", "narrow"), ["q_proj"])
    made.registry.load("gated", "gated")
    made.registry.set_alias("alias", [AdapterRef(name="lora")])
    yield made
    made.close()


@pytest.mark.parametrize("method", METHODS)
def test_svd_gives_the_best_approximation_for_every_method(fusions: Fusions, method: str) -> None:
    mix = {method: -1.5}
    exact = fusions.exact(mix)
    result = fusions.fuse(mix, how="svd", rank=3)
    found = fusions.deltas(result)
    assert difference(found, truncated(exact, 3)) < 1e-4
    assert result.relative_error == pytest.approx(difference(found, exact), rel=1e-3, abs=1e-6)
    for module in result.modules:
        of_module = ({module.module: deltas[module.module]} for deltas in (found, exact))
        assert module.relative_error == pytest.approx(difference(*of_module), rel=1e-3, abs=1e-6)
        assert module.rank <= 3


def test_all_methods_at_once(fusions: Fusions) -> None:
    mix: dict[str, float] = dict.fromkeys(METHODS, 0.5)
    found = fusions.deltas(fusions.fuse(mix, how="svd", rank=64))
    assert difference(found, fusions.exact(mix)) < CLOSE
    pruned = fusions.fuse(mix, how="dare_ties_svd", density=0.5, rank=64, seed=3)
    again = fusions.fuse(mix, how="dare_ties_svd", density=0.5, rank=64, seed=3)
    other = fusions.fuse(mix, how="dare_ties_svd", density=0.5, rank=64, seed=4)
    assert pruned.record.facts.digest == again.record.facts.digest != other.record.facts.digest
    assert pruned.relative_error == again.relative_error > 0.1


@pytest.mark.parametrize("how", ["exact", "cat"])
def test_concatenation_is_exact_for_low_rank_updates(fusions: Fusions, how: str) -> None:
    mix = {"lora": 0.7, "rslora": -2.0, "adalora": 1.0, "vera": 0.25, "narrow": 3.0}
    result = fusions.fuse(mix, how=how)
    assert difference(fusions.deltas(result), fusions.exact(mix)) < CLOSE
    assert result.relative_error < 1e-7
    ranks = {module.module: module.rank for module in result.modules}
    assert ranks["model.layers.1.self_attn.v_proj"] < ranks["model.layers.1.self_attn.q_proj"]


def test_concatenation_is_exact_for_methods_without_own_operators(fusions: Fusions) -> None:
    mix = {method: (-1) ** number * 0.5 for number, method in enumerate(LOW_RANK_METHODS)}
    result = fusions.fuse(mix)
    assert difference(fusions.deltas(result), fusions.exact(mix)) < CLOSE
    assert result.relative_error < 1e-6


@pytest.mark.parametrize(
    ("mix", "refused"),
    [
        ({"glora": 0.7, "hra": 1.0}, "glora"),
        ({"shira": 0.7, "supertuning": -1.0, "waveft": 0.5, "hra": 1.0}, "shira"),
        ({"fourierft": 0.7, "randlora": -1.0, "osf": 0.5, "frod": 0.4, "hra": 1.0}, "osf"),
    ],
    ids=["gains", "entries", "whole matrices"],
)
def test_other_updates_are_fused_into_the_whole_update(
    fusions: Fusions, mix: dict[str, float], refused: str
) -> None:
    result = fusions.fuse(mix, how="svd", rank=64)
    assert difference(fusions.deltas(result), fusions.exact(mix)) < CLOSE
    with pytest.raises(InvalidRequestError, check=says("NOT_FUSABLE", adapter=refused)):
        fusions.fuse({refused: 1.0, "hra": 1.0})


def test_a_weight_of_zero_takes_up_no_rank(fusions: Fusions) -> None:
    result = fusions.fuse({"lora": 0.5, "rslora": 0.0})
    assert {module.rank for module in result.modules} == {4}
    nothing = fusions.fuse({"lora": 0.0, "narrow": 0.0})
    assert all((delta == 0).all() for delta in fusions.deltas(nothing).values())
    assert (nothing.relative_error, nothing.record.facts.ranks) == (0.0, (1,))


def test_energy_keeps_the_smallest_sufficient_rank(fusions: Fusions) -> None:
    mix = {"lora": 1.0, "dora": 0.5}
    exact = fusions.exact(mix)
    result = fusions.fuse(mix, how="svd", energy=0.9)
    for module in result.modules:
        energy = torch.linalg.svdvals(exact[module.module]).square()
        share = (energy.cumsum(0) / energy.sum()).tolist()
        assert share[module.rank - 1] >= 0.9 > share[module.rank - 2]
        assert module.relative_error == pytest.approx((1 - share[module.rank - 1]) ** 0.5, 1e-3)
    assert result.relative_error <= 0.1**0.5
    # With all of the energy, the result of two LoRAs of rank 4 and 6 is their concatenation.
    whole = fusions.fuse({"lora": 1.0, "rslora": 1.0}, how="svd", energy=1.0)
    assert {module.rank for module in whole.modules} == {10}
    assert whole.relative_error < 1e-6


@pytest.mark.parametrize(
    ("keys", "others"),
    [({"bias": "all"}, ("k_proj", "o_proj", "v_proj")), ({"lora_bias": True}, ())],
    ids=["bias", "lora_bias"],
)
def test_biases_add_up(keys: dict[str, Any], others: tuple[str, ...], tmp_path: Path) -> None:
    """Replaced biases contribute their difference; modules that have only a bias are kept."""
    base = tiny_llama(attention_bias=True)
    fusions = Fusions(tmp_path, base=base)
    for seed, name in enumerate("ab"):
        fusions.add(name, seed=seed, target_modules=["q_proj", "up_proj"], **keys)
    mix = {"a": 0.5, "b": -1.5}
    fused = fusions.fuse(mix, name="c")
    assert set(fused.record.facts.target_modules) == {"q_proj", "up_proj", *others}
    held = fusions.registry.acquire([AdapterRef(name=name) for name in "abc"])
    a, b, c = (adapter.operators for adapter, _ in held.members)
    fusions.registry.release(held)
    assert a is not None
    assert b is not None
    assert c is not None
    expected = logits(with_operators(base, [(a, 0.5), (b, -1.5)]))
    torch.testing.assert_close(
        logits(with_operators(base, [(c, 1.0)])), expected, atol=1e-4, rtol=0
    )
    loaded = load_adapter(base, fusions.directory(fused))
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=0)
    fusions.close()


def test_the_result_is_a_plain_lora(fusions: Fusions) -> None:
    result = fusions.fuse({"lora": 1.0, "narrow": 0.5})
    config = json.loads((fusions.directory(result) / "adapter_config.json").read_text())
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert config["target_modules"] == sorted(make_config("lora").target_modules)  # type: ignore[attr-defined]
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == dict.fromkeys(paths, 6)
    record = result.record
    assert (record.facts.method, record.facts.ranks, record.facts.warnings) == ("lora", (4, 6), ())
    # PEFT saves the names of models with a directory, which these models lack.
    assert record.facts.base_model == BASE_NAME
    # The result can be fused like any other adapter.
    twice = fusions.fuse({record.name: 2.0, "lora": -2.0})
    assert difference(fusions.deltas(twice), fusions.exact({"narrow": 1.0, "lora": 0.0})) < CLOSE


def test_only_one_module_is_dense_at_a_time(
    fusions: Fusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, weakref.ref[torch.Tensor]]] = []
    most = 0
    zeros = fused_module._zeros

    def watched(module: Any) -> torch.Tensor:
        nonlocal most
        alive = [name for name, ref in made if ref() is not None]
        assert set(alive) <= {module.name}
        most = max(most, len(alive) + 1)
        tensor = zeros(module)
        made.append((module.name, weakref.ref(tensor)))
        return tensor

    monkeypatch.setattr(fused_module, "_zeros", watched)
    fusions.fuse(dict.fromkeys(DENSE, 1.0), how="ties_svd", density=0.5)
    assert len({name for name, _ in made}) == 14
    # At most two dense matrices exist: the sum, and the update of one member.
    assert most == 2


@pytest.mark.parametrize(
    ("mix", "settings", "names"),
    [
        ({"lora": 1, "dora": 1, "ia3": 1}, {}, {1: "gain", 2: "input gain"}),
        ({"loha": 1, "lokr": 1}, {"how": "linear"}, {0: "hadamard", 1: "kron"}),
        ({"lora": 1, "prefix_tuning": 1}, {"how": "svd"}, {1: "prompt"}),
        ({"prompt_tuning": 1}, {}, {0: "prompt"}),
        ({"cpt": 1, "cartridge": 1, "hra": 1}, {"how": "svd"}, {0: "prompt", 1: "prompt"}),
        ({"gated": 1, "lora": 1}, {"how": "svd"}, {0: "gate"}),
    ],
)
def test_members_that_do_not_fit_are_named(
    fusions: Fusions, mix: dict[str, float], settings: dict[str, Any], names: dict[int, str]
) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fusions.fuse(mix, **settings)
    found = dict(raised.value.violations)
    assert found.keys() == {f"adapters[{index}].name" for index in names}
    for index, operator in names.items():
        text = found[f"adapters[{index}].name"]
        assert (text.reason, text.params["adapter"]) == ("NOT_FUSABLE", list(mix)[index])
        assert operator in text.params["why"]


@pytest.mark.parametrize(("how", "other"), [("linear", "svd"), ("ties", "ties_svd")])
def test_an_error_suggests_a_combination_for_members_of_several_ranks(
    fusions: Fusions, how: str, other: str
) -> None:
    mix = {"lora": 1.0, "narrow": 1.0}
    density = {} if how == "linear" else {"density": 0.5}
    with pytest.raises(InvalidRequestError, check=says("UNEQUAL_MEMBERS", other=other)):
        fusions.fuse(mix, how=how, **density)
    assert fusions.fuse(mix, how=other, rank=8, **density)


@pytest.mark.parametrize(
    ("mix", "settings", "kind", "fields"),
    [
        ({"lora": 1, "rslora": 1}, {"how": "linear"}, InvalidRequestError, ["adapters"]),
        ({"ia3": 1}, {"how": "svd"}, InvalidRequestError, ["rank"]),
        ({"lora": 1}, {"how": "svd", "rank": 97}, BudgetExceededError, ["rank"]),
        ({"lora": 1}, {"name": "lora"}, InvalidRequestError, ["name"]),
        ({"unknown": 1}, {"name": "alias"}, InvalidRequestError, ["name"]),
        ({"unknown": 1}, {"name": "base"}, InvalidRequestError, ["name"]),
        ({"lora": 1, "x": 1, "y": 1}, {}, AdapterNotFoundError, []),
        ({"lora": 1}, {"name": "dora"}, AdapterExistsError, []),
        ({"lora": 1}, {"name": "narrow"}, AdapterExistsError, []),
    ],
)
def test_invalid_fusions_are_rejected(
    fusions: Fusions,
    mix: Mapping[str, float],
    settings: dict[str, Any],
    kind: type[TurretError],
    fields: list[str],
) -> None:
    with pytest.raises(kind) as raised:
        fusions.fuse(mix, **settings)
    assert fields_of(raised.value) == fields


def test_ranks_over_the_limit_are_refused_before_the_fusion_starts(tmp_path: Path) -> None:
    fusions = Fusions(tmp_path, max_rank=8)
    for seed, name in enumerate("ab"):
        fusions.add(name, "rslora", seed)
    fusions.add("wide", "dora")
    for mix, settings, field in (
        ({"a": 1, "b": 1}, {}, "adapters"),
        ({"a": 1}, {"how": "svd", "rank": 9}, "rank"),
        ({"wide": 1}, {"how": "svd", "energy": 0.99}, "energy"),
    ):
        with pytest.raises(BudgetExceededError) as raised:
            fusions.fuse(mix, **settings)
        assert raised.value.violations[0][0] == field
        assert raised.value.metadata["max_rank"] == "8"
    assert list((tmp_path / "state" / "files").iterdir()) == []
    fusions.close()


def test_members_in_fp32_must_fit_the_budget(tmp_path: Path) -> None:
    fusions = Fusions(tmp_path)
    size = fusions.registry.get(fusions.add("a")).bytes_host
    fusions.close()
    tight = Fusions(tmp_path, dtype=torch.bfloat16, host_bytes=size)
    for name in "ab":
        tight.registry.load(name, "a")
    # In fp32, one of them is as large as the whole budget; in bf16, both fit.
    assert tight.fuse({"a": 1.0}, name="c").record.name == "c"
    with pytest.raises(BudgetExceededError, check=says("MEMBERS_OVER_BUDGET")):
        tight.fuse({"a": 1.0, "b": 1.0})
    tight.close()


def test_fusing_needs_a_state_directory(tmp_path: Path) -> None:
    fusions = Fusions(tmp_path, max_upload_bytes=None)
    fusions.add("a")
    with pytest.raises(StateDirRequiredError, check=says("STATE_DIR_REQUIRED")):
        fusions.fuse({"a": 1.0})
    fusions.close()


def test_files_that_changed_are_not_fused(tmp_path: Path) -> None:
    fusions = Fusions(tmp_path)
    fusions.add("a", seed=1)
    save_adapter(tiny_llama(), make_config("lora"), fusions.root / "a", seed=2)
    with pytest.raises(AdapterChangedError):
        fusions.fuse({"a": 1.0})
    fusions.close()


def test_operators_without_a_weight_update_are_found_by_exclusion() -> None:
    """An operator that fusing does not know is rejected, not omitted."""

    @dataclass(frozen=True)
    class Router(Operator):
        name = "router"
        has_dense = False

    low_rank = LowRank(torch.ones(1, 3), torch.ones(1, 2))
    plain = AdapterOperators({"m": ModuleOperators(low_rank)})
    routed = AdapterOperators({"m": ModuleOperators(low_rank, Router())})
    assert (beyond_updates(plain), beyond_low_rank(plain)) == ((), ())
    assert (beyond_updates(routed), beyond_low_rank(routed)) == (("router",), ("router",))


def test_norms_survive_cancellation() -> None:
    """The norm of the difference of two nearly equal products, without building them."""
    generator = torch.Generator().manual_seed(0)
    b, a = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((90, 4), (4, 70))
    )
    nudge = torch.randn(90, 4, generator=generator, dtype=torch.float64) * 1e-9
    difference = side_by_side([Factors(b, a), Factors(-(b + nudge), a)])
    assert difference.rank == 8
    assert difference.norm() == pytest.approx(float(torch.linalg.matrix_norm(nudge @ a)), rel=1e-5)


def test_energy_and_ratio() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])
    ranks = {0.1: 1, 9 / 14: 1, 0.65: 2, 13 / 14: 2, 0.93: 3, 1.0: 3}
    assert {energy: energy_rank(values, energy) for energy in ranks} == ranks
    assert energy_rank(torch.zeros(2), 1.0) == 1
    assert (ratio(1.0, 4.0), ratio(0.0, 0.0), ratio(1.0, 0.0)) == (0.25, 0.0, float("inf"))


# The settings of ``FuseAdapters``, and the checks that reject them.


PRUNING = [name for name in NAMES if name.startswith(("ties", "dare", "magnitude_prune"))]


@pytest.mark.parametrize("name", NAMES)
def test_each_combination_takes_its_own_settings(name: str) -> None:
    settings: dict[str, Any] = {"density": 0.5} if name in PRUNING else {}
    plain = Combination(name=name, **settings)
    assert (plain.prunes, plain.is_concatenated) == (name in PRUNING, name in ("exact", "cat"))
    assert plain.elects_signs == ("ties" in name)
    assert plain.prunes_at_random == ("dare" in name)
    assert plain.is_on_updates == name.endswith("svd")
    for field, value, takes in (
        ("rank", 3, name.endswith("svd")),
        ("energy", 0.5, name.endswith("svd")),
        ("majority_sign_method", "frequency", "ties" in name),
        ("seed", 0, "dare" in name),
        ("density", 1.0, name in PRUNING),
    ):
        if takes:
            Combination(name=name, **{**settings, field: value})
            continue
        with pytest.raises(InvalidRequestError) as raised:
            Combination(name=name, **{**settings, field: value})
        assert fields_of(raised.value) == [field]


# Fusions compared with PEFT's ``add_weighted_adapter``.


FAR = 0.05
MIX = {"a": 0.7, "b": -1.2, "c": 1.5}
TIES = {"density": 0.4}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fusions]:
    """LoRAs of one rank and three scales; ``c`` omits some modules."""
    made = Fusions(tmp_path_factory.mktemp("fuse"))
    made.add("a", seed=1, lora_alpha=6)
    made.add("b", seed=2, lora_alpha=2)
    made.add("c", seed=3, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    yield made
    made.close()


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        ("cat", {}),
        ("linear", {}),
        ("svd", {"rank": 5}),
        ("ties", TIES),
        ("ties", {**TIES, "majority_sign_method": "frequency"}),
        ("ties_svd", {**TIES, "rank": 5}),
        ("ties_svd", {**TIES, "rank": 5, "majority_sign_method": "frequency"}),
        ("dare_linear", {**TIES, "seed": 5}),
        ("dare_linear_svd", {**TIES, "rank": 5, "seed": 5}),
        ("dare_ties", {**TIES, "seed": 6}),
        ("dare_ties_svd", {**TIES, "rank": 5, "seed": 6}),
        ("magnitude_prune", TIES),
        ("magnitude_prune_svd", {**TIES, "rank": 5}),
        ("ties", {"density": 1.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_combination_is_that_of_peft(loras: Fusions, how: str, settings: dict[str, Any]) -> None:
    options = {"svd_rank" if key == "rank" else key: value for key, value in settings.items()}
    expected = peft_weighted(loras.root, MIX, how, **options)
    result = loras.fuse(MIX, how=how, **settings)
    found = loras.deltas(result)
    assert difference(found, expected) < CLOSE
    # Without this check, any result would pass: the exact sum must differ from a truncated one.
    exact = loras.exact(MIX)
    error = difference(found, exact)
    assert (error < CLOSE) == (how == "cat")
    assert result.relative_error == pytest.approx(error, abs=1e-6)


def test_the_default_rank_is_the_largest_as_in_peft(loras: Fusions) -> None:
    found = loras.deltas(loras.fuse(MIX, how="svd"))
    assert difference(found, peft_weighted(loras.root, MIX, "svd")) < CLOSE
    assert difference(found, truncated(loras.exact(MIX), 4)) < CLOSE


def test_peft_ignores_the_combination_of_a_single_adapter(loras: Fusions) -> None:
    """For one adapter, PEFT treats every combination as ``linear``; here, it keeps its meaning."""
    exact = loras.exact({"a": 0.5})
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("svd", {"rank": 2}, {"svd_rank": 2}),
        ("ties", TIES, TIES),
        ("magnitude_prune_svd", {**TIES, "rank": 2}, {**TIES, "svd_rank": 2}),
    ]
    for how, settings, options in cases:
        peft = peft_weighted(loras.root, {"a": 0.5}, how, **options)
        assert difference(peft, exact) < CLOSE, how
        found = loras.deltas(loras.fuse({"a": 0.5}, how=how, **settings))
        assert difference(found, exact) > FAR, how
        if how == "svd":
            assert difference(found, truncated(exact, 2)) < CLOSE


def test_ranks_may_differ_if_members_share_no_module(tmp_path: Path) -> None:
    """PEFT compares the ranks in the configs, regardless of the modules."""
    loras = Fusions(tmp_path)
    loras.add("a", r=2, target_modules=["q_proj"])
    loras.add("b", r=6, target_modules=ALL[1:])
    mix = {"a": 1.0, "b": -0.5}
    with pytest.raises(ValueError, match="same r"):
        peft_weighted(loras.root, mix, "linear")
    result = loras.fuse(mix, how="linear")
    assert result.relative_error < CLOSE
    assert {module.rank for module in result.modules} == {2, 6}
    assert difference(loras.deltas(result), loras.exact(mix)) < CLOSE
    loras.close()
