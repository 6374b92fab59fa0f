"""Methods that adapt linear modules, served by the engine and compared with PEFT's forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders.methods import ALL
from method_oracle import check_methods

VARIANTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
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


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("method", VARIANTS)
async def test_scores_and_answers_are_pefts(method: str, architecture: str, tmp_path: Path) -> None:
    await check_methods(architecture, tmp_path, VARIANTS[method])


@pytest.mark.parametrize("architecture", ["mistral", "qwen3"])
async def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    first = {name: next(iter(variants.values())) for name, variants in VARIANTS.items()}
    await check_methods(architecture, tmp_path, first)
