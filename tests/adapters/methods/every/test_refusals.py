"""Inconsistent config, tensors and base, for every method: each error names the fault."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders.adapters import (
    assert_alike,
    base_of,
    edit_config,
    edit_tensors,
    logits,
    lower_adapter,
    read_adapter,
    refusal_of,
    refused_fields,
    save_tiny,
    tiny_llama,
    with_operators,
)
from builders.methods import load_adapter, make_config, quiet, save_adapter
from peft import PeftType
from said import fields_of, says

from turret.server.adapters.methods import CONVERT, METHODS, UNSERVED, lokr, method_for
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.adapters.peft_format.config_rules import Irrelevant, Rejected, Used
from turret.server.cli import main
from turret.server.errors import AdapterCheckpointError, AdapterMismatchError, BudgetExceededError

Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}"
# The names in METHODS of the configs that ``make_config`` names differently.
SERVED = {"rslora": "lora"}
# Methods that other files test: PEFT does not create learned fusions (test_components.py), creates
# QA-LoRA only on GPTQ layers (test_lora_variants.py), and routers only for existing LoRAs
# (test_arrow.py, test_xlora.py).
ELSEWHERE = {"learned_fusion", "qalora", "arrow", "xlora"}
MADE = [method for name, method in METHODS.items() if name not in ELSEWHERE]
# Variants of LoRA; test_adapter_config.py tests their rules.
LORAS = METHODS["lora"].peft_types
VARIANTS = [m.name for m in MADE if m.peft_types == LORAS and m.name != "lora"]
NEW = [m.name for m in MADE if m.peft_types != LORAS]
BUILT = (*NEW, "lora", "rslora", *VARIANTS)
# Methods with the same reader.
LINEAR = (
    *("lora", *VARIANTS, "loha", "lokr", "ia3", "adalora", "vera"),
    *("beft", "pvera", "vblora", "delora", "miss", "gralora", "hra", "deft", "peanut", "glora"),
    "poly",
)
# tiny_llama's k and v are 64 -> 32.
SMALL = {"loha": {"r": 3}, "poly": {"n_tasks": 1}, "multitask_prompt": {"num_tasks": 1}}


def save(root: Path, method: str, **changes: Any) -> Path:
    return save_tiny(root, method, **{**SMALL.get(method, {}), **changes})


@pytest.mark.parametrize("method", BUILT)
def test_every_key_that_peft_writes_has_a_rule(method: str, tmp_path: Path) -> None:
    save(tmp_path, method)
    checkpoint = read_adapter(tmp_path)
    chosen = method_for(checkpoint)
    assert chosen.name == SERVED.get(method, method)
    fields = {field.name for field in dataclasses.fields(make_config(method))}
    assert fields | checkpoint.config.keys() <= chosen.rules.keys()
    assert all(isinstance(rule, (Used, Irrelevant, Rejected)) for rule in chosen.rules.values())


@pytest.mark.parametrize("method", [*NEW, "lora"])
def test_irrelevant_keys_change_nothing(method: str, tmp_path: Path) -> None:
    directory = save(tmp_path, method)
    base = base_of(tiny_llama())
    before = lower_adapter(tmp_path, base)
    rules = METHODS[method].rules
    keys = {key for key, rule in rules.items() if isinstance(rule, Irrelevant)}
    assert len(keys) > 4
    edit_config(directory, **dict.fromkeys(keys, 0.25))
    assert_alike(lower_adapter(tmp_path, base), before)


@pytest.mark.parametrize("method", NEW)
def test_unserved_values_and_unknown_keys_are_refused_by_name(method: str, tmp_path: Path) -> None:
    rules = METHODS[method].rules
    rejected = {key: "on" for key, rule in rules.items() if isinstance(rule, Rejected)}
    directory = save(tmp_path, method)
    edit_config(directory, **rejected, task_type="SEQ_CLS", a_key_from_the_future=1)
    assert rejected.keys() | {"task_type", "a_key_from_the_future"} <= refused_fields(tmp_path)


@pytest.mark.parametrize("method", NEW)
def test_unused_tensors_are_refused(method: str, tmp_path: Path) -> None:
    directory = save(tmp_path, method)
    strays = {f"{KEY}.lora_diag": torch.ones(3), "lycoris_x.alpha": torch.ones(1)}
    edit_tensors(directory, lambda tensors: {**tensors, **strays})
    assert {f"{Q}.lora_diag", "lycoris_x.alpha"} <= refused_fields(tmp_path)


@pytest.mark.parametrize("method", NEW)
def test_missing_tensors_are_refused(method: str, tmp_path: Path) -> None:
    directory = save(tmp_path, method)
    names = set(read_adapter(tmp_path).tensors)
    tensor_file = directory / "adapter_model.safetensors"
    whole = tensor_file.read_bytes()
    # One tensor per kind is enough, because the same code checks all modules.
    kinds = {name.rpartition(".")[2]: name for name in sorted(names)}
    for lost in kinds.values():
        tensor_file.write_bytes(whole)
        edit_tensors(
            directory,
            lambda tensors, lost=lost: {
                key: value
                for key, value in tensors.items()
                if key.removeprefix("base_model.model.") != lost
            },
        )
        fields = refused_fields(tmp_path)
        assert any(lost.startswith(field) or field.startswith(lost) for field in fields), lost


def _rename_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("layers.1.", "layers.7."): value for key, value in tensors.items()}


@pytest.mark.parametrize("method", LINEAR)
def test_modules_that_only_one_side_names_are_refused(method: str, tmp_path: Path) -> None:
    directory = save(tmp_path, method, target_modules=["q_proj", "down_proj"])
    edit_config(directory, target_modules=["q_proj", "up_proj"])
    fields = refused_fields(tmp_path)
    assert any(field.startswith("model.layers.0.mlp.down_proj.") for field in fields)
    assert any(field.startswith("model.layers.1.mlp.up_proj.") for field in fields)
    edit_config(directory, target_modules=["q_proj", "down_proj", "norm", "embed_tokens"])
    assert "target_modules" in refused_fields(tmp_path)
    edit_config(directory, target_modules=["q_proj", "down_proj", "lm_head"])
    assert any(field.startswith("lm_head.") for field in refused_fields(tmp_path))


@pytest.mark.parametrize("method", LINEAR)
def test_another_base_is_a_mismatch_that_names_the_modules(method: str, tmp_path: Path) -> None:
    directory = save(tmp_path, method)
    edit_tensors(directory, _rename_layer)
    with pytest.raises(AdapterMismatchError) as caught:
        lower_adapter(tmp_path, base_of(tiny_llama()))
    assert any("model.layers.7.mlp.up_proj" in field for field in fields_of(caught.value))


@pytest.mark.parametrize(
    "method", ["prefix_tuning", "prompt_tuning", "p_tuning", "multitask_prompt"]
)
def test_prompts_of_another_size_are_mismatches(method: str, tmp_path: Path) -> None:
    base = base_of(tiny_llama())
    save(tmp_path, method)
    lower_adapter(tmp_path, base)
    # PEFT's token_dim of a prefix is the width of the key-value heads.
    other = dataclasses.replace(base, hidden_size=128, head_dim=32)
    with pytest.raises(AdapterMismatchError) as caught:
        lower_adapter(tmp_path, other)
    assert "token_dim" in fields_of(caught.value)
    if method == "prefix_tuning":
        for changed in ({"num_layers": 3}, {"num_kv_heads": 4, "head_dim": 8}):
            with pytest.raises(AdapterMismatchError):
                lower_adapter(tmp_path, dataclasses.replace(base, **changed))


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_a_prompt_must_have_the_shape_that_its_config_states(method: str, tmp_path: Path) -> None:
    directory = save(tmp_path, method)
    edit_config(directory, num_virtual_tokens=6)
    assert "prompt_embeddings" in refused_fields(tmp_path)
    edit_config(directory, num_virtual_tokens=..., token_dim=0)
    assert {"num_virtual_tokens", "token_dim"} <= refused_fields(tmp_path)


def test_ranks_must_be_those_of_the_config(tmp_path: Path) -> None:
    for method, changes, field in (
        ("loha", {"r": 2}, "hada_w1_a"),
        ("lokr", {"r": 1}, "lokr_w2_a"),
        ("adalora", {"init_r": 6}, "lora_E"),
        ("vera", {"r": 15}, "vera_lambda_d"),
        ("lora", {"r": 15}, "lora_A.weight"),
    ):
        root = tmp_path / method
        directory = save(root, method)
        edit_config(directory, **changes)
        if method == "adalora":
            edit_config(directory, rank_pattern=None)
        assert any(f.endswith(f".{field}") for f in refused_fields(root)), method


def test_a_loha_rank_past_the_bound_is_refused(tmp_path: Path) -> None:
    base = base_of(tiny_llama())
    # 64 -> 64: 5² · 128 < 64² <= 6² · 128; 64 -> 32: 4² · 96 < 64 · 32 <= 5² · 96.
    save(tmp_path, "loha", r=5, target_modules=["q_proj", "o_proj"])
    assert lower_adapter(tmp_path, base).ranks == (5,)
    for changes in ({"r": 6, "target_modules": ["q_proj"]}, {"r": 5, "target_modules": ["v_proj"]}):
        save(tmp_path, "loha", **changes)
        with pytest.raises(BudgetExceededError, check=says("RANK_TOO_COSTLY")) as caught:
            lower_adapter(tmp_path, base)
        assert any(field.startswith("model.layers.0.") for field, _ in caught.value.violations)


@pytest.mark.parametrize(
    ("method", "rank"),
    [("lora", 4), ("dora", 4), ("loha", 3), ("lokr", 2), ("adalora", None), ("vera", 16)],
)
def test_rank_over_the_limit_is_a_budget_error(
    method: str, rank: int | None, tmp_path: Path
) -> None:
    base = base_of(tiny_llama())
    save(tmp_path, method)
    checkpoint = read_adapter(tmp_path)
    # The rank of a pruned AdaLoRA is the number of its remaining ranks.
    rank = rank or max(len(t) for n, t in checkpoint.tensors.items() if n.endswith("lora_E"))
    assert lower_checkpoint(checkpoint, base, rank)[1].ranks[-1] == rank
    with pytest.raises(BudgetExceededError, check=says("RANK_OVER_LIMIT", rank=rank)):
        lower_checkpoint(checkpoint, base, rank - 1)


def test_an_adalora_leaves_modules_of_rank_zero_unchanged(tmp_path: Path) -> None:
    directory = save(tmp_path, "adalora")
    pruned = [n for n, t in read_adapter(tmp_path).tensors.items() if 0 in t.shape]
    assert len(pruned) == 3
    module = pruned[0].rpartition(".")[0]
    lowered = lower_adapter(tmp_path, base_of(tiny_llama()))
    assert module not in lowered.operators.modules
    edit_config(directory, rank_pattern={f"{Q}.lora_E": [True] * 3, "nowhere.lora_E": [True]})
    assert "rank_pattern" in refused_fields(tmp_path)
    edit_config(directory, rank_pattern={f"{Q}.lora_E": [1, 0, 1, 1, 1]})
    assert "rank_pattern" in refused_fields(tmp_path)


@pytest.mark.parametrize("alpha", [0, -3])
def test_adalora_alpha_that_peft_would_replace_is_refused(alpha: int, tmp_path: Path) -> None:
    edit_config(save(tmp_path, "adalora"), lora_alpha=alpha)
    assert refused_fields(tmp_path) == {"lora_alpha"}


def test_ia3_vectors_must_be_on_the_side_that_the_config_states(tmp_path: Path) -> None:
    directory = save(tmp_path, "ia3")
    edit_config(directory, feedforward_modules=["up_proj"])
    fields = refused_fields(tmp_path)
    assert "model.layers.1.mlp.up_proj.ia3_l" in fields
    assert "model.layers.1.mlp.down_proj.ia3_l" in fields
    edit_config(directory, feedforward_modules=...)
    assert "feedforward_modules" in refused_fields(tmp_path)
    edit_config(directory, feedforward_modules="(((")
    assert "feedforward_modules" in refused_fields(tmp_path)


def test_vera_projections_must_be_saved_if_the_config_says_so(tmp_path: Path) -> None:
    edit_config(save(tmp_path, "vera"), save_projection=False)
    assert {"base_model.vera_A", "base_model.vera_B"} <= refused_fields(tmp_path)
    edit_config(save(tmp_path, "vera", save_projection=False), save_projection=True)
    assert {"base_model.vera_A", "base_model.vera_B"} <= refused_fields(tmp_path)
    directory = save(tmp_path, "vera", save_projection=False)
    warning = lower_adapter(tmp_path, base_of(tiny_llama())).warnings[-1]
    assert (warning.reason, warning.params["seed"]) == ("DRAWN_AGAIN", "projection_prng_key")
    edit_config(directory, projection_prng_key=...)
    assert refused_fields(tmp_path) == {"projection_prng_key"}


def test_lokr_factors_must_be_complete_and_unambiguous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save(tmp_path, "lokr", target_modules=["q_proj"])

    def double(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, f"{KEY}.lokr_w2": torch.ones(8, 8)}

    edit_tensors(directory, double)
    assert f"{Q}.lokr_w2" in refused_fields(tmp_path)
    directory = save(tmp_path, "lokr", target_modules=["q_proj"])
    edit_tensors(directory, lambda tensors: {**tensors, f"{KEY}.lokr_w1": torch.ones(8, 7)})
    with pytest.raises(AdapterMismatchError, check=says("WRONG_WIDTH", inputs=56, outputs=64)):
        lower_adapter(tmp_path, base_of(tiny_llama()))

    def swap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors in which the first factor has the size of the whole weight."""
        result = {key: value for key, value in tensors.items() if ".lokr_" not in key}
        for layer in (0, 1):
            key = KEY.replace("layers.0", f"layers.{layer}")
            result[f"{key}.lokr_w1_a"] = torch.ones(64, 2)
            result[f"{key}.lokr_w1_b"] = torch.ones(2, 64)
            result[f"{key}.lokr_w2"] = torch.ones(1, 1)
        return result

    edit_tensors(directory, swap)
    monkeypatch.setattr(lokr, "_MAX_WHOLE", 1000)
    assert f"{Q}.lokr_w1_a" in refused_fields(tmp_path)


@pytest.mark.parametrize("method", ["loha", "lokr"])
@pytest.mark.parametrize("name", [f"{KEY}.hada_t1", f"{KEY}.lokr_t2", "lycoris_q.hada_w1_a"])
def test_other_layouts_are_refused(method: str, name: str, tmp_path: Path) -> None:
    directory = save(tmp_path, method)
    edit_tensors(directory, lambda tensors: {**tensors, name: torch.ones(2, 2)})
    field = name.removeprefix("base_model.model.")
    expected = "LYCORIS_LAYOUT" if name.startswith("lycoris_") else "UNKNOWN_TENSOR"
    assert (field, expected) in [(n, why.reason) for n, why in refusal_of(tmp_path).violations]


# Methods that cannot overflow: vectors and rotations of pairs are always fp32, the length of a
# reflection's vector has no effect, and an exact Cayley transform stays a rotation.
FINITE = ("ia3", "beft", "ln_tuning", "hra", "road", "boft")


@pytest.mark.parametrize("method", [name for name in NEW if name not in FINITE])
def test_overflow_of_the_serving_dtype_is_refused(method: str, tmp_path: Path) -> None:
    directory = save(tmp_path, method)

    def enlarge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Positions are integers, which are always finite.
        return {
            key: value * 1e6 if value.is_floating_point() else value
            for key, value in tensors.items()
        }

    edit_tensors(directory, enlarge)
    with pytest.raises(AdapterCheckpointError, check=says("NOT_FINITE", dtype=torch.float16)):
        lower_adapter(tmp_path, base_of(tiny_llama(), dtype=torch.float16))


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType])
def test_every_peft_type_is_served_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    served = {one for method in METHODS.values() for one in method.peft_types}
    assert (kind in served) != (kind in UNSERVED)
    if kind in UNSERVED:
        edit_config(save(tmp_path, "lora"), peft_type=kind)
        error = refusal_of(tmp_path)
        assert fields_of(error) == ["peft_type"]
        assert says("UNSUPPORTED_VALUE", value=kind, why=UNSERVED[kind])(error)


# The advice in errors about unsupported adapters leads to adapters that are served.


TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
# A small adapter of each kind for which the advice is a conversion.
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ADAMSS": (peft.AdamssConfig, {"r": 16, "num_subspaces": 3, "subspace_rank": 2}),
    "PSOFT": (peft.PsoftConfig, {"r": 4}),
}


CONVERTIBLE = {kind for kind, text in UNSERVED.items() if text.endswith(CONVERT)}


@pytest.mark.parametrize("kind", sorted(CONVERTIBLE))
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
    assert CONFIGS.keys() == CONVERTIBLE
    for kind in UNSERVED.keys() - CONVERTIBLE:
        named = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", UNSERVED[kind])) - {kind}
        assert named <= served, (kind, named - served)
        assert (
            named & {one.value for one in PeftType}
            or "train one of" in UNSERVED[kind]
            or ("load its LoRAs" in UNSERVED[kind])
        )
