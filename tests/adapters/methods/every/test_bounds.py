"""The accuracy of every method in bf16: its error relative to that of transformers + PEFT.

Errors are differences from fp32. Both use the weights that turret serves, so quantisation has no
effect. PEFT runs with its defaults: the base in bf16, the adapter's own tensors in fp32.
"""

from __future__ import annotations

import copy
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import (
    ARCHITECTURES,
    load_oracle,
    save_tiny_model,
    served_weights,
)
from builders.methods import ALL, load_adapter, make_config, save_adapter
from checkout import ROOT
from method_oracle import (
    check_effect,
    check_request,
    check_within_peer,
    found_scores,
    prompt_of,
    prompt_scores,
)
from servers.engine_harness import EngineHarness, make_request

LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 8, "lora_alpha": 12}),
    "qv": ("lora", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}),
    "bias": ("lora", {"lora_alpha": 10, "lora_bias": True}),
    "patterns": (
        "lora",
        {
            "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2},
            "alpha_pattern": {"v_proj": 20, r".*\.0\.self_attn\.q_proj": 1},
        },
    ),
    "rslora": ("rslora", {"r": 8}),
    "dora": ("dora", {"r": 8, "lora_alpha": 12}),
    "dora-rslora": (
        "dora",
        {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["k_proj", "down_proj"]},
    ),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **LORAS,
    "loha": ("loha", {"r": 4}),
    "lokr": ("lokr", {"r": 4, "alpha": 4}),
    "ia3": ("ia3", {}),
    "adalora": ("adalora", {"init_r": 8}),
    "vera": ("vera", {"r": 32}),
    "prefix_tuning": ("prefix_tuning", {"num_virtual_tokens": 20}),
    "prompt_tuning": ("prompt_tuning", {"num_virtual_tokens": 20}),
    "p_tuning": ("p_tuning", {"num_virtual_tokens": 20}),
    "trainable_tokens": ("trainable_tokens", {"token_indices": list(range(0, 250, 3))}),
    "whole": ("lora", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "low-rank": ("lora", {"target_modules": [*ALL, "embed_tokens", "lm_head"]}),
}
# Methods without an operator of their own, tested on one tiny model.
MADE_OF_OTHERS = (
    *("bd_lora", "kasa", "beft", "ln_tuning", "pvera", "vblora", "unilora", "tinylora"),
    *("delora", "miss", "gralora", "hra", "deft", "peanut", "glora", "cartridge"),
    # Some methods with their own operator.
    *("oft", "boft", "road", "c3a", "hira", "fourierft", "randlora", "osf", "frod", "bat"),
)
# Forms of methods.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {"bat": ("miss", {"init_weights": "bat"})}
# Errors of a few hidden states vary between draws, so several draws are averaged. This concerns
# soft prompts, to which all tokens attend (in six draws, the ratio was once 1.8, otherwise 0.7 to
# 1.04), and the largest update (rsLoRA: 1.2 or 1.3, by the order of sums in attention).
DRAWS = {"prompt_tuning": 4, "p_tuning": 4, "rslora": 4}
# For "low-rank", PEFT also saves embedding and head: 226 MB that test nothing else.
ON_SMOLLM2 = [name for name in METHODS if name != "low-rank"]
TEXTS = (
    "The lens turret of a microscope carries several objectives on one rotating mount, so that the"
    " observer can change the magnification without moving the specimen on the stage.",
    "SELECT name, age FROM users WHERE age > 30 ORDER BY name; -- all who are older than thirty,",
)


async def check_bf16(
    folder: Path | None,
    exact_base: Any,
    root: Path,
    texts: Sequence[list[int] | str],
    names: Sequence[str] = (),
) -> None:
    """Check some of the adapters below ``root``, by default all, and the base itself."""
    half = copy.deepcopy(exact_base).to(torch.bfloat16)
    names = names or sorted(os.listdir(root))
    ours, theirs = defaultdict[str, list[Any]](list), defaultdict[str, list[Any]](list)
    async with EngineHarness.start(folder, root, dtype="bfloat16", adapters=names) as harness:
        encode = harness.tokenizer.encode
        prompts = [encode(text) if isinstance(text, str) else text for text in texts]
        for name in ("", *names):
            # KaSA changes the base's own weights.
            share = name != "kasa"
            exact = load_adapter(exact_base, root / name, share=share) if name else exact_base
            peer = load_adapter(half, root / name, share=share) if name else half
            method = name.partition("-draw-")[0]
            for prompt in prompts:
                expected = prompt_scores(exact, prompt)
                answer = await harness.run(make_request(prompt, name, score=True))
                ours[method].append(found_scores(answer) - expected)
                theirs[method].append(prompt_scores(peer, prompt) - expected)
    for method, errors in ours.items():
        check_within_peer(errors, theirs[method], method)


def save_all(model: Any, root: Path, strength: float, names: Sequence[str]) -> None:
    for seed, name in enumerate(names):
        method, keys = (METHODS | FORMS).get(name, (name, {}))
        for draw in range(DRAWS.get(name, 1)):
            folder = root / (f"{name}-draw-{draw}" if draw else name)
            chosen = draw if name in DRAWS else seed
            save_adapter(model, make_config(method, **keys), folder, seed=chosen, strength=strength)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_nf4_tiny_models_in_bf16(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny_model(architecture, tmp_path / "model")
    base = load_oracle(folder, served_weights(folder, torch.bfloat16))
    names = METHODS if architecture in ("llama", "qwen2") else LORAS
    save_all(base, tmp_path / "adapters", 0.3, list(names))
    prompts = [prompt_of(length, length) for length in (60, 150, 200, 97)]
    await check_bf16(folder, base, tmp_path / "adapters", prompts)


async def test_methods_made_of_others_in_bf16(tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path / "model")
    base = load_oracle(folder, served_weights(folder, torch.bfloat16))
    save_all(base, tmp_path / "adapters", 0.3, MADE_OF_OTHERS)
    prompts = [prompt_of(length, length) for length in (60, 150, 200)]
    await check_bf16(folder, base, tmp_path / "adapters", prompts)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """SmolLM2 and its adapters, which change each of its 30 layers less than on a tiny model."""
    model = load_oracle(None, served_weights(None, torch.float32))
    root = tmp_path_factory.mktemp("embedded")
    save_all(model, root, 0.1, ON_SMOLLM2)
    return model, root


@pytest.mark.long
async def test_smollm2_in_fp32(embedded: tuple[Any, Path]) -> None:
    """A score and an answer are within 1e-4 of PEFT's forward pass."""
    model, root = embedded
    prompt = prompt_of(21)
    async with EngineHarness.start(None, root, adapters=ON_SMOLLM2) as harness:
        for name in ON_SMOLLM2:
            oracle = load_adapter(model, root / name, share=True)
            check_effect(oracle, model, prompt, name)
            await check_request(harness, oracle, prompt, name, max_tokens=2)


@pytest.mark.long
async def test_smollm2_in_bf16(embedded: tuple[Any, Path]) -> None:
    exact = load_oracle(None, served_weights(None, torch.bfloat16))
    await check_bf16(None, exact, embedded[1], TEXTS)


@pytest.mark.long
async def test_the_example_adapters_in_bf16() -> None:
    examples = ROOT / "examples" / "adapters"
    # The adapters that change modules; other tests cover soft prompts and prefixes.
    names = [
        path.parent.name
        for path in sorted(examples.glob("*/adapter_config.json"))
        if "target_modules" in json.loads(path.read_text())
    ]
    assert len(names) >= 8
    exact = load_oracle(None, served_weights(None, torch.bfloat16))
    await check_bf16(None, exact, examples, TEXTS, names)
