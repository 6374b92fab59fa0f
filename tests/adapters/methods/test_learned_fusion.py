"""Learned fusion, served by the engine and compared with the paper's formula in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders.adapters import linear_modules
from builders.methods import ALL, load_adapter, make_config, save_adapter
from builders.mixes.fusions import PREFIX, delta_weight, fusion_oracle, save_fusion
from method_oracle import check_oracles, check_rounding, check_score, prompt_of, serve, twin
from servers.engine_harness import make_request
from torch import nn

from turret.server.adapters.adapter import AdapterRef

# Components of different methods and ranks, on partly overlapping modules.
COMPONENTS = {
    "lora": ("lora", {"r": 4}),
    "rslora": ("rslora", {"r": 9, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "adalora": ("adalora", {}),
    "vera": ("vera", {"target_modules": ["q_proj", "o_proj"]}),
    # A rank far above the others.
    "wide": ("lora", {"r": 127, "target_modules": ["q_proj", "up_proj"]}),
}
FUSIONS = {
    "two": (("lora", "rslora"), ("q_proj", "k_proj", "v_proj", "down_proj"), 8),
    "all": (tuple(COMPONENTS), tuple(ALL), 5),
    "narrow": (("vera", "rslora"), ("v_proj",), 16),
}


def save_all(architecture: str, root: Path) -> None:
    model = twin(architecture).model
    for seed, (name, (method, changes)) in enumerate(COMPONENTS.items()):
        save_adapter(model, make_config(method, **changes), root / name, seed=seed, strength=0.4)
    for seed, (name, (components, targets, d_k)) in enumerate(FUSIONS.items()):
        save_fusion(model, root, name, components, targets, d_k=d_k, seed=seed, strength=40.0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
async def test_scores_and_answers_match_the_formula(architecture: str, tmp_path: Path) -> None:
    save_all(architecture, tmp_path)
    base = twin(architecture)

    def oracles() -> Iterator[tuple[AdapterRef, nn.Module]]:
        for name in FUSIONS:
            for weight in (1.0, -0.6):
                oracle, fused = fusion_oracle(base.model, tmp_path, name, weight)
                yield AdapterRef(name=name, weight=weight), oracle
                # Check that the gates depend on the token.
                gates = torch.cat([m.gates[0] for m in fused.values()])
                assert gates.std(0).max() > 0.1

    await check_oracles(base, tmp_path, [*COMPONENTS, *FUSIONS], oracles())


async def test_a_mix_adds_the_fusion_to_the_others(tmp_path: Path) -> None:
    save_all("llama", tmp_path)
    base = twin("llama")
    lora = load_adapter(base.model, tmp_path / "lora")
    shifted = copy.deepcopy(base.model)
    with torch.no_grad():
        for path, linear in linear_modules(shifted).items():
            linear.weight -= 0.5 * delta_weight(lora.get_submodule(PREFIX + path))
    oracle, _ = fusion_oracle(shifted, tmp_path, "two", 0.7)
    prompt = prompt_of(21)
    mix = [AdapterRef(name="two", weight=0.7), AdapterRef(name="lora", weight=-0.5)]
    async with serve(base, tmp_path, adapters=["lora", "rslora", "two"]) as harness:
        for refs in (mix, mix[::-1]):
            check_score(
                await harness.run(make_request(prompt, *refs, score=True)), oracle, prompt, "mix"
            )


async def test_bfloat16_is_as_close_as_the_dense_formula_in_bfloat16(tmp_path: Path) -> None:
    save_all("llama", tmp_path)
    # The weights in bfloat16, which equal those in float32 except for one rounding.
    base = twin("llama", torch.bfloat16)
    exact, _ = fusion_oracle(base.model, tmp_path, "two")
    rounded, _ = fusion_oracle(base.model, tmp_path, "two", dtype=torch.bfloat16)
    await check_rounding(base, tmp_path, ["lora", "rslora", "two"], exact, rounded, 4)
