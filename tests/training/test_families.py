"""Scaled and capped logits, and fused modules: training and serving give the same results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.mixed_checkpoints import tensors_4bit
from builders.training import resolve_tiny
from gguf_oracle import transformers_state
from safetensors import safe_open
from safetensors.torch import save_file
from said import says
from servers.engine_harness import EngineHarness, make_request

from turret.server.models.sources.check import find_gguf
from turret.training.base_model import find_base, load_model
from turret.training.batches import IGNORED, make_batch
from turret.training.loss import LossFunction
from turret.training.trainer import Trainer
from turret.training.words import ConfigError


@pytest.mark.parametrize("architecture", ["gemma2", "granite"])
def test_the_loss_matches_the_models_own_logits(
    architecture: str, tmp_path: Path, tiny_model: Any
) -> None:
    folder = tiny_model(architecture)
    resolved = resolve_tiny(tmp_path, folder, "data.loss_on=all")
    batch = make_batch(resolved.dataset.train[:3], pad=0, is_packed=False)
    model = load_model(find_base(folder), "nf4-dense", torch.float32, "cpu")
    found = LossFunction(model, model.get_output_embeddings(), "cpu")(batch)
    with torch.no_grad():
        logits = model(input_ids=batch.tokens).logits[:, -batch.targets.shape[1] :]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


async def test_one_factor_over_a_fused_module_is_trained_and_served(
    tmp_path: Path, tiny_model: Any
) -> None:
    folder = tiny_model("phi3")
    run = Trainer(resolve_tiny(tmp_path, folder, "method.targets=all-linear")).run().folder.path
    adapter = run / "adapter"
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert set(targets) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        fused = file.get_tensor("base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight")
    assert fused.shape[0] == 128 + 2 * 64
    async with EngineHarness.start(folder, run, adapters=["adapter"]) as harness:
        answers = await harness.run_all(
            [make_request([5, 6, 7]), make_request([5, 6, 7], "adapter")]
        )
    assert answers[0].logprobs != answers[1].logprobs


@pytest.mark.parametrize("architecture", ["gemma3", "mistral3"])
async def test_the_text_part_of_a_model_is_trained_and_served(
    architecture: str, tmp_path: Path, tiny_model: Any
) -> None:
    folder = tiny_model(architecture)
    run = Trainer(resolve_tiny(tmp_path, folder)).run().folder.path
    async with EngineHarness.start(folder, run, adapters=["adapter"]) as harness:
        answers = await harness.run_all(
            [make_request([5, 6, 7], *names, score=True) for names in ((), ("adapter",))]
        )
    assert answers[0].prompt_logprobs != answers[1].prompt_logprobs
    with pytest.raises(ConfigError, check=says("TEXT_PART_NEEDS_NF4")):
        load_model(find_base(folder), "full", torch.float32, "cpu")


async def test_the_text_part_of_a_4_bit_checkpoint_is_trained_and_served(
    tmp_path: Path, tiny_model: Any
) -> None:
    """Unsloth publishes such checkpoints, with the names of the whole model."""
    folder = tiny_model("gemma3")
    plain = find_base(folder)
    tensors = tensors_4bit(plain.source)
    named = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    named["vision_tower.weight"] = torch.ones(2, 2)
    save_file(named, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    packed = find_base(folder)
    assert packed.source.weights == folder
    prompt = torch.tensor([[5, 6, 7, 8]])
    found, expected = (
        load_model(base, "nf4-dense", torch.float32, "cpu")(prompt).logits
        for base in (packed, plain)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    run = Trainer(resolve_tiny(tmp_path, folder)).run().folder.path
    async with EngineHarness.start(folder, run, adapters=["adapter"]) as harness:
        answers = await harness.run_all(
            [make_request([5, 6, 7], *names, score=True) for names in ((), ("adapter",))]
        )
    assert answers[0].prompt_logprobs != answers[1].prompt_logprobs


def test_unsupported_text_models_are_refused(tiny_model: Any) -> None:
    with pytest.raises(ConfigError, check=says("NO_TEXT_MODEL", model_type="qwen2_5_vl")):
        find_base(tiny_model("qwen2_5_vl"))


def test_the_embedded_model_has_the_weights_of_its_file_in_full_precision() -> None:
    model = load_model(find_base(None), "full", torch.float32, "cpu")
    expected = transformers_state(find_gguf())
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16).float()), name
