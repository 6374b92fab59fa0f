"""Tiny random checkpoints of every supported architecture, as Hugging Face directories."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf_oracle import transformers_state
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from turret.server.models.describe import describe_base
from turret.server.models.loader import load_decoder
from turret.server.models.model_source import resolve_model, text_name
from turret.server.models.sources.check import default_cache_dir, find_gguf

BOS, EOS = 256, 257
VOCAB_SIZE = 258
CONTEXT = 512


_OWN = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
MIXTURES = ("gpt_oss", "mixtral", "olmoe", "qwen3_moe")
# Only the text part of these models is served.
MULTIMODAL_ARCHITECTURES = ("gemma3", "mistral3", "qwen2_5_vl")
# Architectures that differ from Llama in more than a window or a norm.
OTHER_ARCHITECTURES = tuple(
    name for name in _OWN if name not in (*ARCHITECTURES, *MULTIMODAL_ARCHITECTURES)
)
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}


def tiny_config(architecture: str) -> Any:
    """The config of a tiny model of an architecture."""
    own = copy.deepcopy(_OWN[architecture])
    text = own.get("text_config")
    if isinstance(text, str):
        # The same value as in the whole model's config, if that has one.
        ties = {key: own[key] for key in ("tie_word_embeddings",) if key in own}
        own["text_config"] = {**tiny_config(text).to_dict(), **ties}
    elif text is not None:
        own["text_config"] = {**_SIZES, **text}
    else:
        own = {**_SIZES, **own}
    return AutoConfig.for_model(architecture, **own)


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
    kind = (
        AutoModelForImageTextToText
        if architecture in MULTIMODAL_ARCHITECTURES
        else AutoModelForCausalLM
    )
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
    """The fp32 model of a directory (None: the bundled model) with the served weights."""
    if model is None:
        config = AutoConfig.from_pretrained(resolve_model(None, default_cache_dir()).files)
        oracle = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        missing = oracle.load_state_dict(transformers_state(find_gguf()), strict=False).missing_keys
        assert missing == ["lm_head.weight"], missing
    else:
        is_text = AutoConfig.from_pretrained(model).model_type not in MULTIMODAL_ARCHITECTURES
        kind = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
        oracle = kind.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    matrices = {
        own.removesuffix(".weight"): parameter
        for name, parameter in oracle.named_parameters()
        if parameter.ndim > 1
        and ".layers." in (own := text_name(name) or "")
        # The biases of a layer's experts form a matrix, too.
        and not name.endswith("_bias")
    }
    assert matrices.keys() == weights.keys(), matrices.keys() ^ weights.keys()
    with torch.no_grad():
        for name, matrix in matrices.items():
            owner = oracle.get_submodule(name.rpartition(".")[0]) if matrix.ndim == 3 else None
            is_transposed = getattr(owner, "is_transposed", False)
            matrix.copy_(weights[name].mT if is_transposed else weights[name])
    return oracle.float().eval()
