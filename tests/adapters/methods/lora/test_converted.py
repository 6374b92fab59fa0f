"""PiSSA and OLoRA: PEFT converts them to plain LoRAs of the original base."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from builders.adapters import base_of, logits, lower_adapter, refusal_of, tiny_llama, with_operators
from builders.methods import make_config, quiet
from peft import PeftModel, get_peft_model


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
    lowered = lower_adapter(tmp_path, base_of(model))
    found = logits(with_operators(model, [(lowered.operators, 1.0)]))
    assert lowered.ranks == (8,)
    assert (expected - logits(model)).norm() > 0.05 * expected.norm()
    assert (found - expected).norm() < 1e-4 * expected.norm()
    # Without the conversion, the adapter is for changed weights, which the server does not have.
    assert "init_lora_weights" in {field for field, _ in refusal_of(tmp_path, "raw").violations}
