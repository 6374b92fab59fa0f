"""Writes GGUF files as llama.cpp's converter does, of Hugging Face directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

# A chat template that is none of the tokenizer's own.
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Llama's q or k as ``LlamaModel.permute`` of convert_hf_to_gguf.py has them."""
    half = weight.shape[0] // heads // 2
    rows = weight.reshape(heads, 2, half, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    folder: Path,
    file: Path,
    kind: Kind,
    *,
    more: dict[str, Any] | None = None,
    pre: str = "default",
) -> None:
    """Write a model's weights, its config and its tokenizer.

    Args:
        folder: With one safetensors file.
        file: To write.
        kind: Of matrices; norms and biases are F32.
        more: Values of keys of the architecture that the config has no place for.
        pre: The tokenizer's rules of splitting, as llama.cpp calls them.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(file, architecture)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_name("Tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    for key, value in (more or {}).items():
        _ADD[type(value)](writer, f"{architecture}.{key}", value)
    _add_tokenizer(writer, folder, config, pre)
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}.get(
            architecture, gguf.MODEL_ARCH.QWEN3
        ),
        config["num_hidden_layers"],
    )
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        if architecture == "llama" and ".q_proj." in name:
            values = permute(values, heads)
        if architecture == "llama" and ".k_proj." in name:
            values = permute(values, kv_heads)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        _add_tensor(writer, stored, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_ADD: dict[type, Any] = {
    str: gguf.GGUFWriter.add_string,
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
}


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Kind) -> None:
    if values.ndim == 1 or kind == Kind.F32:
        writer.add_tensor(name, values)
    elif kind == Kind.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], pre: str) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())
    by_id = {i: token for token, i in model["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in model["added_tokens"]}
    tokens = [{**by_id, **special}[i] for i in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    # No merges, which files without any have scores for.
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template(TEMPLATE)


def dequantised_copy(folder: Path, kind: Kind) -> None:
    """Puts what a GGUF file of this kind holds in place of a directory's matrices."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or kind in (Kind.F32, Kind.F16):
            continue
        packed = gguf.quantize(tensor.float().numpy(), kind)
        tensors[name] = torch.from_numpy(gguf.dequantize(packed, kind)).to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
