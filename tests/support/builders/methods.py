"""Checkpoints of every method, as PEFT writes them, on small models."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT's advice to people who train is not about these tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_config(method: str, **changes: Any) -> PeftConfig:
    """A config of the method, adapting every linear module unless told otherwise."""
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "lora": (LoraConfig, {"r": 4, "lora_alpha": 6, "target_modules": ALL}),
        "rslora": (
            LoraConfig,
            {"r": 6, "lora_alpha": 3, "target_modules": ALL, "use_rslora": True},
        ),
        "dora": (LoraConfig, {"r": 4, "lora_alpha": 6, "target_modules": ALL, "use_dora": True}),
        "loha": (LoHaConfig, {"r": 4, "alpha": 5, "target_modules": ALL}),
        "lokr": (LoKrConfig, {"r": 2, "alpha": 3, "target_modules": ALL}),
        "ia3": (IA3Config, {"target_modules": ALL, "feedforward_modules": ["down_proj"]}),
        "adalora": (
            AdaLoraConfig,
            {"init_r": 5, "lora_alpha": 8, "target_modules": ALL, "total_step": 10},
        ),
        "vera": (VeraConfig, {"r": 16, "target_modules": ALL, "projection_prng_key": 3}),
        "prefix_tuning": (PrefixTuningConfig, {"num_virtual_tokens": 5}),
        "prompt_tuning": (PromptTuningConfig, {"num_virtual_tokens": 5}),
        "trainable_tokens": (TrainableTokensConfig, {"token_indices": [7, 2, 65, 40]}),
        "p_tuning": (PromptEncoderConfig, {"num_virtual_tokens": 5, "encoder_hidden_size": 16}),
    }
    kind, values = kinds[method]
    with quiet():
        return kind(**{**CAUSAL, **values, **changes})


def randomise(peft_model: nn.Module, seed: int, strength: float = 0.5) -> None:
    """Replaces every trained tensor, so that each one matters and updates are like weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(peft_model.named_parameters()):
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            columns = parameter.shape[-1] or 1
            if "lora_magnitude_vector" in name:
                value = parameter * (1.0 + 0.6 * strength * noise)
            elif "trainable_tokens_delta" in name or "modules_to_save" in name:
                # A row with some of the old one in it.
                value = parameter + strength * noise * parameter.std()
            elif "lora_embedding_A" in name:
                value = noise
            elif "lora_embedding_B" in name:
                value = strength * noise / 4
            elif "ia3_l" in name:
                value = 1.0 + strength * noise
            elif "vera_lambda_b" in name:
                value = strength * noise / 4
            elif ".hada_" in name:
                # The entries of a product are multiplied by those of another.
                value = (
                    noise * math.sqrt(strength) / (columns**0.25 if "_b" in name else columns**0.5)
                )
            elif "bias" in name:
                value = parameter + 0.3 * noise
            elif "prompt_encoder" in name:
                value = strength * noise
            elif "lora_E" in name or "vera_lambda_d" in name:
                value = noise
            else:  # lora_A, lora_B, lokr_*
                value = noise * math.sqrt(strength) / columns**0.5
            parameter.copy_(value.to(parameter.dtype))


def save_adapter(
    model: nn.Module,
    config: PeftConfig,
    directory: Path,
    *,
    seed: int = 1,
    strength: float = 0.5,
    share: bool = False,
) -> PeftModel:
    """Makes an adapter on a copy of ``model``, saves it in PEFT's layout and returns it."""
    with quiet(), torch.random.fork_rng():
        # PEFT draws what it makes from the global generator; a p-tuning encoder's biases keep it.
        torch.manual_seed(seed)
        peft_model = get_peft_model(copy_of(model, share), copy.deepcopy(config))
        assert isinstance(peft_model, PeftModel)
        randomise(peft_model, seed, strength)
        if isinstance(config, AdaLoraConfig) and config.rank_pattern is None:
            prune(peft_model, seed)
        peft_model.save_pretrained(str(directory))
    return peft_model


def prune(peft_model: PeftModel, seed: int) -> None:
    """Gives an AdaLoRA the rank pattern that training would leave: one module with no rank."""
    generator = torch.Generator().manual_seed(seed)
    pattern = {}
    for name, parameter in peft_model.get_base_model().named_parameters():
        if "lora_E" in name:
            pattern[name] = (torch.rand(len(parameter), generator=generator) < 0.6).tolist()
    first = next(iter(pattern))
    pattern[first] = [False] * len(pattern[first])
    peft_model.peft_config["default"].rank_pattern = pattern  # type: ignore[attr-defined]


def copy_of(model: nn.Module, share: bool = False) -> Any:
    """A copy; with ``share`` of the modules only, for adapters that leave the base's tensors."""
    tensors = (*model.parameters(), *model.buffers()) if share else ()
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def load_adapter(model: nn.Module, directory: Path, *, share: bool = False) -> PeftModel:
    """The oracle: PEFT's own reading of the directory on a copy of ``model``."""
    with quiet():
        return PeftModel.from_pretrained(copy_of(model, share), str(directory)).eval()
