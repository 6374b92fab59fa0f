"""What is said of adapters that are not served works: the advice is followed, with PEFT itself."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import peft
import pytest
from builders.adapters import base_of, logits, lower_adapter, tiny_llama, with_operators
from builders.methods import load_adapter, quiet, save_adapter
from peft import PeftConfig, PeftType

from turret.server.adapters.methods import METHODS
from turret.server.adapters.peft_format.unserved import CONVERT, MERGE, UNSERVED

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
# Small ones of every kind whose advice is to do something with the file.
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ADAMSS": (peft.AdamssConfig, {"r": 16, "num_subspaces": 3, "subspace_rank": 2}),
    "PSOFT": (peft.PsoftConfig, {"r": 4}),
}


def follows(advice: str) -> set[str]:
    """The kinds whose advice says so."""
    return {kind for kind, text in UNSERVED.items() if text.endswith(advice)}


def save(kind: str, root: Path) -> tuple[Any, PeftConfig]:
    """A model, and the adapter of that kind in ``root/a``."""
    if kind == "ADAMSS" and importlib.util.find_spec("sklearn") is None:
        pytest.skip("PEFT needs scikit-learn for it")
    model = tiny_llama()
    make, values = CONFIGS[kind]
    with quiet():
        config = make(**TARGETS, **values)
    save_adapter(model, config, root / "a", strength=0.05)
    return model, config


@pytest.mark.parametrize("kind", sorted(follows(MERGE)))
def test_what_is_to_be_merged_can_be_merged(kind: str, tmp_path: Path) -> None:
    model, _ = save(kind, tmp_path)
    before = logits(model)
    oracle = load_adapter(model, tmp_path / "a")
    with quiet():
        expected = logits(oracle)
        merged = copy.deepcopy(oracle).merge_and_unload()
    assert not any("base_layer" in name for name, _ in merged.named_parameters())
    effect = (expected - before).norm()
    assert effect > 0
    assert (logits(merged) - expected).norm() < 1e-3 * effect


@pytest.mark.parametrize("kind", sorted(follows(CONVERT)))
def test_what_is_to_be_converted_is_served_then(kind: str, tmp_path: Path) -> None:
    model, config = save(kind, tmp_path)
    oracle = load_adapter(model, tmp_path / "a")
    with quiet():
        peft.save_as_lora(tmp_path / "lora", oracle, rank=config.r)  # type: ignore[attr-defined]
    lowered = lower_adapter(tmp_path, base_of(model), "lora")
    served = with_operators(model, [(lowered.operators, 1.0)])
    effect = (logits(oracle) - logits(model)).norm()
    assert effect > 0
    assert (logits(served) - logits(oracle)).norm() < 1e-3 * effect


def test_every_kind_has_advice_that_is_followed_or_names_what_is_served() -> None:
    served = {kind for method in METHODS.values() for kind in method.peft_types}
    others = UNSERVED.keys() - follows(MERGE) - follows(CONVERT)
    assert follows(MERGE) | follows(CONVERT) == CONFIGS.keys()
    for kind in others:
        named = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", UNSERVED[kind])) - {kind}
        assert named <= served, (kind, named - served)
        assert (
            named & {one.value for one in PeftType}
            or "train one of" in UNSERVED[kind]
            or ("load its LoRAs" in UNSERVED[kind])
        )
