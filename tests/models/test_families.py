"""A model family is one file; the decoders know no family, and refuse what they do not compute."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_models
from builders.tiny_models import load_oracle, save_tiny_model, served_weights
from checkout import ROOT
from method_oracle import check_greedy, prompt_of
from servers.engine_harness import EngineHarness, make_request
from transformers import (
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from turret.server.errors import InvalidRequestError
from turret.server.models import families
from turret.server.models.decoding import gpu_decoder, layer_ops
from turret.server.models.decoding.arch import ACTIVATIONS, LayerNorms, Rope, check_served
from turret.server.models.decoding.cpu_layer_ops import _GATED_ACTIVATIONS as CPU_ACTIVATIONS
from turret.server.models.families import FAMILIES, read_arch

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
FOLDER = ROOT / "server" / "models" / "families"
# A family that the decoders serve as long as its multipliers are 1, but for that of the scores.
GRANITE = '''
"""Granite: four multipliers."""

from turret.server.models.family import Family, read_decoder


def _read(config):
    return read_decoder(
        config,
        attention_scale=config.attention_multiplier,
        embedding_scale=config.embedding_multiplier,
        residual_scale=config.residual_multiplier,
        logit_scale=1 / config.logits_scaling,
    )


FAMILY = Family(("granite",), _read)
'''


@pytest.fixture
def granite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serves one family more."""
    folder = tmp_path / "more_families"
    folder.mkdir()
    (folder / "granite.py").write_text(GRANITE)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    monkeypatch.setattr(families, "FAMILIES", families._discover())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SIZES), {}),
        (LlamaConfig(**SIZES, head_dim=32), {"head_dim": 32, "attention_scale": 32**-0.5}),
        (MistralConfig(**SIZES, sliding_window=7), {"windows": (7,) * 4}),
        (Qwen2Config(**SIZES), {}),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=2),
            {"windows": (None, None, 5, 5)},
        ),
        (Qwen3Config(**SIZES, head_dim=16), {"qk_norm": "head"}),
        (
            SmolLM3Config(**SIZES, pad_token_id=0, no_rope_layers=[1, 1, 1, 0]),
            {"rope_of_layer": ("all", "all", "all", None)},
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_config_becomes_an_arch(config: Any, expected: dict[str, Any]) -> None:
    arch = read_arch(config)
    plain = {
        "model_type": config.model_type,
        "num_layers": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "activation": "silu",
        "attention_scale": 0.25,
        "norms": LayerNorms(),
        "qk_norm": None,
        "windows": (None,) * 4,
        "rope_of_layer": ("all",) * 4,
    }
    assert {name: getattr(arch, name) for name in plain} == {**plain, **expected}
    exponents = torch.arange(0, arch.head_dim, 2) / arch.head_dim
    theta = config.rope_parameters["rope_theta"]
    torch.testing.assert_close(arch.ropes["all"].inv_freq, theta**-exponents)


def test_an_unknown_family_is_refused_in_one_sentence() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_arch(GemmaConfig(**SIZES))
    assert str(refused.value).endswith(
        "model_type 'gemma' is not served; served are llama, mistral, qwen2, qwen3, smollm3"
    )


def test_an_activation_without_a_kernel_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"activation 'gelu' \(there is silu\)"):
        read_arch(LlamaConfig(**SIZES, hidden_act="gelu"))


def test_everything_that_is_not_computed_is_named() -> None:
    """What the next families bring, each refused until some kernel computes it."""
    plain = read_arch(LlamaConfig(**SIZES))
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    asked = {
        "activation": "gelu_pytorch_tanh",
        "embedding_scale": 8.0,
        "residual_scale": 0.5,
        "logit_scale": 0.125,
        "norm_offset": 1.0,
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
        "norms": LayerNorms(after_attention="post_attention_layernorm", before_mlp="pre"),
        "qk_norm": "projection",
        "ropes": {"all": Rope(torch.ones(6))},
    }
    names = {"norms": "norms after", "qk_norm": "over all heads", "ropes": "rotate in part"}
    for name, value in asked.items():
        with pytest.raises(InvalidRequestError, match=names.get(name, name)):
            check_served(type(plain)(**{**fields, name: value}))
    with pytest.raises(InvalidRequestError) as refused:
        check_served(type(plain)(**{**fields, **asked}))
    assert str(refused.value).count(";") == len(asked) - 1


@pytest.mark.usefixtures("granite")
async def test_a_family_in_one_file_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers, with a scale of the scores that is not that of other families."""
    monkeypatch.setitem(
        tiny_models._CONFIGS,
        "granite",
        lambda **sizes: GraniteConfig(**sizes, attention_multiplier=0.3),
    )
    model = save_tiny_model("granite", tmp_path / "model")
    oracle = load_oracle(model, served_weights(model, torch.float32))
    prompt = prompt_of(9)
    root = tmp_path / "adapters"
    root.mkdir()
    async with EngineHarness.start(model, root, adapters=[]) as harness:
        check_greedy(await harness.run(make_request(prompt)), oracle, prompt, "granite")


@pytest.mark.usefixtures("granite")
def test_its_other_multipliers_are_refused() -> None:
    config = GraniteConfig(**SIZES, embedding_multiplier=12.0, logits_scaling=8.0)
    with pytest.raises(InvalidRequestError, match=r"embedding_scale 12\.0; logit_scale 0\.125$"):
        read_arch(config)


def test_every_path_has_every_activation() -> None:
    for table in (layer_ops._ACTIVATIONS, CPU_ACTIVATIONS, gpu_decoder._GATED_ACTIVATIONS):
        assert table.keys() == set(ACTIVATIONS)


def test_families_see_nothing_of_the_models_but_what_they_fill_in() -> None:
    allowed = (
        "turret.server.models.decoding.arch",
        "turret.server.models.family",
        "turret.server.errors",
    )
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("turret"):
                assert node.module in allowed, (path, node.module)


def test_nothing_else_asks_for_a_family() -> None:
    """No comparison with the name of a family anywhere but in its own file."""
    found = []
    for path in (*(ROOT / "server").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")):
        if path.parent == FOLDER:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                if constants & FAMILIES.keys():
                    found.append((str(path), node.lineno))
    assert found == []
