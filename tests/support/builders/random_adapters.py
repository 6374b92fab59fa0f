"""Random adapters in PEFT's layout, written without a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig

from turret.server.models.decoding import Arch
from turret.server.models.families import read_arch
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import default_cache_dir

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A LoRA of some kind; ``strength`` is about the size of Δ(x) relative to x."""

    name: str
    rank: int
    targets: Sequence[str] = ALL
    is_dora: bool = False
    is_rslora: bool = False
    has_bias: bool = False
    strength: float = 0.3


def arch_of(model: Path | None) -> Arch:
    """The architecture of a model directory, or of the bundled model."""
    folder = model or resolve_model(None, default_cache_dir()).files
    return read_arch(AutoConfig.from_pretrained(folder))


def write_adapter(root: Path, arch: Arch, spec: AdapterSpec, seed: int) -> None:
    """Write an adapter to ``root/spec.name`` for a model."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    alpha = 2 * spec.rank
    scaling = alpha / spec.rank**0.5 if spec.is_rslora else alpha / spec.rank
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(arch.num_layers):
        for slices in arch.linears().values():
            for path, rows, columns in slices:
                if path.rpartition(".")[2] not in spec.targets:
                    continue
                key = f"base_model.model.model.layers.{layer}.{path}"
                size = spec.strength / scaling / spec.rank**0.5
                tensors[f"{key}.lora_A.weight"] = noise(spec.rank, columns) / columns**0.5
                tensors[f"{key}.lora_B.weight"] = noise(rows, spec.rank) * size
                if spec.is_dora:
                    tensors[f"{key}.lora_magnitude_vector"] = 1.0 + 0.2 * noise(rows)
                if spec.has_bias:
                    tensors[f"{key}.lora_B.bias"] = noise(rows) * 0.1
    with warnings.catch_warnings():
        # Hide PEFT's advice for training.
        warnings.simplefilter("ignore")
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=alpha,
            target_modules=list(spec.targets),
            use_dora=spec.is_dora,
            use_rslora=spec.is_rslora,
            lora_bias=spec.has_bias,
            task_type="CAUSAL_LM",
        )
    folder = root / spec.name
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")
