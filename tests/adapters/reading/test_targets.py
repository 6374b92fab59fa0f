"""Module selection compared with PEFT's functions, and patterns that must not stall the server."""

from __future__ import annotations

import os
import subprocess
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from builders.adapters import base_of, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from turret.server.adapters.checkpoint import Findings
from turret.server.adapters.peft_format import targets as pattern_match
from turret.server.adapters.peft_format.targets import Pattern, Targets, match_all, resolve_targets

BASE = base_of(tiny_llama())
LINEAR = list(BASE.modules)
OTHER = sorted(BASE.other_modules)


def resolve(**config: Any) -> tuple[Targets, Findings]:
    findings = Findings("a")
    config = {"r": 4, "lora_alpha": 8, **config}
    return resolve_targets(config, LINEAR, OTHER, findings), findings


def peft_targets(**config: Any) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_config = LoraConfig(**config)
    return {
        name
        for name in [*LINEAR, *OTHER]
        if not isinstance(hit := check_target_module_exists(peft_config, name), ExcludedModule)
        and hit
    }


CASES: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "part of a component is no suffix": {"target_modules": ["proj", "_proj", "q_proj"]},
    "full name": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.layers\.1\.(self_attn\.[qk]|mlp\.up)_proj"},
    "regex must match all": {"target_modules": r"q_proj"},
    "regex anywhere": {"target_modules": r".*q_proj.*|.*\.1\..*down.*"},
    "exclude suffix": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    "exclude exact": {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "exclude regex": {"exclude_modules": r".*\.0\..*"},
    "exclude regex must match all": {"exclude_modules": r"q_proj"},
    "empty exclude": {"exclude_modules": ""},
    "one layer": {"layers_to_transform": 1},
    "layer zero": {"layers_to_transform": 0},
    "layers": {"layers_to_transform": [0, 5]},
    "no layers": {"layers_to_transform": []},
    "layers and exact name": {
        "target_modules": ["model.layers.0.mlp.up_proj", "q_proj"],
        "layers_to_transform": [1],
    },
    "layers pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layers patterns": {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "foreign layers pattern": {"layers_to_transform": [1], "layers_pattern": ["blocks"]},
    "empty layers pattern": {"layers_to_transform": [1], "layers_pattern": []},
    "layers on modules outside layers": {
        "target_modules": ["lm_head", "embed_tokens", "norm", "input_layernorm"],
        "layers_to_transform": [0],
    },
    "other modules": {"target_modules": ["lm_head", "embed_tokens", "norm"]},
}


@pytest.mark.parametrize("case", CASES)
def test_selects_what_peft_selects(case: str) -> None:
    config = {"target_modules": ["q_proj"], **CASES[case]}
    found, findings = resolve(**config)
    assert not findings.fields
    assert found.targeted == peft_targets(**config)


def test_all_linear_is_every_decoder_linear_and_not_the_head() -> None:
    for spelling in ("all-linear", "All-Linear"):
        found, _ = resolve(target_modules=spelling, exclude_modules=["up_proj"])
        left_out = ("up_proj", "lm_head")
        assert found.targeted == {name for name in LINEAR if not name.endswith(left_out)}
        assert "lm_head" in LINEAR


components = st.sampled_from(
    ["model", "layers", "0", "1", "self_attn", "mlp", "q_proj", "k_proj", "up_proj", "norm", "proj"]
)
names = st.one_of(
    st.lists(components, min_size=1, max_size=3).map(".".join), st.sampled_from(LINEAR + OTHER)
)
layer_choice = st.one_of(
    st.none(), st.integers(0, 2), st.lists(st.integers(0, 2), max_size=2, unique=True)
)
pattern_keys = st.one_of(
    names,
    st.sampled_from(
        [r"^model.layers.0", r".*q_proj", r"layers\.[01]\..*_proj", r"[qk]_proj", "q_proj|k_proj"]
    ),
)


@settings(max_examples=300, deadline=None)
@given(
    targets=st.lists(names, min_size=1, max_size=4),
    excludes=st.one_of(st.none(), st.lists(names, max_size=3)),
    layers=layer_choice,
    layers_pattern=st.sampled_from([None, "layers", ["layers"], ["model"], []]),
)
def test_selects_what_peft_selects_on_random_configs(
    targets: list[str], excludes: Any, layers: Any, layers_pattern: Any
) -> None:
    config = {"target_modules": targets, "exclude_modules": excludes, "layers_to_transform": layers}
    if layers is not None:
        config["layers_pattern"] = layers_pattern
    found, findings = resolve(**config)
    assert not findings.fields
    assert found.targeted == peft_targets(**config)


@settings(max_examples=25, deadline=None)  # one child interpreter per example
@given(
    ranks=st.dictionaries(pattern_keys, st.integers(1, 64), max_size=4),
    alphas=st.dictionaries(pattern_keys, st.floats(0.5, 64), max_size=4),
)
def test_patterns_resolve_as_in_peft(ranks: dict[str, int], alphas: dict[str, float]) -> None:
    found, findings = resolve(target_modules="all-linear", rank_pattern=ranks, alpha_pattern=alphas)
    assert not findings.fields
    assert len(found.targeted) == len(LINEAR) - 1
    for name in found.targeted:
        assert found.ranks[name] == ranks.get(get_pattern_key(list(ranks), name), 4)
        assert found.alphas[name] == alphas.get(get_pattern_key(list(alphas), name), 8)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_pattern": "layers"}, "layers_pattern"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "layers_pattern"),
        ({"target_modules": "(q_proj"}, "target_modules"),
        ({"target_modules": ["q_proj"], "exclude_modules": "*"}, "exclude_modules"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"[": 3}}, "rank_pattern"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"a" * 9000: 3}}, "alpha_pattern"),
    ],
)
def test_contradictions_and_broken_patterns_are_named(config: dict[str, Any], field: str) -> None:
    _, findings = resolve(**config)
    assert findings.fields == {field}


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The started child processes.

    Each has a second of processor time, and no pattern is known to be slow.
    """
    monkeypatch.setattr(pattern_match, "CPU_SECONDS", 1)
    started: list[Any] = []
    start = subprocess.Popen

    def starting(*args: Any, **kwargs: Any) -> Any:
        assert all(child.poll() is not None for child in started), "two at a time"
        started.append(start(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", starting)
    pattern_match._too_slow.clear()
    yield started
    pattern_match._too_slow.clear()


def test_a_catastrophic_pattern_is_stopped_reported_and_not_retried(
    children: list[Any],
) -> None:
    config = {
        "target_modules": ["q_proj"],
        "exclude_modules": r".*k_proj",
        "rank_pattern": {r"(([a-z._0-9]+)+)+X": 3},
    }
    start = os.times()
    _, findings = resolve(**config)
    end = os.times()
    assert findings.fields == {"rank_pattern"}
    spent = end.children_user + end.children_system - start.children_user - start.children_system
    assert 0.5 < spent < 3.0
    assert len(children) == 1
    _, findings = resolve(**config)
    assert "rank_pattern" in findings.fields
    assert len(children) == 1
    _, findings = resolve(target_modules=["q_proj"], exclude_modules=r".*k_proj")
    assert not findings.fields


def test_a_pattern_cannot_fill_the_memory(
    children: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pattern_match, "MAX_CHILD_BYTES", 64 << 20)
    hungry = Pattern("match", "(a|b)*c", "(a|b)*c")
    (result,) = match_all([hungry], ["ab" * 2_000_000])
    assert result.error is not None
    assert result.error.reason == "SLOW_PATTERN"
    assert children[0].returncode == 1
    (after,) = match_all([Pattern("match", "a+", "a+")], ["aa"])
    assert after.matches == ("",)


def test_child_processes_take_turns(children: list[Any]) -> None:
    patterns = [Pattern("fullmatch", f"(a|b){{{i}}}", f"(a|b){{{i}}}") for i in range(1, 7)]
    with ThreadPoolExecutor(len(patterns)) as pool:
        results = list(pool.map(lambda pattern: match_all([pattern], ["ab"])[0], patterns))
    assert [result.matches for result in results] == [(None,), ("",), *[(None,)] * 4]
    assert len(children) == len(patterns)


def test_results_keep_the_order_of_the_patterns() -> None:
    names = ["a.1.b", "c"]
    patterns = [
        Pattern("fullmatch", "c", "c"),
        Pattern("match", r"a\.(?P<idx>\d)", r"a\.(?P<idx>\d)"),
        Pattern("fullmatch", "(", "("),
        Pattern("match", "a", "a"),
    ]
    results = match_all(patterns, names)
    assert [r.matches for r in results] == [(None, ""), ("1", None), (None, None), ("", None)]
    assert [r.error is None for r in results] == [True, True, False, True]


def test_the_first_of_several_matching_patterns_wins_with_a_warning() -> None:
    found, _ = resolve(
        target_modules=["q_proj"], alpha_pattern={"q_proj": 3, "self_attn.q_proj": 5}
    )
    assert set(found.alphas.values()) == {3}
    assert len(found.warnings) == 2
    same, _ = resolve(target_modules=["q_proj"], alpha_pattern={"q_proj": 3, ".q_proj": 3})
    assert same.warnings == ()


def test_warnings_stay_few_and_short() -> None:
    many = {f"q_proj|{'x' * 200}{i}": i for i in range(300)}
    found, findings = resolve(target_modules=["q_proj", "v_proj"], alpha_pattern=many)
    assert not findings.fields
    assert set(found.alphas.values()) == {0, 8}
    assert all(len(warning) < 512 for warning in found.warnings)
    assert found.warnings[0].params["count"] == 300
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(30)]
    config = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 10, "alpha_pattern": many}
    targets = resolve_targets(config, names, [], Findings("a"))
    assert len(targets.warnings) == 17
    assert targets.warnings[-1].params == {"count": 14}


def test_patterns_that_would_take_minutes_are_refused() -> None:
    """The patterns are for a mixture whose experts are modules."""
    names = [f"model.layers.{i // 128}.mlp.experts.{i % 128}.up_proj" for i in range(1 << 15)]
    patterns = {f"x{i}": 3 for i in range(513)}
    findings = Findings("a")
    config = {"target_modules": ["up_proj"], "r": 4, "lora_alpha": 8, "rank_pattern": patterns}
    start = time.process_time()
    resolve_targets(config, names, [], findings)
    assert findings.fields == {"rank_pattern"}
    assert time.process_time() - start < 5.0
