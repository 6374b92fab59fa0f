"""Errors for an adapter of another base, and the comparison of base names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders.adapters import base_of, edit_config, edit_tensors, lora_config, tiny_llama
from builders.methods import save_adapter
from said import says

from turret.server.adapters.adapter import Source
from turret.server.adapters.base import Allowed
from turret.server.adapters.loader import AdapterLoader
from turret.server.adapters.peft_format.refusals import (
    base_name_warning,
    causes_of_mismatch,
    is_other_base,
)
from turret.server.errors import AdapterCheckpointError, AdapterMismatchError
from turret.server.models.fidelity import Fidelity
from turret.server.words import say

NO = (False, False)
BASE: Any = SimpleNamespace(
    name="org/Small-1B",
    num_layers=24,
    modules={
        "model.layers.0.self_attn.q_proj": SimpleNamespace(
            name="model.layers.0.self_attn.q_proj", in_features=576
        )
    },
)


@pytest.mark.parametrize(
    ("name", "shape", "cause"),
    [
        ("model.layers.29.mlp.up_proj.lora_A.weight", (8, 576), "TOO_MANY_LAYERS"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (8, 2048), "WRONG_INPUTS"),
        ("model.vision_tower.layers.0.x.lora_A.weight", (8, 4), "ADAPTS_VISION"),
        ("visual.blocks.0.attn.qkv.lora_A.weight", (8, 4), "ADAPTS_VISION"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (8, 576), ""),
    ],
)
def test_the_cause_comes_first(name: str, shape: tuple[int, ...], cause: str) -> None:
    config = {"base_model_name_or_path": "org/Large-9B"}
    tensors = {name: torch.empty(shape)}
    *causes, names = causes_of_mismatch(config, tensors, BASE)
    assert [text.reason for text in causes] == ([cause] if cause else [])
    assert names == say("TRAINED_FOR", trained="org/Large-9B", served=BASE.name)
    config = {"base_model_name_or_path": BASE.name}
    assert causes_of_mismatch(config, tensors, BASE) == tuple(causes)


@pytest.mark.parametrize(
    ("trained", "served", "warns", "is_other"),
    [
        ("org/Llama-3.1-8B", "org/Llama-3.1-8B-Instruct", True, True),
        ("google/gemma-3-4b-pt", "google/gemma-3-4b-it", True, True),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", True, True),
        ("/c/hub/models--org--Llama-3.1-8B/snapshots/0a1", "org/Llama-3.1-8B-Instruct", True, True),
        # Other names of a base.
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B-Instruct", *NO),
        ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B", *NO),
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "/models/Qwen3-4B", *NO),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-Q8_0.gguf", *NO),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3-4B-Instruct-2507-UD-Q4_K_XL", *NO),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3-4B-Instruct-2507-IQ4_XS", *NO),
        ("unsloth/gemma-3-4b-it-unsloth-bnb-4bit", "google/gemma-3-4b-it", *NO),
        ("unsloth/Llama-3.2-1B-Instruct-FP8-Dynamic", "meta-llama/Llama-3.2-1B-Instruct", *NO),
        ("TheBloke/Mistral-7B-v0.1-AWQ", "mistralai/Mistral-7B-v0.1", *NO),
        ("/c/hub/models--org--Llama-3.1-8B/snapshots/0a1", "org/Llama-3.1-8B", *NO),
        ("", "org/Llama-3.1-8B", *NO),
        # The name of a folder proves nothing.
        ("/home/me/models/llama-3-8b-tuned", "meta-llama/Meta-Llama-3-8B", True, False),
        ("./out/llama-3-8b-merged", "meta-llama/Meta-Llama-3-8B", True, False),
        ("C:\\models\\Other-7B", "meta-llama/Meta-Llama-3-8B", True, False),
        ("org/Llama-3.1-8B", "model", True, False),
        ("my-model", "org/Llama-3.1-8B", True, False),
    ],
)
def test_names_that_may_or_do_prove_another_base(
    trained: str, served: str, warns: bool, is_other: bool
) -> None:
    assert (base_name_warning(trained, served) is not None) is warns
    assert is_other_base(trained, served) is is_other


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_adapter(tiny_llama(), lora_config(), tmp_path / "a")
    edit_config(tmp_path / "a", base_model_name_or_path="org/Other-7B")
    return tmp_path / "a"


FIDELITY = Fidelity()
for _ in range(2):
    FIDELITY.count("layers.0.q_proj.weight", "as-stored")
FIDELITY.count("layers.0.down_proj.weight", "16-bit")
FIDELITY.count("layers.1.down_proj.weight", "quantized", squares=(0.01, 1.0))
WEIGHTS, SHOWN = FIDELITY.storage(), FIDELITY.shown()


def load(
    directory: Path,
    *,
    max_rank: int = 128,
    name: str = "",
    allow: bool = False,
    strict: bool = False,
    base_name: str = "org/Tiny-1B",
) -> Any:
    base = dataclasses.replace(
        base_of(tiny_llama()), name=base_name, digest="d" * 64, weights=WEIGHTS, weights_shown=SHOWN
    )
    allowed = Allowed(other_base=allow, strict_base=strict)
    loader = AdapterLoader(directory.parent, base, 1 << 30, max_rank, allowed=allowed)
    return loader.lower(loader.read(Source(directory.name, adapter=name)))


def test_another_base_of_the_same_shapes_is_refused_unless_it_is_allowed(directory: Path) -> None:
    with pytest.raises(AdapterMismatchError, check=says("OTHER_BASE")):
        load(directory)
    assert any("org/Other-7B" in line for line in load(directory, allow=True).facts.warnings)


def test_the_digest_of_the_base_takes_precedence_over_its_name(directory: Path) -> None:
    provenance = directory / "provenance.json"
    provenance.write_text(json.dumps({"base": {"name": "x", "digest": "d" * 64}}))
    load(directory)
    for text in (json.dumps({"base": {"digest": "e" * 64}}), "{", "[]", '{"base": 3}'):
        provenance.write_text(text)
        with pytest.raises(AdapterMismatchError):
            load(directory)


DIGEST = "d" * 64


@pytest.mark.parametrize(
    ("trained", "reason", "params"),
    [
        ({"digest": DIGEST}, None, {}),
        ({"digest": DIGEST, "weights": WEIGHTS}, None, {}),
        ({"digest": "e\n\x1b[2K"}, None, {}),
        ({"digest": "e" * 64}, "OTHER_WEIGHTS", {"trained": "e" * 12, "served": "d" * 12}),
        ({"digest": "e" * 64, "weights": WEIGHTS}, "OTHER_WEIGHTS", {}),
        ({"digest": "e" * 64, "weights": 3}, "OTHER_WEIGHTS", {}),
        (
            {"digest": "e" * 64, "weights": {**WEIGHTS, "down_proj": {"4-bit": 2}}},
            "STORED_OTHERWISE",
            {"modules": "1 down_proj 16-bit, 1 down_proj quantized (error 10%)"},
        ),
        # Trained on the weights of a checkpoint that the server quantises.
        (
            {"digest": DIGEST, "weights": {"q_proj": {"16-bit": 2}, "down_proj": {"16-bit": 2}}},
            "STORED_OTHERWISE",
            {
                "modules": "1 down_proj 16-bit, 1 down_proj quantized (error 10%),"
                " 2 q_proj as-stored"
            },
        ),
    ],
)
def test_different_weights_of_the_same_base_are_reported(
    directory: Path, trained: dict[str, Any], reason: str | None, params: dict[str, Any]
) -> None:
    edit_config(directory, base_model_name_or_path="org/Tiny-1B")
    (directory / "provenance.json").write_text(json.dumps({"base": {"name": "x", **trained}}))
    warnings = load(directory).facts.warnings
    assert [text.reason for text in warnings] == ([reason] if reason else [])
    assert all(params.items() <= dict(text.params).items() for text in warnings)
    if reason is None:
        load(directory, strict=True)
        return
    with pytest.raises(AdapterMismatchError, check=says(reason, **params)):
        load(directory, strict=True)


@pytest.mark.parametrize(
    ("trained", "served", "reason"),
    [
        ("org/Tiny-1B", "org/Tiny-1B", None),
        ("unsloth/Tiny-1B-bnb-4bit", "org/Tiny-1B", None),
        ("unsloth/Tiny-1B-unsloth-bnb-4bit", "org/Tiny-1B", "OTHER_QUANTIZATION"),
        ("unsloth/Tiny-1B-unsloth-bnb-4bit", "unsloth/Tiny-1B-unsloth-bnb-4bit", None),
        ("org/Tiny-1B-GPTQ-Int4", "org/Tiny-1B", "OTHER_QUANTIZATION"),
        ("org/Small-Chat", "org/Tiny-1B", "TRAINED_FOR_ANOTHER_BASE"),
    ],
)
def test_the_name_of_the_base_may_indicate_another_quantisation(
    directory: Path, trained: str, served: str, reason: str | None
) -> None:
    edit_config(directory, base_model_name_or_path=trained)
    warnings = load(directory, base_name=served).facts.warnings
    assert [text.reason for text in warnings] == ([reason] if reason else [])
    if reason is None:
        load(directory, base_name=served, strict=True)
        return
    with pytest.raises(AdapterMismatchError, check=says("BASE_DIFFERS")):
        load(directory, base_name=served, strict=True)


def test_an_upload_is_reported_by_its_name(directory: Path) -> None:
    edit_config(directory, base_model_name_or_path="", r="x")
    with pytest.raises(AdapterCheckpointError, check=says("ADAPTER_UNUSABLE", path="mine")):
        load(directory, name="mine")


def test_an_unknown_key_that_is_null_is_accepted(directory: Path) -> None:
    edit_config(directory, base_model_name_or_path="", a_key_of_tomorrow=None)
    load(directory)
    edit_config(directory, a_key_of_tomorrow=False)
    with pytest.raises(AdapterCheckpointError, check=says("UNKNOWN_FIELD")):
        load(directory)


def test_a_message_stays_short(directory: Path) -> None:
    def elsewhere(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace(".layers.", ".layers.9"): tensor for name, tensor in tensors.items()}

    edit_tensors(directory, elsewhere)
    with pytest.raises(AdapterMismatchError, check=says("TOO_MANY_LAYERS", found=92)) as caught:
        load(directory)
    assert len(caught.value.message) < 900
    assert len(caught.value.violations) > 4
