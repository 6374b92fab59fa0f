"""LLaMA-Adapter's prompts in attention, served by the engine and compared with PEFT."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import base_of, lower_adapter, read_adapter, tiny_llama
from builders.methods import drawing, load_adapter, make_config, quiet, save_adapter
from hypothesis import given
from hypothesis import strategies as st
from method_oracle import (
    check_batch,
    check_methods,
    check_rounding,
    check_score,
    prompt_of,
    serve,
    twin,
)
from said import says
from servers.engine_harness import make_request
from servers.gpu_serving import gpu_serving
from torch import nn

from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.adapters.operators.adapter_operators import beyond_updates
from turret.server.errors import AdapterMismatchError

EXAMPLES = 20
VARIANTS = {
    "all-layers": ("adaption_prompt", {}),
    "last-layer": ("adaption_prompt", {"adapter_len": 1, "adapter_layers": 1}),
    "long": ("adaption_prompt", {"adapter_len": 37}),
}
OTHERS = {
    "lora": ("lora", {"target_modules": ["q_proj", "o_proj", "up_proj"]}),
    "dora": ("dora", {}),
    "prefix": ("prefix_tuning", {}),
}


@pytest.mark.parametrize("architecture", ["llama", pytest.param("mistral", marks=pytest.mark.long)])
async def test_scores_and_answers_match_peft(architecture: str, tmp_path: Path) -> None:
    await check_methods(architecture, tmp_path, VARIANTS)


def save_all(model: nn.Module, root: Path) -> list[str]:
    for seed, (name, (method, keys)) in enumerate({**VARIANTS, **OTHERS}.items()):
        save_adapter(model, make_config(method, **keys), root / name, seed=seed)
    return [*VARIANTS, *OTHERS]


def gated(model: nn.Module, weight: float) -> nn.Module:
    """Multiply PEFT's gates by a weight, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.mul_(weight)
    return model


async def test_mixes_scale_the_gate_and_add_up_with_others(tmp_path: Path) -> None:
    base = twin("llama")
    save_all(base.model, tmp_path)
    # The LoRA does not adapt the modules that compute the prompt's keys and values.
    merged = load_adapter(base.model, tmp_path / "lora").merge_and_unload()  # type: ignore[operator]
    prompt = prompt_of(31)
    mixes = {
        (("long", -0.6),): gated(load_adapter(base.model, tmp_path / "long"), -0.6),
        (("lora", 1.0), ("long", 0.4)): gated(load_adapter(merged, tmp_path / "long"), 0.4),
    }
    async with serve(base, tmp_path, adapters=["long", "lora"]) as harness:
        for mix, oracle in mixes.items():
            answer = await harness.run(make_request(prompt, *mix, score=True))
            check_score(answer, oracle, prompt, f"{mix}")


async def test_bfloat16_is_as_close_as_peft_in_bfloat16(tmp_path: Path) -> None:
    base = twin("llama", torch.bfloat16)
    half = copy.deepcopy(base.model).bfloat16()
    save_adapter(base.model, make_config("adaption_prompt"), tmp_path / "a", strength=0.3)
    exact, rounded = (load_adapter(model, tmp_path / "a") for model in (base.model, half))
    await check_rounding(base, tmp_path, ["a"], exact, rounded)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter needs CPU tensors")
@pytest.mark.long
async def test_the_gpu_path_equals_peft(tmp_path: Path) -> None:
    base = twin("llama")
    save_all(base.model, tmp_path)
    names = [None, "long", "all-layers", "lora"]
    asked = [(name, prompt_of(n, n)) for name, n in zip(names, (40, 30, 5, 3), strict=True)]
    async with gpu_serving(base.folder, tmp_path, [n for n in names if n]) as harness:
        answers = await check_batch(harness, base.model, tmp_path, asked)
        # Steps that were captured for other requests are unaffected.
        again = await harness.run(make_request(asked[0][1], max_tokens=3))
    assert again.token_ids == answers[0].token_ids


@torch.no_grad()
def check_attention(keys: dict[str, Any], seed: int, *, bias: bool) -> float:
    """Compare the change of each layer's attention with PEFT's; returns the largest change."""
    model = tiny_llama(attention_bias=bias, dtype=torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config("adaption_prompt", **keys)
        oracle = save_adapter(model, config, Path(folder) / "a", seed=seed, share=True).eval()
        operators = lower_adapter(Path(folder), base_of(model)).operators
    assert operators.attention is not None
    assert sorted(operators.attention) == list(range(2 - keys["adapter_layers"], 2))
    x = torch.randn(1, 7, 64, dtype=torch.float64)
    angles = torch.randn(1, 7, 8, dtype=torch.float64)
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    told = {"hidden_states": x, "position_embeddings": (cos, sin), "attention_mask": None}
    largest = 0.0
    for layer, kv in operators.attention.items():
        path = f"model.layers.{layer}.self_attn"
        plain = model.get_submodule(path)
        with quiet():
            adapted = oracle.get_submodule(f"base_model.model.{path}")(**told)[0]
        change = (adapted - plain(**told)[0])[0]
        q = plain.get_submodule("q_proj")(x).view(7, 4, 16)
        first, second = q.chunk(2, -1)
        turned = q * cos[0, :, None] + torch.cat((-second, first), -1) * sin[0, :, None]
        added = kv.attend(turned).double()
        o = plain.get_submodule("o_proj")
        found = added.reshape(7, 64) @ o.get_parameter("weight").T
        if bias:
            own = operators.modules[f"{path}.o_proj"].bias
            assert own is not None
            found = found + own
        assert float((found - change).abs().max() / change.abs().max()) < 2e-5, (keys, layer)
        largest = max(largest, float(change.abs().max()))
    return largest


def test_drawn_configs_compute_what_peft_computes() -> None:
    moved = []

    @drawing(EXAMPLES)
    @given(
        length=st.integers(1, 40),
        layers=st.integers(1, 2),
        target=st.sampled_from(["self_attn", None]),
        bias=st.booleans(),
        seed=st.integers(0, 99),
    )
    def check(length: int, layers: int, target: str | None, bias: bool, seed: int) -> None:
        keys = {"adapter_len": length, "adapter_layers": layers, "target_modules": target}
        moved.append(check_attention(keys, seed, bias=bias))

    check()
    assert len(moved) >= EXAMPLES
    assert min(moved) > 1e-3


def test_only_models_that_peft_supports_are_accepted(tmp_path: Path) -> None:
    save_adapter(tiny_llama(), make_config("adaption_prompt"), tmp_path / "a")
    base = base_of(tiny_llama())
    lowered = lower_checkpoint(read_adapter(tmp_path), base)[1]
    assert lowered.target_modules == ("self_attn",)
    assert lowered.num_bytes == 2 * 2 * 5 * 2 * 16 * 4
    assert beyond_updates(lowered.operators) == ("prompt that layers attend to",)
    other = copy.copy(base)
    object.__setattr__(other, "model_type", "qwen2")
    with pytest.raises(AdapterMismatchError, check=says("WRONG_MODEL_TYPE", model_type="qwen2")):
        lower_checkpoint(read_adapter(tmp_path), other)
