"""The text part of multimodal models, compared with transformers and PEFT on the whole model.

Adapters are trained on the whole model, so their keys have its names; copies have the older names
of PEFT. Updates of the vision tower are rejected.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.mixed_checkpoints import tensors_4bit
from builders.bases.tiny_models import MULTIMODAL_ARCHITECTURES, served_weights
from builders.methods import load_adapter, make_config, save_adapter
from method_oracle import (
    check_batch,
    check_bfloat16,
    check_effect,
    check_greedy,
    check_score,
    prompt_of,
    serve,
    twin,
)
from safetensors.torch import load_file, save_file
from said import says
from servers.engine_harness import EngineHarness, make_request
from servers.gpu_serving import gpu_serving
from transformers import AutoConfig

from turret.server.errors import AdapterMismatchError
from turret.server.models.model_source import resolve_model, text_name

PROJECTIONS = "(q|k|v|o|gate|up|down)_proj"
TEXT = {"target_modules": rf".*language_model.*\.{PROJECTIONS}"}
# Unsloth's pattern for the language layers, attention and MLP of a multimodal model.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj|proj).*?)|(?:\bmodel\.layers"
    r"\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|"
    r"q_proj|o_proj|gate_proj|up_proj|down_proj|proj)))"
)
# Name → method and changes to its config.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {**TEXT, "rank_pattern": {r"model\.language_model\.layers\.1\..*": 7}}),
    "unsloth": ("rslora", {"target_modules": UNSLOTH}),
    "listed": (
        "lora",
        {"target_modules": [f"model.language_model.layers.1.self_attn.{p}_proj" for p in "qv"]},
    ),
    "dora": ("dora", TEXT),
    "loha": ("loha", TEXT),
    "rows": ("trainable_tokens", {"token_indices": list(range(0, 250, 3))}),
    "head": ("lora", {**TEXT, "modules_to_save": ["lm_head"]}),
}


def save_some(model: Any, root: Path, *names: str) -> list[Any]:
    """Save some of the adapters; returns their names after None, which is the base."""
    for seed, name in enumerate(names):
        method, changes = ADAPTERS[name]
        save_adapter(model, make_config(method, **changes), root / name, seed=seed)
    return [None, *names]


def to_older_names(folder: Path, copy: Path) -> None:
    """Convert an adapter to the names of PEFT with transformers before 4.52."""
    shutil.copytree(folder, copy)
    file = copy / "adapter_model.safetensors"

    def older(name: str) -> str:
        name = name.replace("model.model.language_model.", "model.language_model.model.")
        return name.replace("base_model.model.lm_head.", "base_model.model.language_model.lm_head.")

    save_file({older(name): tensor for name, tensor in load_file(file).items()}, file)
    config = json.loads((copy / "adapter_config.json").read_text())
    text = json.dumps(config).replace("model.language_model.", "language_model.model.")
    text = text.replace(r"model\\.language_model\\.", r"language_model\\.model\\.")
    (copy / "adapter_config.json").write_text(text)


@pytest.mark.parametrize("architecture", MULTIMODAL_ARCHITECTURES)
async def test_every_method_in_one_batch_equals_peft(architecture: str, tmp_path: Path) -> None:
    base = twin(architecture)
    is_tied = base.model.config.tie_word_embeddings
    oracles: dict[str, Any] = {"": base.model}
    for seed, (name, (method, changes)) in enumerate(ADAPTERS.items()):
        if name == "head" and is_tied:
            continue
        save_adapter(base.model, make_config(method, **changes), tmp_path / name, seed=seed)
        oracles[name] = load_adapter(base.model, tmp_path / name)
        check_effect(oracles[name], base.model, prompt_of(40), name, least=0.02)
        if method != "trainable_tokens":
            to_older_names(tmp_path / name, tmp_path / f"older-{name}")
            oracles[f"older-{name}"] = oracles[name]
    asked = [
        (name, prompt_of((70, 17, 33)[n % 3], n), score)
        for n, name in enumerate(oracles)
        for score in (True, False)
    ]
    requests = [make_request(prompt, name, score=s, max_tokens=4) for name, prompt, s in asked]
    async with serve(base, tmp_path, dtype="float32", adapters=[*filter(None, oracles)]) as harness:
        answers = await harness.run_together_and_alone(requests)
    for (name, prompt, score), answer in zip(asked, answers, strict=True):
        check = check_score if score else check_greedy
        check(answer, oracles[name], prompt, f"{architecture} {name}")


@pytest.mark.long
@pytest.mark.parametrize("architecture", MULTIMODAL_ARCHITECTURES)
async def test_bfloat16_is_as_exact_as_peft(architecture: str, tmp_path: Path) -> None:
    base = twin(architecture, torch.bfloat16)
    names = save_some(base.model, tmp_path, "lora", "dora", "loha", "rows")
    prompts = [prompt_of(length, seed) for seed, length in enumerate((140, 60, 90, 33, 70))]
    requests = [make_request(p, n, score=True) for n, p in zip(names, prompts, strict=True)]
    async with serve(base, tmp_path, dtype="bfloat16", adapters=names[1:]) as harness:
        answers = await harness.run_together_and_alone(requests)
    check_bfloat16([*zip(names, prompts, answers, strict=True)], base.model, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter needs CPU tensors")
@pytest.mark.long
@pytest.mark.parametrize("architecture", MULTIMODAL_ARCHITECTURES)
async def test_the_gpu_path_equals_peft(architecture: str, tmp_path: Path) -> None:
    """The base and two adapters of the whole model in one batch, to the end of a window."""
    base = twin(architecture)
    names = save_some(base.model, tmp_path, "dora", "loha")
    asked = [(name, prompt_of(n, n)) for name, n in zip(names, (70, 30, 5), strict=True)]
    async with gpu_serving(base.folder, tmp_path, names[1:]) as harness:
        await check_batch(harness, base.model, tmp_path, asked)


@pytest.mark.parametrize("target", ["vision_tower", "visual"])
async def test_an_adapter_on_the_vision_tower_is_refused(target: str, tmp_path: Path) -> None:
    base = twin("qwen2_5_vl" if target == "visual" else "gemma3")
    modules = {
        name: module
        for name, module in base.model.named_modules()
        if target in name and isinstance(module, torch.nn.Linear)
    }
    config = make_config("lora", target_modules=[*list(modules)[:1], "q_proj"])
    save_adapter(base.model, config, tmp_path / "a")
    async with serve(base, tmp_path) as harness:
        with pytest.raises(AdapterMismatchError, check=says("ADAPTS_VISION", part=target)):
            harness.registry.load("a", "a")


@pytest.mark.parametrize("architecture", MULTIMODAL_ARCHITECTURES)
def test_a_4bit_checkpoint_of_the_whole_model_is_used_unchanged(
    architecture: str, tmp_path: Path, tiny_model: Any
) -> None:
    """Tensors have older or newer names; those of vision are ignored."""
    plain = tiny_model(architecture)
    expected = served_weights(plain, torch.float32)
    packed = tensors_4bit(resolve_model(plain, tmp_path / "cache" / "turret"))
    whole = load_file(plain / "model.safetensors")
    beside = {name: tensor for name, tensor in whole.items() if text_name(name) is None}
    assert beside
    assert packed.keys().isdisjoint(beside)
    for number, older in enumerate((True, False)):
        folder = tmp_path / f"packed-{number}"
        shutil.copytree(plain, folder)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (folder / "config.json").write_text(json.dumps(config))
        names = {
            name: f"language_model.{name}"
            if older
            else name.replace("model.", "model.language_model.", 1)
            for name in packed
        }
        tensors = {names[name]: tensor for name, tensor in packed.items()}
        save_file({**tensors, **beside}, folder / "model.safetensors")
        found = served_weights(folder, torch.float32)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


async def test_a_separate_head_is_used_whatever_the_config_declares(tmp_path: Path) -> None:
    """Published configs of Mistral Small 3 omit ``tie_word_embeddings``, with a default of true."""
    base = twin("mistral3")
    folder = shutil.copytree(base.folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings
    prompt = prompt_of(20)
    async with EngineHarness.start(folder, tmp_path, dtype="float32") as harness:
        answer = await harness.run(make_request(prompt, max_tokens=3))
    check_greedy(answer, base.model, prompt, "own head")
