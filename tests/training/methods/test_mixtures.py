"""Mixtures of experts: training with experts in NF4, and equal results in the server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from builders.bases.tiny_models import MIXTURES, load_oracle, save_tiny_model, served_weights
from builders.methods import load_adapter
from builders.training import resolve_tiny
from method_oracle import check_score
from safetensors import safe_open
from safetensors.torch import load_file
from said import says
from servers.engine_harness import EngineHarness, make_request

from turret.training.base_model import find_base, load_model
from turret.training.memory import estimate_memory
from turret.training.serving_cost import serving_cost
from turret.training.trainer import Trainer
from turret.training.words import ConfigError

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
WITH_EXPERTS = ("olmoe", "qwen3_moe")


@pytest.fixture(params=MIXTURES)
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return save_tiny_model(request.param, tmp_path / request.param)


@pytest.mark.parametrize("weights", ["nf4", "nf4-dense"])
def test_the_trained_model_is_the_served_model(model: Path, weights: str) -> None:
    """Every logit, and the gradient of the embeddings, equals that of transformers' model."""
    ours = load_model(find_base(model), weights, torch.float32, "cpu")  # type: ignore[arg-type]
    theirs = load_oracle(model, served_weights(model, torch.float32))
    found, expected = [], []
    for each, states in ((ours, found), (theirs, expected)):
        inputs = each.get_input_embeddings()(torch.tensor([PROMPT])).detach().requires_grad_()
        logits = each(inputs_embeds=inputs).logits
        logits.square().sum().backward()
        states += [logits.detach(), inputs.grad]
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max()
        # bitsandbytes' 4-bit product on a CPU rounds to bfloat16.
        bound = 1e-4 if weights == "nf4-dense" else 3e-2
        assert (one - other).abs().max() < bound * scale
    assert any(isinstance(m, Linear4bit) for m in ours.modules()) is (weights == "nf4")
    assert not [name for name, p in ours.named_parameters() if p.is_meta]


async def test_the_trained_adapter_is_served(model: Path, tmp_path: Path) -> None:
    has_experts = model.name in WITH_EXPERTS
    overrides = ("base.weights=nf4-dense", "base.dtype=float32")
    resolved = resolve_tiny(tmp_path, model, *overrides)
    run = Trainer(resolved).run().folder.path
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    experts = {"gate_proj", "up_proj", "down_proj"} if has_experts else set()
    assert set(config["target_modules"]) == attention | experts
    with safe_open(run / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
        of_experts = [name for name in names if ".experts." in name]
        if has_experts:
            assert "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight" in names
            assert any(file.get_tensor(name).abs().sum() for name in of_experts if "lora_B" in name)
        else:
            assert of_experts == []
    if model.name == "qwen3_moe":
        # PEFT matches the experts' names by the dense layers before them, which have the same
        # names.
        oracle = load_model(resolved.base, "nf4-dense", torch.float32, "cpu")
        oracle = resolved.method.attach(oracle, resolved.config.method, resolved.base)
        saved = load_file(run / "adapter" / "adapter_model.safetensors")
        named = {name.replace(".weight", ".default.weight"): t for name, t in saved.items()}
        assert oracle.load_state_dict(named, strict=False).unexpected_keys == []
    else:
        # On transformers' own experts, for which PEFT converts the factors.
        plain = load_oracle(model, served_weights(model, torch.float32))
        oracle = load_adapter(plain, run / "adapter")
    async with EngineHarness.start(model, run, dtype="float32", adapters=["adapter"]) as harness:
        alone, adapted = await harness.run_all(
            [make_request(PROMPT, *names, score=True) for names in ((), ("adapter",))]
        )
    assert alone.prompt_logprobs != adapted.prompt_logprobs
    check_score(adapted, oracle, PROMPT, model.name)


@pytest.mark.parametrize("model", ["qwen3_moe"], indirect=True)
def test_memory_and_cost_are_estimated_beforehand(model: Path, tmp_path: Path) -> None:
    resolved = resolve_tiny(tmp_path, model)
    estimate, cost = estimate_memory(resolved), serving_cost(resolved)
    rank, experts, per_token, hidden, inner = 8, 6, 3, 128, 64
    both = resolve_tiny(tmp_path, model, "method.targets=attention")
    # Gate, up and down of each expert in the second layer; the first layer has an MLP with the same
    # names.
    of_experts = experts * 3 * rank * (hidden + inner)
    mlp = 3 * rank * (hidden + resolved.base.arch.intermediate_size)
    assert estimate.num_parameters == estimate_memory(both).num_parameters + of_experts + mlp
    # A token uses some of the experts; the ranks of gate and up are concatenated.
    of_token = per_token * (2 * rank * (hidden + 2 * inner) + rank * (inner + hidden))
    assert cost.multiply_adds == serving_cost(both).multiply_adds + of_token + mlp


@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral"], indirect=True)
def test_settings_that_experts_do_not_support_are_rejected(model: Path, tmp_path: Path) -> None:
    if model.name == "mixtral":
        with pytest.raises(ConfigError, check=says("NO_TARGETS")):
            resolve_tiny(tmp_path, model, "method.targets=mlp")
    else:
        with pytest.raises(ConfigError, check=says("EXPERTS_UNSUPPORTED_BY", method="dora")):
            resolve_tiny(tmp_path, model, "method.name=dora")
    assert resolve_tiny(tmp_path, model, "method.name=dora", "method.targets=attention")
    with pytest.raises(ConfigError, check=says("UNKNOWN_TARGET", value="gate")):
        resolve_tiny(tmp_path, model, "method.targets=gate")
    with pytest.raises(ConfigError, check=says("EXPERTS_NEED_NF4")):
        load_model(find_base(model), "full", torch.float32, "cpu")
