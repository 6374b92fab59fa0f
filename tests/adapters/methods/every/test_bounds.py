"""The accuracy of every method in bf16: its error relative to that of transformers + PEFT.

Errors are differences from fp32. Both use the weights that turret serves, so quantisation has no
effect. PEFT runs with its defaults: the base in bf16, the adapter's own tensors in fp32.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import load_oracle, save_tiny_model, served_weights
from builders.methods import ALL, load_adapter, make_config, save_adapter
from method_oracle import check_greedy, check_score, oracle_logprobs, prompt_of
from servers.engine_harness import EngineHarness, make_request

# Maximum of turret's mean error in logprobs, relative to PEFT's.
BOUND = 1.3
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 8, "lora_alpha": 12}),
    "rslora": ("rslora", {"r": 8}),
    "dora": ("dora", {"r": 8, "lora_alpha": 12}),
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


def scores(model: Any, prompts: Sequence[list[int]]) -> torch.Tensor:
    """The logprobs of all prompt tokens but the first of each prompt."""
    return torch.cat(
        [
            oracle_logprobs(model, prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            for prompt in prompts
        ]
    ).float()


async def served_scores(
    harness: EngineHarness, name: str, prompts: Sequence[list[int]]
) -> torch.Tensor:
    found: list[float] = []
    for prompt in prompts:
        answer = await harness.run(make_request(prompt, *([name] if name else []), score=True))
        found += [p for p in answer.prompt_logprobs[1:] if p is not None]
    return torch.tensor(found)


async def check_bf16(
    folder: Path | None, exact_base: Any, root: Path, texts: Sequence[list[int] | str]
) -> None:
    """Check every adapter below ``root``, and the base itself."""
    half = copy.deepcopy(exact_base).to(torch.bfloat16)
    names = sorted(os.listdir(root))
    errors: dict[str, list[tuple[float, float]]] = {}
    async with EngineHarness.start(folder, root, dtype="bfloat16", adapters=names) as harness:
        encode = harness.tokenizer.encode
        prompts = [encode(text) if isinstance(text, str) else text for text in texts]
        for name in ("", *names):
            # KaSA changes the base's own weights.
            share = name != "kasa"
            exact = load_adapter(exact_base, root / name, share=share) if name else exact_base
            peer = load_adapter(half, root / name, share=share) if name else half
            expected = scores(exact, prompts)
            theirs = float((scores(peer, prompts) - expected).abs().mean())
            ours = float((await served_scores(harness, name, prompts) - expected).abs().mean())
            errors.setdefault(name.partition("-draw-")[0], []).append((ours, theirs))
    for name, found in errors.items():
        ours, theirs = (sum(side) for side in zip(*found, strict=True))
        assert theirs > 0
        print("BOUND", name, ours / theirs, found)
        assert ours <= BOUND * theirs, (name, found)


def save_all(model: Any, root: Path, strength: float, names: Sequence[str]) -> None:
    for seed, name in enumerate(names):
        method, keys = (METHODS | FORMS).get(name, (name, {}))
        for draw in range(DRAWS.get(name, 1)):
            folder = root / (f"{name}-draw-{draw}" if draw else name)
            chosen = draw if name in DRAWS else seed
            save_adapter(model, make_config(method, **keys), folder, seed=chosen, strength=strength)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
async def test_nf4_tiny_models_in_bf16(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny_model(architecture, tmp_path / "model")
    base = load_oracle(folder, served_weights(folder, torch.bfloat16))
    save_all(base, tmp_path / "adapters", 0.3, list(METHODS))
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
    plain = oracle_logprobs(model, prompt)
    async with EngineHarness.start(None, root, adapters=ON_SMOLLM2) as harness:
        for name in ON_SMOLLM2:
            oracle = load_adapter(model, root / name, share=True)
            # Check that the adapter has an effect.
            assert (oracle_logprobs(oracle, prompt) - plain).abs().max() > 0.05, name
            check_score(
                await harness.run(make_request(prompt, name, score=True)), oracle, prompt, name
            )
            answer = await harness.run(make_request(prompt, name, max_tokens=2))
            check_greedy(answer, oracle, prompt, name)


@pytest.mark.long
async def test_smollm2_in_bf16(embedded: tuple[Any, Path]) -> None:
    model, root = embedded
    exact = copy.deepcopy(model)
    weights = served_weights(None, torch.bfloat16)
    with torch.no_grad():
        for path, weight in weights.items():
            exact.get_submodule(path).weight.copy_(weight)
    await check_bf16(None, exact, root, TEXTS)
