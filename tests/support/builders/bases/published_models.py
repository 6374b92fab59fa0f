"""Published configs of real sizes, as far as they affect reading a model.

Each config is from ``config.json`` in the named repository on the Hugging Face hub. The counts of
parameters are from the models' pages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Published:
    """A repository, its config, and the number of parameters on its page."""

    repository: str
    model_type: str
    # hidden, intermediate, layers, heads, KV heads, vocabulary
    sizes: tuple[int, int, int, int, int, int]
    num_parameters: int | None
    config: dict[str, Any] = field(default_factory=dict)
    # For a multimodal model, the keys beside ``text_config``.
    beside: dict[str, Any] | None = None

    def write(self, folder: Path) -> Path:
        names = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        )
        config = {**dict(zip(names, self.sizes, strict=True)), **self.config}
        if self.beside is not None:
            config = {**self.beside, "text_config": config}
        config = {"model_type": self.model_type, **config}
        (folder / "config.json").write_text(json.dumps(config))
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
    """Lists in the form of LongRoPE's; their numbers do not matter here."""
    lists = {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    return {**PHI, "max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", **lists}}


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
GEMMA_3_VISION = {"mm_tokens_per_image": 256, "vision_config": SIGLIP}
GEMMA_3_TEXT = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}
MISTRAL_SMALL_3 = {
    "model_type": "mistral",
    "head_dim": 128,
    "rope_theta": 1e9,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "max_position_embeddings": 131072,
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "head_dim": 64,
    "image_size": 1540,
    "patch_size": 14,
}
MISTRAL_3_VISION = {
    "vision_config": PIXTRAL,
    "spatial_merge_size": 2,
    "multimodal_projector_bias": False,
    "vision_feature_layer": -1,
    # The published config omits the key, and the default is wrong: the checkpoint has a head.
    "tie_word_embeddings": False,
}

# The instruction-tuned models are also released in FP8. arXiv 2601.08584, table 1.
MINISTRAL_3 = {
    "model_type": "ministral3",
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "type": "yarn",
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}


def qwen_vision(hidden: int) -> dict[str, Any]:
    """The keys of Qwen2.5-VL's flat published configs in addition to those of Qwen2.5."""
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "patch_size": 14,
    }
    return {
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_position_embeddings": 128000,
        "vision_config": vision,
    }


MODELS = (
    Published("google/gemma-2b", "gemma", (2048, 16384, 18, 8, 1, 256000), 2_506_172_416, GEMMA),
    Published(
        "google/gemma-2-2b-it", "gemma2", (2304, 9216, 26, 8, 4, 256000), 2_614_341_888, GEMMA_2
    ),
    Published(
        "google/gemma-2-27b-it",
        "gemma2",
        (4608, 36864, 46, 32, 16, 256000),
        27_227_128_320,
        {**GEMMA_2, "head_dim": 128, "query_pre_attn_scalar": 144},
    ),
    Published(
        "google/gemma-3-1b-it", "gemma3_text", (1152, 6912, 26, 4, 1, 262144), 999_885_952, GEMMA_3
    ),
    Published(
        "google/gemma-3-4b-it",
        "gemma3",
        (2560, 10240, 34, 8, 4, 262208),
        4_300_079_472,
        GEMMA_3_TEXT,
        GEMMA_3_VISION,
    ),
    Published(
        "google/gemma-3-27b-it",
        "gemma3",
        (5376, 21504, 62, 32, 16, 262208),
        27_432_406_640,
        {**GEMMA_3_TEXT, "head_dim": 128, "query_pre_attn_scalar": 168},
        GEMMA_3_VISION,
    ),
    Published(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "mistral3",
        (5120, 32768, 40, 32, 8, 131072),
        24_011_361_280,
        MISTRAL_SMALL_3,
        MISTRAL_3_VISION,
    ),
    Published(
        "mistralai/Ministral-3-3B-Instruct-2512",
        "mistral3",
        (3072, 9216, 26, 32, 8, 131072),
        None,
        {**MINISTRAL_3, "tie_word_embeddings": True},
        {**MISTRAL_3_VISION, "tie_word_embeddings": True},
    ),
    Published(
        "mistralai/Ministral-3-14B-Instruct-2512",
        "mistral3",
        (5120, 16384, 40, 32, 8, 131072),
        None,
        MINISTRAL_3,
        MISTRAL_3_VISION,
    ),
    Published(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2_5_vl",
        (2048, 11008, 36, 16, 2, 151936),
        3_754_622_976,
        {**qwen_vision(2048), "tie_word_embeddings": True},
    ),
    Published(
        "ibm-granite/granite-3.3-2b-instruct",
        "granite",
        (2048, 8192, 40, 32, 8, 49159),
        2_533_539_840,
        GRANITE,
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
        "allenai/Olmo-3-7B-Instruct", "olmo3", (4096, 11008, 32, 32, 32, 100278), None, OLMO_3
    ),
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
