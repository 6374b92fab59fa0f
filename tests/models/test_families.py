"""A model family is one entry of a table.

The decoders are independent of families and reject unsupported features.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from builders.bases import tiny_models
from builders.bases.tiny_models import load_oracle, save_tiny_model, served_weights
from method_oracle import check_greedy, prompt_of
from said import says
from servers.engine_harness import EngineHarness, make_request
from transformers import (
    CohereConfig,
    Gemma3TextConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MistralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from turret.server.errors import InvalidRequestError
from turret.server.models import families
from turret.server.models.decoding import ACTIVATIONS, LayerNorms, Rope, check_served
from turret.server.models.decoding.cpu_layers import CpuLayerOps
from turret.server.models.decoding.gpu_decoder import GpuLayerOps
from turret.server.models.decoding.layer_ops import LayerOps
from turret.server.models.families import FAMILIES, Family, read_arch, read_decoder

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}

ALL = (
    *tiny_models.ARCHITECTURES,
    *tiny_models.OTHER_ARCHITECTURES,
    *tiny_models.MULTIMODAL_ARCHITECTURES,
)


_IMPORTS = """
import sys
from turret.server.models.families import transformers_config
arch = transformers_config({"model_type": "llama"})
assert not {"torch.distributed.tensor", "sympy", "accelerate"} & sys.modules.keys()
from transformers.integrations import hub_kernels
assert hub_kernels.use_kernel_forward_from_hub and hub_kernels.__file__
assert "torch.distributed.tensor" in sys.modules
from transformers.activations import ACT2FN
ACT2FN["silu"]
"""


def test_a_config_is_read_without_the_imports_of_kernels_from_the_hub() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("architecture", ALL)
def test_a_family_declares_its_modules_without_a_config(architecture: str) -> None:
    arch = read_arch(tiny_models.tiny_config(architecture))
    family = FAMILIES[arch.model_type]
    assert (family.experts is None) == (arch.experts is None)
    assert family.modules == arch.modules


@pytest.fixture
def seed_oss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a family, with Llama's features under another name."""
    monkeypatch.setitem(cast(dict[str, Family], FAMILIES), "seed_oss", Family(read_decoder))


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
def test_a_config_is_read_as_an_architecture(config: Any, expected: dict[str, Any]) -> None:
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


def test_the_config_determines_the_layers_with_experts() -> None:
    """Every ``decoder_sparse_step``-th layer has experts, except for listed ones."""
    sizes = {**SIZES, "num_hidden_layers": 6}
    own: dict[str, Any] = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    config = Qwen3MoeConfig(**sizes, **own, decoder_sparse_step=2, mlp_only_layers=[3])
    arch = read_arch(config)
    assert arch.experts is not None
    assert arch.experts.layers == {1, 5}
    assert [arch.has(layer, "gate_up") for layer in range(6)] == [
        True,
        False,
        True,
        True,
        True,
        False,
    ]
    assert {"gate_up", "down", "router"} <= arch.linears().keys()
    assert arch.expert_linears()["experts_down"] == ("mlp.experts.down_proj", 64, 32)
    dense = read_arch(Qwen3MoeConfig(**sizes, **own, mlp_only_layers=list(range(6))))
    assert dense.experts is None
    assert "router" not in dense.linears()
    sparse = read_arch(OlmoeConfig(**SIZES))
    assert not {"gate_up", "down"} & sparse.linears().keys()


def test_an_unknown_family_is_refused_in_one_sentence() -> None:
    choices = ", ".join(families.served_types())
    unsupported = says("CONFIG_UNSUPPORTED", key="model_type", value="cohere", choices=choices)
    with pytest.raises(InvalidRequestError, check=unsupported):
        read_arch(CohereConfig(**SIZES))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GraniteMoeHybridConfig(**SIZES), "GRANITE_HYBRID_UNSUPPORTED"),
        (OlmoeConfig(**SIZES, clip_qkv=8.0), "CONFIG_KEY_UNSUPPORTED"),
        (Gemma3TextConfig(**SIZES, use_bidirectional_attention=True), "CONFIG_KEY_UNSUPPORTED"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_unsupported_config_values_are_rejected(config: Any, reason: str) -> None:
    with pytest.raises(InvalidRequestError, check=says(reason)):
        read_arch(config)


def test_an_activation_without_a_kernel_is_refused() -> None:
    with pytest.raises(InvalidRequestError, check=says("CONFIG_UNSUPPORTED", key="activation")):
        read_arch(LlamaConfig(**SIZES, hidden_act="gelu"))


def test_heads_that_rotate_too_much_are_refused() -> None:
    plain = read_arch(LlamaConfig(**SIZES))
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    asked = {"ropes": {"all": Rope(torch.ones(9))}}
    with pytest.raises(InvalidRequestError, check=says("ROTATION_TOO_WIDE")):
        check_served(type(plain)(**{**fields, **asked}))


@pytest.mark.usefixtures("seed_oss")
async def test_a_family_in_one_line_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results are compared with transformers."""
    monkeypatch.setitem(tiny_models._OWN, "seed_oss", {"head_dim": 64})
    model = save_tiny_model("seed_oss", tmp_path / "model")
    oracle = load_oracle(model, served_weights(model, torch.float32))
    prompt = prompt_of(9)
    root = tmp_path / "adapters"
    root.mkdir()
    async with EngineHarness.start(model, root, adapters=[]) as harness:
        check_greedy(await harness.run(make_request(prompt)), oracle, prompt, "seed_oss")


def test_every_path_has_every_activation() -> None:
    for ops in (LayerOps, CpuLayerOps, GpuLayerOps):
        assert ops.activations.keys() == set(ACTIVATIONS)
