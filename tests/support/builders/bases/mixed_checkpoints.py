"""4-bit checkpoints with some modules in 16 bits, made and read by bitsandbytes alone."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb_functional
import torch
from bitsandbytes.nn.modules import Linear4bit
from builders.methods import quiet
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from turret.server.models.families import read_arch, transformers_config
from turret.server.models.loader import CheckpointTensors
from turret.server.models.model_source import ModelSource
from turret.server.models.weights.nf4 import Nf4Weight

# Modules in 16 bits, as in Unsloth's dynamic 4-bit checkpoints: whole modules of some layers.
UNSLOTH = ("lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn")


def save_4bit(plain: Path, folder: Path, skip: Sequence[str], **changes: Any) -> Path:
    """Quantise a model as its users do.

    Args:
        plain: A checkpoint in 16 bits.
        folder: The new checkpoint.
        skip: ``llm_int8_skip_modules``.
        changes: Changes to the ``BitsAndBytesConfig``.
    """
    wanted = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "llm_int8_skip_modules": list(skip) or None,
    }
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**wanted | changes)
        )
        model.save_pretrained(folder)
    for file in plain.iterdir():
        if "token" in file.name:
            shutil.copy(file, folder)
    return folder


def tensors_4bit(source: ModelSource) -> dict[str, torch.Tensor]:
    """The tensors of a model in the cache, as a bitsandbytes-4bit checkpoint has them."""
    arch = read_arch(transformers_config(source.files))
    stored = CheckpointTensors(source, arch.experts)
    held = load_file(source.weights / "model.safetensors")
    tensors = {name: tensor for name, tensor in held.items() if ":" not in name}
    assert len(tensors) < len(held)
    for modules in (each for n in range(arch.num_layers) for each in arch.projections(n)):
        for path, out, inner in modules:
            weight = stored.weight(f"{path}.weight", (out, inner))
            if isinstance(weight, Nf4Weight):
                tensors |= weight.to_tensors(f"{path}.weight")
    return tensors


def load_4bit(folder: Path) -> tuple[Any, Any]:
    """The checkpoint's model in transformers: exact in fp32, and as it computes in bf16."""
    half: Any
    with quiet():
        half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    exact: Any = copy.deepcopy(half)
    for name, module in list(exact.named_modules()):
        if isinstance(module, Linear4bit):
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            packed: Any = module.weight
            state = copy.deepcopy(packed.quant_state)
            state.dtype = torch.float32
            weight = bnb_functional.dequantize_4bit(packed.data, state)
            dense.weight = torch.nn.Parameter(weight)
            dense.bias = module.bias
            exact.set_submodule(name, dense)
    # Otherwise PEFT and transformers would treat the model as quantised.
    exact.is_loaded_in_4bit = exact.is_quantized = False
    exact.quantization_method = None
    del exact.config.quantization_config
    return exact.float().eval(), half.eval()
