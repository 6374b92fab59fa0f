"""Writes LoRA adapters with random weights, in PEFT's layout, for any base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from turret.server.models.decoding.arch import Arch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
# An update is then about a fifth of the base result at rank 16: enough to change the tokens, too
# little to make the model overflow.
_B_SPREAD = 0.05


def write_random_lora(
    folder: Path,
    *,
    arch: Arch,
    base_model: str,
    rank: int,
    seed: int,
    targets: Sequence[str] = ALL,
) -> None:
    """Write one adapter on the same projections of every layer.

    Args:
        folder: Made by this call.
        arch: The base's architecture.
        base_model: What the adapter claims to be trained on.
        rank: Of every module. The scale is 1.
        seed: Same seed, same weights.
        targets: Last components of the projections' paths.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    slices = [
        (path, rows, columns)
        for group in arch.linears().values()
        for path, rows, columns in group
        if path.rpartition(".")[2] in targets
    ]
    for layer in range(arch.num_layers):
        for path, out_features, in_features in slices:
            prefix = f"base_model.model.model.layers.{layer}.{path}"
            a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            b = torch.randn(out_features, rank, generator=generator) * _B_SPREAD
            tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = b.bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(path.rpartition(".")[2] for path, _, _ in slices),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_random_loras(
    root: Path, count: int, *, arch: Arch, base_model: str, rank: int
) -> list[str]:
    """Write ``lora-00``, ``lora-01``, … below ``root``; returns their names."""
    names = [f"lora-{number:02d}" for number in range(count)]
    for seed, name in enumerate(names):
        write_random_lora(root / name, arch=arch, base_model=base_model, rank=rank, seed=seed)
    return names
