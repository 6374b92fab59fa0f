"""Operators compared with PEFT's forward pass, for every switch that changes the function."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from builders.adapters import (
    base_of,
    edit_config,
    edit_tensors,
    linear_modules,
    load_with_peft,
    logits,
    lora_config,
    save_peft_adapter,
    tiny_llama,
    with_operators,
)
from said import says

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.adapters.lowering.lowered import Lowered
from turret.server.adapters.methods import METHODS, method_for
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.adapters.peft_format import reading
from turret.server.errors import (
    AdapterCheckpointError,
    AdapterMismatchError,
    BudgetExceededError,
)

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = r".*\.self_attn\.(q|k|v|o)_proj"


def read(directory: Path) -> AdapterCheckpoint:
    return read_checkpoint(AdapterRoot(directory.parent), directory.name, max_elements=1 << 24)


def lower(directory: Path, base: BaseModel, max_rank: int | None = None) -> Lowered:
    checkpoint = read(directory)
    return lower_checkpoint(checkpoint, base, max_rank)[1]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


SWITCHES = {
    "plain": {},
    "all_modules": {"target_modules": ALL},
    "all_linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True, "target_modules": ALL},
    "rank_pattern": {
        "target_modules": ALL,
        "rank_pattern": {r".*layers\.1\..*(q|down)_proj": 7, "v_proj": 2},
    },
    "alpha_pattern": {
        "target_modules": ALL,
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, r"mlp\..*": 21},
    },
    "rank_and_alpha_rslora": {
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 9, "k_proj": 1},
        "alpha_pattern": {"o_proj": 5, r"layers\.1\.mlp\.up_proj": 2.5},
    },
    "dora": {"use_dora": True, "target_modules": ALL},
    "dora_rslora_patterns": {
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ALL,
        "rank_pattern": {"down_proj": 8},
        "alpha_pattern": {"v_proj": 32},
    },
    "lora_bias": {"lora_bias": True, "target_modules": ALL},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "dora_bias_all": {"use_dora": True, "bias": "all"},
    "lora_bias_and_bias": {"lora_bias": True, "bias": "lora_only"},
    "layers_to_transform": {"layers_to_transform": [1], "target_modules": ALL},
    "layers_pattern": {
        "layers_to_transform": 0,
        "layers_pattern": "layers",
        "target_modules": ["down_proj", "q_proj"],
    },
    "exclude_list": {"target_modules": ALL, "exclude_modules": ["layers.0.mlp.up_proj", "k_proj"]},
    "exclude_regex": {"target_modules": "all-linear", "exclude_modules": r".*\.0\.mlp\..*"},
    "regex_targets": {"target_modules": ATTENTION},
    "exact_name_skips_layers": {
        "target_modules": ["model.layers.0.mlp.down_proj", "o_proj"],
        "layers_to_transform": [1],
    },
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("attention_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_operators_compute_what_peft_computes(
    tmp_path: Path, switch: str, attention_bias: bool
) -> None:
    model = tiny_llama(attention_bias=attention_bias, dtype=torch.float64)
    directory = tmp_path / "adapter"
    save_peft_adapter(model, lora_config(**SWITCHES[switch]), directory)
    expected = logits(load_with_peft(model, directory))
    lowered = lower(directory, base_of(model))
    found = logits(with_operators(model, [(lowered.operators, 1.0)]))
    # The adapter must have an effect. Gains and biases are fp32.
    assert relative_error(logits(model), expected) > 0.05
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("switch", ["plain", "dora", "rank_and_alpha_rslora", "lora_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_file_dtype_is_read_exactly(tmp_path: Path, switch: str, dtype: torch.dtype) -> None:
    model = tiny_llama(attention_bias=True)
    directory = tmp_path / "adapter"
    save_peft_adapter(model, lora_config(**SWITCHES[switch]), directory)
    edit_tensors(directory, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    expected = logits(load_with_peft(model, directory))
    found = logits(with_operators(model, [(lower(directory, base_of(model)).operators, 1.0)]))
    assert relative_error(found, expected) < 1e-5


def test_scale_is_rounded_once(tmp_path: Path) -> None:
    model = tiny_llama()
    directory = tmp_path / "adapter"
    save_peft_adapter(model, lora_config(lora_alpha=7), directory)
    tensors = read(directory).tensors
    operators = lower(directory, base_of(model, dtype=torch.bfloat16)).operators
    for name, module in operators.modules.items():
        assert module.low_rank is not None
        b = tensors[f"{name}.lora_B.weight"].double() * (7 / 4)
        assert module.low_rank.b.dtype == torch.bfloat16
        assert torch.equal(module.low_rank.b, b.float().T.to(torch.bfloat16))
        assert module.low_rank.a.is_contiguous()
        assert module.low_rank.b.is_contiguous()


@torch.no_grad()
def test_a_mix_is_the_weighted_sum_of_deltas_with_dora(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.float64, attention_bias=True)
    configs = [lora_config(), lora_config(use_dora=True, r=3), lora_config(bias="all")]
    mix = []
    for i, config in enumerate(configs):
        save_peft_adapter(model, config, tmp_path / f"a{i}", seed=i)
        weight = (0.7, -0.5, 2.0)[i]
        mix.append((lower(tmp_path / f"a{i}", base_of(model)).operators, weight))
    path = "model.layers.1.self_attn.q_proj"
    linear = linear_modules(model)[path]
    x = torch.randn(5, 64, dtype=torch.float64)
    base = linear(x)
    expected = base.clone()
    for i, (_, weight) in enumerate(mix):
        peft_model = load_with_peft(model, tmp_path / f"a{i}")
        adapted = peft_model.get_submodule(f"base_model.model.{path}")
        expected += weight * (adapted(x) - base)
    found = with_operators(model, mix).get_submodule(path)(x)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("shape", ["flat", "row", "column"])
@pytest.mark.parametrize(
    "spelling",
    ["lora_magnitude_vector", "lora_magnitude_vector.weight", "weight_m_wdecomp.weight"],
)
def test_magnitude_spellings(tmp_path: Path, spelling: str, shape: str) -> None:
    model = tiny_llama()
    directory = tmp_path / "adapter"
    save_peft_adapter(model, lora_config(use_dora=True), directory)
    expected = logits(load_with_peft(model, directory))

    def respell(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for key, value in tensors.items():
            if "magnitude" in key:
                key = key.replace("lora_magnitude_vector", spelling)
                value = {"flat": value, "row": value[None], "column": value[:, None]}[shape]
            result[key] = value.clone()
        return result

    edit_tensors(directory, respell)
    found = logits(with_operators(model, [(lower(directory, base_of(model)).operators, 1.0)]))
    assert relative_error(found, expected) < 1e-5


def test_dora_takes_its_norm_from_the_served_weight(tmp_path: Path) -> None:
    trained, served = tiny_llama(seed=0), tiny_llama(seed=0)
    with torch.no_grad():
        for linear in linear_modules(served).values():
            linear.weight.add_(0.02 * torch.randn_like(linear.weight))
    directory = tmp_path / "adapter"
    save_peft_adapter(trained, lora_config(use_dora=True), directory)
    expected = logits(load_with_peft(served, directory))
    found = logits(with_operators(served, [(lower(directory, base_of(served)).operators, 1.0)]))
    other = logits(with_operators(served, [(lower(directory, base_of(trained)).operators, 1.0)]))
    assert relative_error(found, expected) < 1e-5
    assert relative_error(other, expected) > 1e-3


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
    import dataclasses
    import gc
    import weakref

    model = tiny_llama()
    directory = tmp_path / "adapter"
    save_peft_adapter(model, lora_config(use_dora=True, target_modules=ALL), directory)
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
    lower(directory, dataclasses.replace(base, modules=modules))
    assert len(alive) == 14


def test_wrapper_prefixes_are_dropped(tmp_path: Path) -> None:
    model = tiny_llama()
    directory = tmp_path / "adapter"
    save_peft_adapter(model, lora_config(use_dora=True), directory)
    plain = lower(directory, base_of(model))

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
    wrapped = lower(directory, base_of(model))
    assert wrapped.operators.modules.keys() == plain.operators.modules.keys()
    for name, module in plain.operators.modules.items():
        other = wrapped.operators.modules[name]
        assert module.gain is not None
        assert other.gain is not None
        assert torch.equal(module.gain, other.gain)


def test_methods_are_discovered_and_report_themselves(tmp_path: Path) -> None:
    assert set(METHODS) >= {"lora", "dora"}
    model = tiny_llama()
    save_peft_adapter(model, lora_config(), tmp_path / "plain")
    save_peft_adapter(model, lora_config(use_dora=True), tmp_path / "dora")
    assert method_for(read(tmp_path / "plain")).name == "lora"
    assert method_for(read(tmp_path / "dora")).name == "dora"


def test_reports_ranks_targets_and_base_warnings(tmp_path: Path) -> None:
    model = tiny_llama()
    directory = tmp_path / "adapter"
    save_peft_adapter(model, lora_config(rank_pattern={"v_proj": 2}), directory)
    edit_config(directory, base_model_name_or_path="x/Other")
    lowered = lower(directory, base_of(model))
    assert lowered.ranks == (2, 4)
    assert lowered.target_modules == ("q_proj", "v_proj")
    assert lowered.base_model == "x/Other"
    assert len(lowered.warnings) == 1
    assert lowered.warnings[0].params["trained"] == "x/Other"
    edit_config(directory, base_model_name_or_path="unsloth/Tiny-Llama-unsloth-bnb-4bit")
    (stored,) = lower(directory, base_of(model)).warnings
    assert stored.reason == "OTHER_QUANTIZATION"
    edit_config(directory, base_model_name_or_path="unsloth/Tiny-Llama")
    assert lower(directory, base_of(model)).warnings == ()


def test_ambiguous_patterns_follow_the_file_and_warn(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.float64)
    directory = tmp_path / "adapter"
    config = lora_config(alpha_pattern={r".*\.q_proj": 3, r"self_attn\.q_proj": 40})
    save_peft_adapter(model, config, directory)
    expected = logits(load_with_peft(model, directory))
    lowered = lower(directory, base_of(model))
    found = logits(with_operators(model, [(lowered.operators, 1.0)]))
    assert relative_error(found, expected) < 1e-6
    assert lowered.warnings[0].params["field"] == "alpha_pattern"


def test_rank_over_the_limit_is_a_budget_error(tmp_path: Path) -> None:
    model = tiny_llama()
    directory = tmp_path / "adapter"
    save_peft_adapter(model, lora_config(r=9), directory)
    assert lower(directory, base_of(model), max_rank=9).ranks == (9,)
    with pytest.raises(BudgetExceededError, check=says("RANK_OVER_LIMIT", rank=9, max_rank=8)):
        lower(directory, base_of(model), max_rank=8)


def test_another_base_is_a_mismatch_that_names_every_module(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    directory = tmp_path / "adapter"
    save_peft_adapter(LlamaForCausalLM(config), lora_config(), directory)
    with pytest.raises(AdapterMismatchError) as caught:
        lower(directory, base_of(tiny_llama()))
    named = {field for field, _ in caught.value.violations}
    assert {f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in "qv"} <= named
    assert any("model.layers.2" in field for field in named)


def test_overflow_of_the_serving_dtype_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    directory = tmp_path / "adapter"
    save_peft_adapter(model, lora_config(lora_alpha=1e8), directory)
    with pytest.raises(AdapterCheckpointError, check=says("NOT_FINITE")):
        lower(directory, base_of(model, dtype=torch.float16))


def test_rslora_scale_uses_each_modules_rank(tmp_path: Path) -> None:
    model = tiny_llama()
    directory = tmp_path / "adapter"
    save_peft_adapter(model, lora_config(use_rslora=True, rank_pattern={"v_proj": 16}), directory)
    tensors = read(directory).tensors
    operators = lower(directory, base_of(model)).operators
    for leaf, rank in (("q_proj", 4), ("v_proj", 16)):
        name = f"model.layers.0.self_attn.{leaf}"
        low_rank = operators.modules[name].low_rank
        assert low_rank is not None
        expected = tensors[f"{name}.lora_B.weight"].T * (10 / math.sqrt(rank))
        torch.testing.assert_close(low_rank.b, expected)
