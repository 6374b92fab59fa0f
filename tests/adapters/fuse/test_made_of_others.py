"""Fusions of methods that have no operators of their own, compared with PEFT's merged weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from builders.mixes.fuse import Fusions, difference
from said import says

from turret.server.errors import InvalidRequestError

LOW_RANK = (
    *("bd_lora", "kasa", "delora", "miss", "gralora", "pvera", "vblora", "unilora", "tinylora"),
    *("hra", "deft", "peanut"),
)

SPARSE = ("shira", "supertuning", "waveft")
DENSE = ("fourierft", "randlora", "osf", "frod")


@pytest.fixture(scope="module")
def fusions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fusions]:
    made = Fusions(tmp_path_factory.mktemp("fuse"), max_rank=96)
    for seed, method in enumerate((*LOW_RANK, "glora", *SPARSE, *DENSE)):
        made.add(method, method, seed)
    for method in ("ln_tuning", "cpt", "cartridge"):
        made.add(method, method)
    yield made
    made.close()


def test_concatenation_is_exact(fusions: Fusions) -> None:
    mix = {method: (-1) ** number * 0.5 for number, method in enumerate(LOW_RANK)}
    result = fusions.fuse(mix)
    assert difference(fusions.deltas(result), fusions.exact(mix)) < 1e-5
    assert result.relative_error < 1e-6


def test_gains_are_fused_into_the_whole_update(fusions: Fusions) -> None:
    mix = {"glora": 0.7, "hra": 1.0}
    result = fusions.fuse(mix, how="svd", rank=64)
    assert difference(fusions.deltas(result), fusions.exact(mix)) < 1e-5


def test_single_entries_are_fused_into_the_whole_update(fusions: Fusions) -> None:
    mix = {"shira": 0.7, "supertuning": -1.0, "waveft": 0.5, "hra": 1.0}
    result = fusions.fuse(mix, how="svd", rank=64)
    assert difference(fusions.deltas(result), fusions.exact(mix)) < 1e-5
    with pytest.raises(InvalidRequestError, check=says("NOT_FUSABLE", adapter="shira")):
        fusions.fuse({"shira": 1.0, "hra": 1.0})


def test_whole_matrices_are_fused_into_the_whole_update(fusions: Fusions) -> None:
    mix = {"fourierft": 0.7, "randlora": -1.0, "osf": 0.5, "frod": 0.4, "hra": 1.0}
    result = fusions.fuse(mix, how="svd", rank=64)
    assert difference(fusions.deltas(result), fusions.exact(mix)) < 1e-5
    with pytest.raises(InvalidRequestError, check=says("NOT_FUSABLE", adapter="osf")):
        fusions.fuse({"osf": 1.0, "hra": 1.0})


def test_prompts_cannot_be_fused(fusions: Fusions) -> None:
    for name in ("cpt", "cartridge"):
        with pytest.raises(InvalidRequestError, check=says("NOT_FUSABLE", adapter=name)):
            fusions.fuse({name: 1.0, "hra": 1.0}, how="svd", rank=4)
