"""Methods that adapt linear modules, served by the engine and compared with PEFT's forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders.bases.tiny_models import ARCHITECTURES
from builders.methods import ALL
from method_oracle import check_methods

COMMON = ("llama", "qwen2")
VARIANTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "lora": {
        "plain": ("lora", {"r": 8, "lora_alpha": 16}),
        "attention": ("lora", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}),
        "rslora": ("rslora", {"r": 6, "lora_alpha": 4}),
        "dora": ("dora", {"r": 4, "lora_alpha": 8}),
        "dora-rslora": ("dora", {"r": 5, "use_rslora": True, "target_modules": ["k_proj"]}),
        "patterns": (
            "lora",
            {
                "r": 4,
                "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2},
                "alpha_pattern": {"v_proj": 20, r".*\.0\.self_attn\.q_proj": 1},
            },
        ),
        "bias": ("lora", {"r": 4, "lora_alpha": 10, "lora_bias": True}),
    },
    "loha": {
        "plain": ("loha", {}),
        "attention": ("loha", {"r": 5, "target_modules": ["q_proj", "v_proj"], "alpha": 2.5}),
        "patterns": (
            "loha",
            {"rank_pattern": {"o_proj": 6, "v_proj": 1}, "alpha_pattern": {"o_proj": 9}},
        ),
        "one-layer": ("loha", {"layers_to_transform": [1]}),
    },
    "lokr": {
        "factors": ("lokr", {}),
        # The rank exceeds half of the sizes: PEFT keeps both factors whole, but still divides by
        # the rank.
        "whole": ("lokr", {"r": 64, "alpha": 80}),
        "both": ("lokr", {"decompose_both": True, "r": 1}),
        "factor-4": ("lokr", {"decompose_factor": 4, "r": 3}),
        "mixed": (
            "lokr",
            {"rank_pattern": {"q_proj": 16}, "target_modules": ["q_proj", "up_proj"]},
        ),
    },
    "ia3": {
        "inputs": ("ia3", {"target_modules": ALL, "feedforward_modules": ["down_proj", "q_proj"]}),
        "outputs": ("ia3", {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}),
        "default": ("ia3", {"target_modules": None, "feedforward_modules": None}),
    },
    "adalora": {
        "pruned": ("adalora", {}),
        "bias": ("adalora", {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]}),
    },
    "vera": {
        "saved": ("vera", {}),
        "drawn-again": ("vera", {"save_projection": False, "r": 11}),
        "narrow": ("vera", {"target_modules": ["k_proj"], "bias": "vera_only"}),
    },
}


@pytest.mark.parametrize("architecture", COMMON)
@pytest.mark.parametrize("method", VARIANTS)
async def test_scores_and_answers_match_peft(
    method: str, architecture: str, tmp_path: Path
) -> None:
    await check_methods(architecture, tmp_path, VARIANTS[method])


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in COMMON])
async def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    """The prompts also cross a tile of attention (128) and a window (24)."""
    first = {name: next(iter(variants.values())) for name, variants in VARIANTS.items()}
    some = {**first, "dora": VARIANTS["lora"]["dora"], "bias": VARIANTS["lora"]["bias"]}
    await check_methods(architecture, tmp_path, some, lengths=(140, 17, 1))
