"""Following the advice in errors about unsupported adapters makes them work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
from builders.adapters import base_of, logits, lower_adapter, tiny_llama, with_operators
from builders.methods import load_adapter, quiet, save_adapter
from peft import PeftType

from turret.server.adapters.methods import METHODS
from turret.server.adapters.methods.unserved import CONVERT, UNSERVED
from turret.server.cli import main

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
# Small adapters of every kind for which the advice is a change of the files.
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ADAMSS": (peft.AdamssConfig, {"r": 16, "num_subspaces": 3, "subspace_rank": 2}),
    "PSOFT": (peft.PsoftConfig, {"r": 4}),
}


def follows(advice: str) -> set[str]:
    """The kinds with this advice."""
    return {kind for kind, text in UNSERVED.items() if text.endswith(advice)}


@pytest.mark.parametrize("kind", sorted(follows(CONVERT)))
def test_the_suggested_conversion_makes_an_adapter_that_is_served(
    kind: str, tmp_path: Path
) -> None:
    model = tiny_llama()
    make, values = CONFIGS[kind]
    with quiet():
        config = make(**TARGETS, **values)
    save_adapter(model, config, tmp_path / "a", strength=0.05)
    model.save_pretrained(tmp_path / "model")
    (command,) = re.findall(r"`turret (.*?)`", CONVERT)
    places = {"DIR": tmp_path / "a", "MODEL": tmp_path / "model", "NEW": tmp_path / "lora"}
    assert main([str(places.get(word, word)) for word in command.split()]) == 0
    lowered = lower_adapter(tmp_path, base_of(model), "lora")
    served = with_operators(model, [(lowered.operators, 1.0)])
    oracle = load_adapter(model, tmp_path / "a")
    effect = (logits(oracle) - logits(model)).norm()
    assert effect > 0
    assert (logits(served) - logits(oracle)).norm() < 1e-5 * effect


def test_every_unsupported_type_has_advice_that_works() -> None:
    served = {kind for method in METHODS.values() for kind in method.peft_types}
    assert follows(CONVERT) == CONFIGS.keys()
    for kind in UNSERVED.keys() - follows(CONVERT):
        named = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", UNSERVED[kind])) - {kind}
        assert named <= served, (kind, named - served)
        assert (
            named & {one.value for one in PeftType}
            or "train one of" in UNSERVED[kind]
            or ("load its LoRAs" in UNSERVED[kind])
        )
