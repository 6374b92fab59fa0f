"""Tiny random checkpoints of every supported architecture, as Hugging Face directories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from builders.bases.tiny_mixtures import MIXTURE_CONFIGS
from gguf_oracle import transformers_state
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GraniteConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.utils import logging

from turret.server.models.describe import describe_base
from turret.server.models.loader import load_decoder
from turret.server.models.model_source import resolve_model, text_name
from turret.server.models.sources.check import default_cache_dir, find_gguf

BOS, EOS = 256, 257
VOCAB_SIZE = 258
CONTEXT = 512


def _llama(**sizes: Any) -> Any:
    """Q and o are square (128 → 128), k and v are not (128 → 64), down is wide."""
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaConfig(**sizes, rope_parameters=scaled, tie_word_embeddings=False)


def _mistral(**sizes: Any) -> Any:
    """The window of 24 is shorter than the prompts of the tests and than an attention tile."""
    return MistralConfig(**sizes, sliding_window=24, tie_word_embeddings=False)


def _qwen2(**sizes: Any) -> Any:
    return Qwen2Config(**sizes, tie_word_embeddings=True)


def _qwen3(**sizes: Any) -> Any:
    """head_dim is not hidden_size / heads (q is 128 → 256); YaRN scales cosines and sines."""
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    }
    scaled = {**sizes, "head_dim": 64, "rope_parameters": yarn}
    return Qwen3Config(**scaled, tie_word_embeddings=True)


def _smollm3(**sizes: Any) -> Any:
    """Every fourth layer leaves queries and keys unrotated."""
    return SmolLM3Config(**{**sizes, "num_hidden_layers": 4}, tie_word_embeddings=True)


def _gemma(**sizes: Any) -> Any:
    return GemmaConfig(**{**sizes, "head_dim": 64}, tie_word_embeddings=True)


def _gemma2(**sizes: Any) -> Any:
    """Scores and logits reach both caps; every second layer has a window."""
    own = {
        "head_dim": 64,
        "query_pre_attn_scalar": 40,
        "sliding_window": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 6.0,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return Gemma2Config(**{**sizes, **own}, tie_word_embeddings=True)


def _gemma3(**sizes: Any) -> Any:
    """Layers with a window have other rotary frequencies."""
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    }
    own = {
        "head_dim": 64,
        "query_pre_attn_scalar": 40,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": ropes,
    }
    return Gemma3TextConfig(**{**sizes, **own}, tie_word_embeddings=True)


_MULTIPLIERS: dict[str, Any] = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 2.0,
}


def _granite(**sizes: Any) -> Any:
    return GraniteConfig(**sizes, **_MULTIPLIERS, tie_word_embeddings=True)


def _granite4(**sizes: Any) -> Any:
    """The dense model of a family with experts and Mamba layers, without rotary positions."""
    own = {
        "shared_intermediate_size": 192,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["full_attention"] * 2,
        "position_embedding_type": "nope",
        "mamba_n_heads": 8,
    }
    return GraniteMoeHybridConfig(**sizes, **own, **_MULTIPLIERS, tie_word_embeddings=True)


def _ministral(**sizes: Any) -> Any:
    kinds = ["sliding_attention", "full_attention"]
    return MinistralConfig(**sizes, sliding_window=24, layer_types=kinds, head_dim=32)


def _ministral3(**sizes: Any) -> Any:
    """Queries are scaled up three times within the tests' longest prompt."""
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 40,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.5,
    }
    return Ministral3Config(**sizes, head_dim=32, rope_parameters=yarn, tie_word_embeddings=True)


def _olmo2(**sizes: Any) -> Any:
    return Olmo2Config(**sizes, tie_word_embeddings=False)


def _olmo3(**sizes: Any) -> Any:
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.2,
    }
    plain = {"rope_type": "default", "rope_theta": 100.0}
    own = {
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": yarn, "sliding_attention": plain},
    }
    return Olmo3Config(**sizes, **own, tie_word_embeddings=False)


def _glm4(**sizes: Any) -> Any:
    """Half of a head rotates, in neighbouring pairs; q, k and v have biases."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    own = {"head_dim": 32, "attention_bias": True, "rope_parameters": rope}
    return Glm4Config(**sizes, **own, tie_word_embeddings=False)


def _phi3(**sizes: Any) -> Any:
    """12 pairs of a head's 32 features rotate, by other frequencies past 64 positions."""
    pairs = range(12)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.1 * i for i in pairs],
        "long_factor": [2.0 + 0.9 * i for i in pairs],
        "original_max_position_embeddings": 64,
    }
    own = {"rope_parameters": rope, "original_max_position_embeddings": 64, "sliding_window": 100}
    return Phi3Config(**sizes, **own, tie_word_embeddings=False)


_CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
}
ARCHITECTURES = tuple(_CONFIGS)
# Architectures that differ from Llama in more than a window or a norm.
_OTHERS: dict[str, Callable[..., Any]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "glm4": _glm4,
    "granite": _granite,
    "granitemoehybrid": _granite4,
    "ministral": _ministral,
    "ministral3": _ministral3,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "phi3": _phi3,
    **MIXTURE_CONFIGS,
}
OTHER_ARCHITECTURES = tuple(_OTHERS)
MIXTURES = tuple(MIXTURE_CONFIGS)


def _siglip() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }


def _gemma3_vision(**sizes: Any) -> Any:
    text = _gemma3(**sizes).to_dict()
    return Gemma3Config(text_config=text, vision_config=_siglip(), mm_tokens_per_image=4)


def _mistral3(**sizes: Any) -> Any:
    """The form of the released Ministral 3, with a separate head."""
    text = {**_ministral3(**sizes).to_dict(), "tie_word_embeddings": False}
    vision = {"model_type": "pixtral", **_siglip()}
    return Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)


def _qwen2_5_vl(**sizes: Any) -> Any:
    """Positions have three axes, which are equal in text."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": sizes["hidden_size"],
    }
    text = {**sizes, "rope_parameters": rope}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


# Multimodal models; only their text part is served.
_MULTIMODAL: dict[str, Callable[..., Any]] = {
    "gemma3": _gemma3_vision,
    "mistral3": _mistral3,
    "qwen2_5_vl": _qwen2_5_vl,
}
MULTIMODAL_ARCHITECTURES = tuple(_MULTIMODAL)


def tiny_config(architecture: str) -> Any:
    """The config of a tiny model of an architecture."""
    return {**_CONFIGS, **_OTHERS, **_MULTIMODAL}[architecture](
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )


def save_tiny_model(
    architecture: str, folder: Path, *, seed: int = 0, changes: Mapping[str, Any] | None = None
) -> Path:
    """Save a random bf16 checkpoint with a byte-level tokenizer.

    Args:
        architecture: One of ``ARCHITECTURES``, ``OTHER_ARCHITECTURES`` or
            ``MULTIMODAL_ARCHITECTURES``.
        folder: The directory, which is created.
        seed: The seed of the weights.
        changes: Changes to the config.

    Returns:
        ``folder``.
    """
    config = tiny_config(architecture)
    if changes:
        config = type(config)(**{**config.to_dict(), **changes})
    torch.manual_seed(seed)
    kind = AutoModelForImageTextToText if architecture in _MULTIMODAL else AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The weights are large enough for sharp attention and distinct logits.
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            elif parameter.ndim == 3 or (parameter.ndim == 2 and "embed" not in name):
                parameter.normal_(0.0, 1.2 / parameter.shape[-1] ** 0.5)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(1.0, 0.2)
    logging.disable_progress_bar()
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer(letters: int = 256) -> PreTrainedTokenizerFast:
    """A tokenizer in which token ``i`` is the ``i``-th character of the byte-level alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:letters]
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, [], fuse_unk=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


def served_weights(model: Path | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights by which turret multiplies in the decoder layers: path → ``[out, in]`` fp32.

    Args:
        model: A directory, or None for the bundled model.
        dtype: The dtype of the server.
    """
    cache = default_cache_dir() if model is None else model.parent / "cache" / "turret"
    source = resolve_model(model, cache)
    decoder = load_decoder(source, dtype=dtype, device=torch.device("cpu"))
    base = describe_base(decoder, source)
    weights = {p: module.dequantize() for p, module in base.modules.items() if ".layers." in p}
    for path, experts in base.experts.items():
        weights[path] = torch.stack([experts.dequantize(e) for e in range(experts.count)])
    return weights


def load_oracle(model: Path | None, weights: dict[str, torch.Tensor]) -> Any:
    """The fp32 model of a directory (or the embedded one) with the served weights."""
    if model is None:
        config = AutoConfig.from_pretrained(resolve_model(None, default_cache_dir()).files)
        oracle = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        missing = oracle.load_state_dict(transformers_state(find_gguf()), strict=False).missing_keys
        assert missing == ["lm_head.weight"], missing
    else:
        is_text = AutoConfig.from_pretrained(model).model_type not in _MULTIMODAL
        kind = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
        oracle = kind.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    matrices = {
        own.removesuffix(".weight"): parameter
        for name, parameter in oracle.named_parameters()
        if parameter.ndim > 1
        and ".layers." in (own := text_name(name) or "")
        # Matrices of all experts.
        and not name.endswith("_bias")
    }
    assert matrices.keys() == weights.keys(), matrices.keys() ^ weights.keys()
    with torch.no_grad():
        for name, matrix in matrices.items():
            owner = oracle.get_submodule(name.rpartition(".")[0]) if matrix.ndim == 3 else None
            is_transposed = getattr(owner, "is_transposed", False)
            matrix.copy_(weights[name].mT if is_transposed else weights[name])
    return oracle.float().eval()
