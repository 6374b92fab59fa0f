"""Fusions compared with PEFT's ``add_weighted_adapter``.

The results are equal if PEFT computes what it documents; otherwise, both results are checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.methods import ALL
from builders.mixes.fuse import Fusions, difference, peft_weighted, truncated

# Maximum relative difference of ΔW, from fp32 sums in another order.
CLOSE = 1e-5
FAR = 0.05
MIX = {"a": 0.7, "b": -1.2, "c": 1.5}
TIES = {"density": 0.4}


@pytest.fixture(scope="module")
def fusions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fusions]:
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
def test_a_combination_is_that_of_peft(
    fusions: Fusions, how: str, settings: dict[str, Any]
) -> None:
    options = {"svd_rank" if key == "rank" else key: value for key, value in settings.items()}
    expected = peft_weighted(fusions.root, MIX, how, **options)
    result = fusions.fuse(MIX, how=how, **settings)
    found = fusions.deltas(result)
    assert difference(found, expected) < CLOSE
    # Without this check, any result would pass: the exact sum must differ from a truncated one.
    exact = fusions.exact(MIX)
    error = difference(found, exact)
    assert (error < CLOSE) == (how == "cat")
    assert result.relative_error == pytest.approx(error, abs=1e-6)


def test_the_default_rank_is_the_largest_as_in_peft(fusions: Fusions) -> None:
    found = fusions.deltas(fusions.fuse(MIX, how="svd"))
    assert difference(found, peft_weighted(fusions.root, MIX, "svd")) < CLOSE
    assert difference(found, truncated(fusions.exact(MIX), 4)) < CLOSE


def test_peft_ignores_the_combination_of_a_single_adapter(fusions: Fusions) -> None:
    """In PEFT, every name then means ``linear``; here, it keeps its meaning."""
    exact = fusions.exact({"a": 0.5})
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("svd", {"rank": 2}, {"svd_rank": 2}),
        ("ties", TIES, TIES),
        ("magnitude_prune_svd", {**TIES, "rank": 2}, {**TIES, "svd_rank": 2}),
    ]
    for how, settings, options in cases:
        peft = peft_weighted(fusions.root, {"a": 0.5}, how, **options)
        assert difference(peft, exact) < CLOSE, how
        found = fusions.deltas(fusions.fuse({"a": 0.5}, how=how, **settings))
        assert difference(found, exact) > FAR, how
        if how == "svd":
            assert difference(found, truncated(exact, 2)) < CLOSE


def test_ranks_may_differ_if_members_share_no_module(tmp_path: Path) -> None:
    """PEFT compares the ranks in the configs, regardless of the modules."""
    fusions = Fusions(tmp_path)
    fusions.add("a", r=2, target_modules=["q_proj"])
    fusions.add("b", r=6, target_modules=ALL[1:])
    mix = {"a": 1.0, "b": -0.5}
    with pytest.raises(ValueError, match="same r"):
        peft_weighted(fusions.root, mix, "linear")
    result = fusions.fuse(mix, how="linear")
    assert result.relative_error < CLOSE
    assert {module.rank for module in result.modules} == {2, 6}
    assert difference(fusions.deltas(result), fusions.exact(mix)) < CLOSE
    fusions.close()
