"""Configs of tiny mixtures of experts; see ``tiny_models.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig


def qwen3_moe(**sizes: Any) -> Any:
    """Experts in the second of two layers, with weights from the softmax."""
    own: dict[str, Any] = {"moe_intermediate_size": 64, "mlp_only_layers": [0], "head_dim": 32}
    experts: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False}
    return Qwen3MoeConfig(**sizes, **own, **experts, tie_word_embeddings=True)


def mixtral(**sizes: Any) -> Any:
    return MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, sliding_window=24)


def olmoe(**sizes: Any) -> Any:
    return OlmoeConfig(**sizes, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True)


def gpt_oss(**sizes: Any) -> Any:
    """Gates and ups exceed the limit; YaRN has the released settings with a shorter context."""
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    }
    own: dict[str, Any] = {"head_dim": 32, "sliding_window": 24, "rope_parameters": yarn}
    experts: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 3}
    return GptOssConfig(**sizes, **own, **experts, swiglu_limit=0.7)


MIXTURE_CONFIGS: dict[str, Callable[..., Any]] = {
    "gpt_oss": gpt_oss,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen3_moe": qwen3_moe,
}
