"""Arrow, served by the engine and compared with PEFT's routers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.methods import make_config, save_adapter
from builders.mixes.routers import arrow_model, save_router
from method_oracle import check_oracles, check_rounding, twin
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from turret.server.adapters.adapter import AdapterRef

LORAS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"lora_alpha": 3},
    "three": {"use_rslora": True},
    "four": {},
    "five": {},
}
# Experts, general LoRAs, and PEFT's config.
ROUTERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]] = {
    "two-of-three": (("one", "two", "three"), (), {"router_temperature": 0.7}),
    "best": (("three", "one", "five", "four"), (), {"top_k": 1}),
    "all": (("one", "two"), (), {"router_temperature": 3.0, "rng_seed": 11}),
    "subtracted": (("one", "two", "three"), ("four", "five"), {"router_temperature": 0.5}),
    "of-one": (("two", "one"), ("four",), {"top_k": 1}),
}


def save_all(architecture: str, root: Path) -> None:
    model = twin(architecture).model
    for seed, (name, keys) in enumerate(LORAS.items()):
        save_adapter(model, make_config("lora", **keys), root / name, seed=seed)
    for name, (experts, general, keys) in ROUTERS.items():
        save_router(model, root, name, experts, general, **keys)


def oracle_of(model: nn.Module, root: Path, name: str) -> nn.Module:
    experts, general, keys = ROUTERS[name]
    return arrow_model(model, root, experts, general, **keys)


class Weighted(nn.Module):
    """The change of a PEFT module, times a weight."""

    def __init__(self, module: nn.Module, base: nn.Module, weight: float) -> None:
        super().__init__()
        self.module, self.base, self.weight = module, base, weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.base(x)
        return base + self.weight * (self.module(x) - base)


def weighted(model: nn.Module, weight: float) -> nn.Module:
    """Change the router's weight, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, leaf = path.rpartition(".")
            whole = Weighted(model.get_submodule(path), module.get_base_layer(), weight)
            setattr(model.get_submodule(parent), leaf, whole)
    return model


@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen2", marks=pytest.mark.long)])
async def test_scores_and_answers_match_peft(architecture: str, tmp_path: Path) -> None:
    save_all(architecture, tmp_path)
    base = twin(architecture)

    def oracles() -> Iterator[tuple[AdapterRef, nn.Module]]:
        for name in ROUTERS:
            yield AdapterRef(name=name), oracle_of(base.model, tmp_path, name)
        half = weighted(oracle_of(base.model, tmp_path, "two-of-three"), -0.6)
        yield AdapterRef(name="two-of-three", weight=-0.6), half

    await check_oracles(base, tmp_path, [*LORAS, *ROUTERS], oracles())


@pytest.mark.parametrize(
    "name", ["two-of-three", pytest.param("subtracted", marks=pytest.mark.long)]
)
async def test_bfloat16_is_as_close_as_peft_in_bfloat16(name: str, tmp_path: Path) -> None:
    base = twin("llama", torch.bfloat16)
    for seed, (lora, keys) in enumerate(LORAS.items()):
        save_adapter(
            base.model, make_config("lora", **keys), tmp_path / lora, seed=seed, strength=0.3
        )
    experts, general, keys = ROUTERS[name]
    save_router(base.model, tmp_path, name, experts, general, **keys)
    exact = oracle_of(base.model, tmp_path, name)
    # The adapters are served in bfloat16, too; PEFT would keep loaded ones in float32.
    rounded = copy.deepcopy(exact).bfloat16()
    await check_rounding(base, tmp_path, [*LORAS, name], exact, rounded)
