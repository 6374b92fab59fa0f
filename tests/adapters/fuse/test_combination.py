"""The settings of ``FuseAdapters``, and the checks that reject them."""

from __future__ import annotations

from typing import Any

import pytest

from turret.server.adapters.fuse.combination import NAMES, Combination
from turret.server.errors import InvalidRequestError

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
        assert [where for where, _ in raised.value.violations] == [field]
