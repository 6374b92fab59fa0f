"""The operators that are read from LoRAs, compared with PEFT's forward pass."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import (
    assert_alike,
    base_of,
    edit_config,
    edit_tensors,
    linear_modules,
    logits,
    lora_config,
    lower_adapter,
    read_adapter,
    refused_fields,
    tiny_llama,
    with_operators,
)
from builders.methods import ALL, load_adapter, make_config, quiet, save_adapter
from peft import PeftModel, get_peft_model

from turret.server.adapters.base import BaseModel
from turret.server.adapters.peft_format import reading


def save(root: Path, model: Any, **changes: Any) -> Path:
    save_adapter(model, lora_config(**changes), root / "a")
    return root / "a"


def served_logits(root: Path, model: Any, base: BaseModel | None = None) -> torch.Tensor:
    """The logits with the operators of the adapter, lowered on a base, by default the model's."""
    operators = lower_adapter(root, base or base_of(model)).operators
    return logits(with_operators(model, [(operators, 1.0)]))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Other files compare every switch with PEFT (test_drawn_configs.py).
SWITCHES = {
    "plain": {},
    "dora": {"use_dora": True, "target_modules": ALL},
    "rank_and_alpha_rslora": {
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 9, "k_proj": 1},
        "alpha_pattern": {"o_proj": 5, r"layers\.1\.mlp\.up_proj": 2.5},
    },
    "lora_bias": {"lora_bias": True, "target_modules": ALL},
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_file_dtype_is_read_exactly(tmp_path: Path, switch: str, dtype: torch.dtype) -> None:
    model = tiny_llama(attention_bias=True)
    directory = save(tmp_path, model, **SWITCHES[switch])
    edit_tensors(directory, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    expected = logits(load_adapter(model, directory))
    assert relative_error(served_logits(tmp_path, model), expected) < 1e-5


def test_scale_is_rounded_once(tmp_path: Path) -> None:
    model = tiny_llama()
    save(tmp_path, model, lora_alpha=7)
    tensors = read_adapter(tmp_path).tensors
    operators = lower_adapter(tmp_path, base_of(model, dtype=torch.bfloat16)).operators
    for name, module in operators.modules.items():
        assert module.low_rank is not None
        b = tensors[f"{name}.lora_B.weight"].double() * (7 / 4)
        assert module.low_rank.b.dtype == torch.bfloat16
        assert torch.equal(module.low_rank.b, b.float().T.to(torch.bfloat16))
        assert module.low_rank.a.is_contiguous()
        assert module.low_rank.b.is_contiguous()


@pytest.mark.parametrize("shape", ["flat", "row", "column"])
@pytest.mark.parametrize(
    "spelling",
    ["lora_magnitude_vector", "lora_magnitude_vector.weight", "weight_m_wdecomp.weight"],
)
def test_magnitude_spellings(tmp_path: Path, spelling: str, shape: str) -> None:
    model = tiny_llama()
    directory = save(tmp_path, model, use_dora=True)
    expected = logits(load_adapter(model, directory))

    def respell(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for key, value in tensors.items():
            if "magnitude" in key:
                key = key.replace("lora_magnitude_vector", spelling)
                value = {"flat": value, "row": value[None], "column": value[:, None]}[shape]
            result[key] = value.clone()
        return result

    edit_tensors(directory, respell)
    assert relative_error(served_logits(tmp_path, model), expected) < 1e-5


def test_dora_takes_its_norm_from_the_served_weight(tmp_path: Path) -> None:
    trained, served = tiny_llama(seed=0), tiny_llama(seed=0)
    with torch.no_grad():
        for linear in linear_modules(served).values():
            linear.weight.add_(0.02 * torch.randn_like(linear.weight))
    expected = logits(load_adapter(served, save(tmp_path, trained, use_dora=True)))
    assert relative_error(served_logits(tmp_path, served), expected) < 1e-5
    assert relative_error(served_logits(tmp_path, served, base_of(trained)), expected) > 1e-3


@pytest.mark.parametrize("elements", [1, 300, 1 << 24])
@pytest.mark.parametrize("shape", [(64, 97), (97, 64)])
def test_the_gain_does_not_depend_on_the_block(
    elements: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_ELEMENTS_PER_BLOCK", elements)
    generator = torch.Generator().manual_seed(3)
    # A strided weight, like the embedding's.
    weight = torch.randn(*reversed(shape), generator=generator).T
    a = torch.randn(4, shape[1], generator=generator)
    b = torch.randn(shape[0], 4, generator=generator)
    magnitude = torch.rand(1, shape[0], generator=generator) + 0.5
    gain = reading.dora_gain(magnitude, a, b, 2.5, weight)
    norm = (weight.double() + 2.5 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(gain.double(), magnitude.double()[0] / norm, rtol=1e-6, atol=0)
    assert gain.dtype == torch.float32


def test_dequantises_one_module_at_a_time(tmp_path: Path) -> None:
    model = tiny_llama()
    save(tmp_path, model, use_dora=True, target_modules=ALL)
    alive: list[weakref.ref[torch.Tensor]] = []

    def counted(weight: torch.Tensor) -> torch.Tensor:
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1
        copy = weight.clone()
        alive.append(weakref.ref(copy))
        return copy

    base = base_of(model)
    modules = {
        name: dataclasses.replace(m, dequantize=lambda m=m: counted(m.dequantize()))
        for name, m in base.modules.items()
    }
    lower_adapter(tmp_path, dataclasses.replace(base, modules=modules))
    assert len(alive) == 14


def test_wrapper_prefixes_are_dropped(tmp_path: Path) -> None:
    model = tiny_llama()
    directory = save(tmp_path, model, use_dora=True)
    plain = lower_adapter(tmp_path, base_of(model))

    def wrap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for key, value in tensors.items():
            key = key.replace(
                "base_model.model.", "_orig_mod.base_model.model._fsdp_wrapped_module."
            )
            key = key.replace("lora_A.weight", "lora_A.default.weight")
            key = key.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")
            result[key] = value
        return result

    edit_tensors(directory, wrap)
    assert_alike(lower_adapter(tmp_path, base_of(model)), plain)


def test_reports_ranks_targets_and_base_warnings(tmp_path: Path) -> None:
    base = base_of(tiny_llama())
    directory = save(tmp_path, tiny_llama(), rank_pattern={"v_proj": 2})
    edit_config(directory, base_model_name_or_path="x/Other")
    lowered = lower_adapter(tmp_path, base)
    assert lowered.ranks == (2, 4)
    assert lowered.target_modules == ("q_proj", "v_proj")
    assert lowered.base_model == "x/Other"
    assert len(lowered.warnings) == 1
    assert lowered.warnings[0].params["trained"] == "x/Other"
    edit_config(directory, base_model_name_or_path="unsloth/Tiny-Llama-unsloth-bnb-4bit")
    (stored,) = lower_adapter(tmp_path, base).warnings
    assert stored.reason == "OTHER_QUANTIZATION"
    edit_config(directory, base_model_name_or_path="unsloth/Tiny-Llama")
    assert lower_adapter(tmp_path, base).warnings == ()


def test_ambiguous_patterns_follow_the_file_and_warn(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.float64)
    patterns = {r".*\.q_proj": 3, r"self_attn\.q_proj": 40}
    expected = logits(load_adapter(model, save(tmp_path, model, alpha_pattern=patterns)))
    assert relative_error(served_logits(tmp_path, model), expected) < 1e-6
    warnings = lower_adapter(tmp_path, base_of(model)).warnings
    assert warnings[0].params["field"] == "alpha_pattern"


# PiSSA and OLoRA: PEFT converts them to plain LoRAs of the original base.


def train_a_little(peft_model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.5 * parameter.std() * noise)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_converted_adapter_is_the_trained_model(init: str, tmp_path: Path) -> None:
    model = tiny_llama()
    config = make_config("lora", init_lora_weights=init, target_modules=["q_proj", "down_proj"])
    with quiet():
        peft_model = get_peft_model(copy.deepcopy(model), config)
        assert isinstance(peft_model, PeftModel)
        peft_model.peft_config["default"].init_lora_weights = True  # type: ignore[attr-defined]
        peft_model.save_pretrained(str(tmp_path / "init"))
        peft_model.peft_config["default"].init_lora_weights = init  # type: ignore[attr-defined]
        train_a_little(peft_model)
        peft_model.save_pretrained(str(tmp_path / "raw"))
        expected = logits(peft_model.eval())
        peft_model.save_pretrained(
            str(tmp_path / "a"), path_initial_model_for_weight_conversion=str(tmp_path / "init")
        )
    assert lower_adapter(tmp_path, base_of(model)).ranks == (8,)
    assert relative_error(logits(model), expected) > 0.05
    assert relative_error(served_logits(tmp_path, model), expected) < 1e-4
    # Without the conversion, the adapter is for changed weights, which the server does not have.
    assert "init_lora_weights" in refused_fields(tmp_path, "raw")
