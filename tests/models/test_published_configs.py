"""Published sizes: each config is read, and every tensor of its checkpoint has a place.

A config is that of ``config.json`` in the repository of the Hugging Face hub that its line names.
transformers, on the meta device, tells the names and shapes of the checkpoint's tensors; the counts
of parameters are those of the models' own pages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from turret.server.models import loader
from turret.server.models.decoding.arch import Arch
from turret.server.models.decoding.decoder import Decoder
from turret.server.models.model_source import ModelSource, is_quantized

META = torch.device("meta")


@dataclass(frozen=True)
class Published:
    """A repository, what its config says, and how many parameters its page counts."""

    repository: str
    model_type: str
    # hidden, intermediate, layers, heads, KV heads, vocabulary
    sizes: tuple[int, int, int, int, int, int]
    num_parameters: int | None
    config: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        names = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        )
        config = {"model_type": self.model_type, **dict(zip(names, self.sizes, strict=True))}
        (folder / "config.json").write_text(json.dumps({**config, **self.config}))
        return folder


GEMMA = {"head_dim": 256, "hidden_act": "gelu", "max_position_embeddings": 8192}
GEMMA_2 = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
}
GEMMA_3 = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "max_position_embeddings": 32768,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "logits_scaling": 8.0,
    "rope_theta": 10000000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
GRANITE_4 = {
    **GRANITE,
    "logits_scaling": 10.0,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "position_embedding_type": "rope",
    "mamba_n_heads": 64,
    "mamba_d_head": 32,
}
OLMO_2 = {"rope_theta": 500000, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096}
OLMO_3 = {
    **OLMO_2,
    "max_position_embeddings": 65536,
    "sliding_window": 4096,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}
GLM_4 = {
    "head_dim": 128,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
}
PHI = {"original_max_position_embeddings": 4096, "rope_theta": 10000.0}


def long(pairs: int) -> dict[str, Any]:
    """The form of LongRoPE's lists; their numbers do not matter here."""
    lists = {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    return {**PHI, "max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", **lists}}


MODELS = (
    Published("google/gemma-2b", "gemma", (2048, 16384, 18, 8, 1, 256000), 2_506_172_416, GEMMA),
    Published("google/gemma-7b", "gemma", (3072, 24576, 28, 16, 16, 256000), 8_537_680_896, GEMMA),
    Published(
        "google/gemma-2-2b-it", "gemma2", (2304, 9216, 26, 8, 4, 256000), 2_614_341_888, GEMMA_2
    ),
    Published(
        "google/gemma-2-9b-it", "gemma2", (3584, 14336, 42, 16, 8, 256000), 9_241_705_984, GEMMA_2
    ),
    Published(
        "google/gemma-2-27b-it",
        "gemma2",
        (4608, 36864, 46, 32, 16, 256000),
        27_227_128_320,
        {**GEMMA_2, "head_dim": 128, "query_pre_attn_scalar": 144},
    ),
    Published(
        "google/gemma-3-270m-it", "gemma3_text", (640, 2048, 18, 4, 1, 262144), 268_098_176, GEMMA_3
    ),
    Published(
        "google/gemma-3-1b-it", "gemma3_text", (1152, 6912, 26, 4, 1, 262144), 999_885_952, GEMMA_3
    ),
    Published(
        "ibm-granite/granite-3.3-2b-instruct",
        "granite",
        (2048, 8192, 40, 32, 8, 49159),
        2_533_539_840,
        GRANITE,
    ),
    Published(
        "ibm-granite/granite-3.3-8b-instruct",
        "granite",
        (4096, 12800, 40, 32, 8, 49159),
        8_170_864_640,
        {**GRANITE, "attention_multiplier": 0.0078125, "logits_scaling": 16.0},
    ),
    Published(
        "ibm-granite/granite-4.0-micro",
        "granitemoehybrid",
        (2560, 8192, 40, 40, 8, 100352),
        None,
        {**GRANITE_4, "shared_intermediate_size": 8192, "layer_types": ["attention"] * 40}
        | {"mamba_n_heads": 160},
    ),
    Published(
        "ibm-granite/granite-4.0-350m",
        "granitemoehybrid",
        (1024, 2048, 28, 16, 4, 100352),
        None,
        {**GRANITE_4, "shared_intermediate_size": 2048, "layer_types": ["attention"] * 28},
    ),
    Published(
        "mistralai/Ministral-8B-Instruct-2410",
        "mistral",
        (4096, 12288, 36, 32, 8, 131072),
        8_019_808_256,
        {"head_dim": 128, "rope_theta": 1e8, "sliding_window": 32768},
    ),
    Published(
        "allenai/OLMo-2-0425-1B-Instruct",
        "olmo2",
        (2048, 8192, 16, 16, 16, 100352),
        1_484_916_736,
        OLMO_2,
    ),
    Published(
        "allenai/OLMo-2-1124-7B-Instruct", "olmo2", (4096, 11008, 32, 32, 32, 100352), None, OLMO_2
    ),
    Published(
        "allenai/Olmo-3-7B-Instruct", "olmo3", (4096, 11008, 32, 32, 32, 100278), None, OLMO_3
    ),
    Published("allenai/Olmo-3.1-32B", "olmo3", (5120, 27648, 64, 40, 8, 100278), None, OLMO_3),
    Published("zai-org/GLM-4-9B-0414", "glm4", (4096, 13696, 40, 32, 2, 151552), None, GLM_4),
    Published(
        "zai-org/GLM-4-32B-0414",
        "glm4",
        (6144, 23040, 61, 48, 2, 151552),
        None,
        {**GLM_4, "attention_bias": False},
    ),
    Published(
        "microsoft/Phi-3-mini-4k-instruct",
        "phi3",
        (3072, 8192, 32, 32, 32, 32064),
        3_821_079_552,
        {**PHI, "max_position_embeddings": 4096, "sliding_window": 2047},
    ),
    Published(
        "microsoft/Phi-3.5-mini-instruct",
        "phi3",
        (3072, 8192, 32, 32, 32, 32064),
        3_821_079_552,
        {**long(48), "sliding_window": 262144},
    ),
    Published(
        "microsoft/phi-4",
        "phi3",
        (5120, 17920, 40, 40, 10, 100352),
        14_659_507_200,
        {**PHI, "rope_theta": 250000, "max_position_embeddings": 16384},
    ),
    Published(
        "microsoft/Phi-4-mini-instruct",
        "phi3",
        (3072, 8192, 32, 24, 8, 200064),
        3_836_021_760,
        {**long(48), "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    ),
)


class MetaTensors:
    """A checkpoint without memory: names and shapes as transformers has them."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self._state = state
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._state

    def get(self, name: str) -> torch.Tensor:
        self._read.add(name)
        return self._state[name]

    def weight(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        assert is_quantized(name), name
        assert tuple(self._state[name].shape) == shape, name
        return self.get(name)

    def unread(self) -> list[str]:
        return sorted(self._state.keys() - self._read)


def load_on_meta(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Decoder, Any]:
    """The decoder of a config, every tensor of whose checkpoint was read, and transformers'."""
    config = AutoConfig.from_pretrained(folder)
    with META:
        model = AutoModelForCausalLM.from_config(config)
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    monkeypatch.setattr(loader, "_Tensors", lambda folder: MetaTensors(state))
    monkeypatch.setattr(loader, "Nf4Linear", lambda weights, *_, **__: weights)
    source = ModelSource("", folder, folder, "")
    return loader.load_decoder(source, dtype=torch.bfloat16, device=META), model


@pytest.mark.parametrize("published", MODELS, ids=lambda published: published.repository)
def test_every_tensor_of_its_checkpoint_has_a_place(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, model = load_on_meta(published.write(tmp_path), monkeypatch)
    arch: Arch = decoder.arch
    if published.num_parameters is not None:
        found = {id(parameter): parameter.numel() for parameter in model.parameters()}
        assert sum(found.values()) == published.num_parameters
    linears = {
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in path
    }
    expected = {
        f"model.layers.{number}.{path}"
        for number in range(arch.num_layers)
        for slices in arch.linears().values()
        for path, _, _ in slices
    }
    assert linears == expected
    for parts in arch.ropes.values():
        rotary = parts.inv_freq.shape[0]
        assert 2 * rotary <= arch.head_dim


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        ("google/gemma-2-27b-it", {"attention_scale": 1 / 12, "windows": 23 * (4096, None)}),
        (
            "google/gemma-3-1b-it",
            {"windows": 4 * (*(512,) * 5, None) + (512, 512), "attention_softcap": None},
        ),
        (
            "ibm-granite/granite-3.3-8b-instruct",
            {"attention_scale": 1 / 128, "logit_scale": 1 / 16},
        ),
        ("allenai/Olmo-3-7B-Instruct", {"windows": 8 * (4096, 4096, 4096, None)}),
        ("zai-org/GLM-4-9B-0414", {"is_interleaved": True, "num_kv_heads": 2}),
        ("microsoft/Phi-3.5-mini-instruct", {"long_from": 4096, "max_model_len": 131072}),
        ("microsoft/phi-4", {"long_from": None, "head_dim": 128}),
    ],
)
def test_what_a_config_says_is_read(
    repository: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    (published,) = (model for model in MODELS if model.repository == repository)
    arch = loader.read_arch(AutoConfig.from_pretrained(published.write(tmp_path)))
    assert {name: getattr(arch, name) for name in expected} == expected


def test_a_part_of_a_head_rotates(tmp_path: Path) -> None:
    for repository, pairs in (("microsoft/Phi-4-mini-instruct", 48), ("zai-org/GLM-4-9B-0414", 32)):
        (published,) = (model for model in MODELS if model.repository == repository)
        (tmp_path / str(pairs)).mkdir()
        config = AutoConfig.from_pretrained(published.write(tmp_path / str(pairs)))
        (rope,) = loader.read_arch(config).ropes.values()
        assert rope.inv_freq.shape == (pairs,)
