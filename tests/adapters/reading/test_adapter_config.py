"""Inconsistencies between config, tensors and base; the error names all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import (
    base_of,
    edit_config,
    edit_tensors,
    lora_config,
    read_adapter,
    refusal_of,
    refused_fields,
    tiny_llama,
)
from builders.methods import save_adapter
from peft import PeftType
from safetensors.torch import save_file
from said import fields_of, says

from turret.server.adapters.adapter import TENSORS_FILE
from turret.server.adapters.checkpoint import MAX_REPORTED, Findings
from turret.server.adapters.methods import METHODS, UNSERVED
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.errors import AdapterCheckpointError, AdapterMismatchError
from turret.server.words import say

Q = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one good adapter, ``a``."""
    save_adapter(tiny_llama(), lora_config(), tmp_path / "a")
    return tmp_path


UNSUPPORTED: dict[str, Any] = {
    "modules_to_save": ["norm"],
    "trainable_token_indices": [1, -2],
    "target_parameters": ["experts.weight"],
    "layer_replication": [[0, 1], [0, 1]],
    "alora_invocation_tokens": "5",
    "use_qalora": "yes",
    "use_bdlora": {"target_modules_bd_a": ["q_proj"]},
    "arrow_config": "on",
    "kasa_config": {"beta": 0.1, "alpha": 1},
    "velora_config": [2],
    "monteclora_config": {"samples": 2},
    "fan_in_fan_out": "yes",
    "enable_lora": [True, False, True],
    "init_lora_weights": "pissa_niter_4",
    "task_type": "SEQ_CLS",
    "a_key_from_the_future": False,
    "bias": "some",
    "use_rslora": "yes",
    "r": 4.0,
    "lora_alpha": "10",
    "rank_pattern": {"q_proj": 0},
    "alpha_pattern": {"q_proj": None},
    "exclude_modules": 3,
    "layers_to_transform": [0.5],
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_each_unsupported_key_is_refused_by_name(root: Path, key: str) -> None:
    edit_config(root / "a", **{key: UNSUPPORTED[key]})
    assert key in refused_fields(root)


def test_one_error_reports_every_invalid_key_and_tensor(root: Path) -> None:
    edit_config(root / "a", **UNSUPPORTED)
    stray = f"{PREFIX}{Q}.lora_stray"
    edit_tensors(root / "a", lambda tensors: {**tensors, stray: torch.ones(4)})
    assert UNSUPPORTED.keys() | {f"{Q}.lora_stray"} <= refused_fields(root)


UNCONVERTED = ["pissa", "pissa_niter_16", "olora", "OLORA", "corda", "lora_ga"]
SWITCHES = ["use_qalora", "fan_in_fan_out", "use_rslora", "use_dora"]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        *[(key, zero, "INVALID_VALUE") for key in SWITCHES for zero in (0, 0.0)],
        *[("task_type", task, "INVALID_VALUE") for task in ("SEQ_2_SEQ_LM", True, [None])],
        *[("init_lora_weights", init, "UNSUPPORTED_VALUE") for init in UNCONVERTED],
        *[("init_lora_weights", init, "") for init in ("loftq", "unheard_of", 3, None)],
        # Keys without a safe default.
        *[(key, ..., "REQUIRED") for key in ("r", "lora_alpha", "target_modules")],
    ],
)
def test_a_refused_value_is_the_only_fault(root: Path, key: str, value: Any, reason: str) -> None:
    edit_config(root / "a", **{key: value})
    found = {field: why.reason for field, why in refusal_of(root).violations}
    assert found.keys() == {key} or value is ...
    assert found[key] == (reason or found[key])


SUPPORTED = {one for method in METHODS.values() for one in method.peft_types}
OTHERS = sorted({kind.value for kind in PeftType} - SUPPORTED)


@pytest.mark.parametrize("kind", [*OTHERS, "", None, 7])
def test_other_peft_types_are_refused_with_what_to_do(root: Path, kind: Any) -> None:
    edit_config(root / "a", peft_type=kind)
    error = refusal_of(root)
    assert error.violations[0][0] == "peft_type"
    assert error.metadata["supported"].split(",") == list(METHODS)
    if kind in UNSERVED:
        assert says("UNSUPPORTED_VALUE", value=kind, why=UNSERVED[kind])(error)
    else:
        assert says("REQUIRED")(error)


def test_for_a_misspelt_peft_type_the_closest_is_suggested(root: Path) -> None:
    edit_config(root / "a", peft_type="LOAR")
    assert says("UNKNOWN_METHOD", value="LOAR", closest="LORA")(refusal_of(root))
    edit_config(root / "a", peft_type="FOOBAR")
    ((_, why),) = refusal_of(root).violations
    assert why.params == {"value": "FOOBAR"}


# Tensors compared with the config

K = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("key", "value", "layers", "modules", "tensor"),
    [
        # Untargeted tensors and targets without tensors are both reported.
        ("target_modules", ["v_proj", "o_proj"], "01", "qo", "lora_A.weight"),
        ("rank_pattern", {r"layers\.1\..*": 8}, "1", "qv", "lora_A.weight"),
        ("use_dora", True, "01", "qv", "lora_magnitude_vector"),
        ("lora_bias", True, "01", "qv", "lora_B.bias"),
    ],
)
def test_tensors_that_contradict_the_config_are_all_named(
    root: Path, key: str, value: Any, layers: str, modules: str, tensor: str
) -> None:
    edit_config(root / "a", **{key: value})
    assert refused_fields(root) == {
        f"model.layers.{layer}.self_attn.{module}_proj.{tensor}"
        for layer in layers
        for module in modules
    }


@pytest.mark.parametrize("target", ["norm", "input_layernorm"])
def test_targets_that_cannot_be_adapted_are_named(root: Path, target: str) -> None:
    edit_config(root / "a", target_modules=["q_proj", "v_proj", target])
    error = refusal_of(root)
    assert any(
        field == "target_modules" and target in why.params["module"]
        for field, why in error.violations
    )


def test_dora_excludes_lora_bias(root: Path) -> None:
    edit_config(root / "a", use_dora=True, lora_bias=True)
    assert "lora_bias" in refused_fields(root)


def test_biases_must_be_declared_and_complete(tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True)
    base = base_of(model)
    save_adapter(model, lora_config(bias="lora_only"), tmp_path / "a")

    def fields() -> set[str]:
        checkpoint = read_adapter(tmp_path)
        with pytest.raises(AdapterCheckpointError) as caught:
            lower_checkpoint(checkpoint, base)
        return set(fields_of(caught.value))

    edit_config(tmp_path / "a", bias="none")
    attention = [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert fields() == {f"{a}.{m}_proj.bias" for a in attention for m in "qv"}
    edit_config(tmp_path / "a", bias="all")
    assert fields() == {f"{a}.{m}_proj.bias" for a in attention for m in "ko"}
    edit_config(tmp_path / "a", bias="lora_only")
    edit_tensors(tmp_path / "a", lambda tensors: {**tensors, f"{PREFIX}{K}.bias": torch.ones(32)})
    assert fields() == {f"{K}.bias"}


def test_a_bias_that_the_base_lacks_is_a_mismatch(tmp_path: Path) -> None:
    save_adapter(tiny_llama(attention_bias=True), lora_config(bias="all"), tmp_path / "a")
    with pytest.raises(AdapterMismatchError, check=says("NO_BASE_BIAS")):
        lower_checkpoint(read_adapter(tmp_path), base_of(tiny_llama()))


def test_an_adapter_without_lora_tensors_is_refused(root: Path) -> None:
    save_file({}, root / "a" / TENSORS_FILE)
    assert TENSORS_FILE in refused_fields(root)


@pytest.mark.parametrize(
    ("kind", "error"), [("add", AdapterCheckpointError), ("mismatch", AdapterMismatchError)]
)
def test_a_report_of_many_faults_stays_short(
    kind: str, error: type[AdapterCheckpointError | AdapterMismatchError]
) -> None:
    findings = Findings("a", "the base")
    for i in range(10 * MAX_REPORTED):
        for _ in range(2):
            getattr(findings, kind)(f"key{i}", say("UNKNOWN_FIELD", number=i))
    with pytest.raises(error) as caught:
        findings.raise_if_any()
    assert len(caught.value.violations) == MAX_REPORTED + 1
    assert caught.value.violations[-1] == ("", say("MORE", count=9 * MAX_REPORTED))
    assert caught.value.metadata["violation_count"] == str(10 * MAX_REPORTED)
    assert len(str(caught.value)) < 1000


def test_a_fault_that_many_keys_share_is_reported_once() -> None:
    findings = Findings("a")
    for i in range(10 * MAX_REPORTED):
        findings.add(f"layers.{i}.lora_A", say("WRONG_RANK", rank=4, by="the config", expected=i))
    findings.add("bias", say("REQUIRED"))
    with pytest.raises(AdapterCheckpointError) as caught:
        findings.raise_if_any()
    text = caught.value.message
    assert (text.count("layers.0.lora_A"), text.count("639"), text.count("bias")) == (1, 1, 1)
    assert len(text) < 500


def test_faults_of_the_checkpoint_precede_mismatches_with_the_base() -> None:
    findings = Findings("a", "the base")
    findings.raise_if_any()
    findings.mismatch("q", say("NO_BASE_BIAS"))
    findings.add("r", say("REQUIRED"))
    assert (findings.fields, findings.mismatched) == ({"r"}, {"q"})
    with pytest.raises(AdapterCheckpointError, check=says("REQUIRED")):
        findings.raise_if_any()
