"""Writes GGUF files from Hugging Face directories, like llama.cpp's converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from builders.bases.gguf_converters import converter_of
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

# A chat template that differs from the tokenizer's own.
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def write_gguf(
    folder: Path,
    file: Path,
    kind: Kind,
    *,
    more: dict[str, Any] | None = None,
    pre: str = "default",
    experts: Kind | None = None,
    without: str | None = None,
) -> None:
    """Write a model's weights, its config and its tokenizer.

    Args:
        folder: A directory with one safetensors file.
        file: The file to write.
        kind: The kind of matrices; norms and biases are F32.
        more: Additional keys of the architecture; None omits a key.
        pre: llama.cpp's name of the tokenizer's splitting rules.
        experts: The kind of experts' matrices, if different.
        without: A tensor to omit.
    """
    config = json.loads((folder / "config.json").read_text())
    converter = converter_of(config)
    writer = gguf_writer(file, converter.architecture, name="Tiny")
    for key, value in {**converter.keys(config), **(more or {})}.items():
        if value is not None:
            add_key(writer, f"{converter.architecture}.{key}", value)
    _add_tokenizer(writer, folder, config, pre)
    for name, values in converter.factors(config).items():
        writer.add_tensor(name, values)
    names = gguf.get_tensor_name_map(converter.arch, config["num_hidden_layers"])
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in converter.converted(tensors, config):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        if stored == without:
            continue
        own = experts if experts is not None and "_exps." in stored else kind
        _add_tensor(writer, stored, tensor.float().numpy(), own)
    finish(writer)


def gguf_writer(file: Path, architecture: str, **keys: Any) -> gguf.GGUFWriter:
    """A writer to which these keys were added by its methods ``add_…``."""
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in keys.items():
        getattr(writer, f"add_{name}")(value)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_ADD: dict[type, Any] = {
    bool: gguf.GGUFWriter.add_bool,
    str: gguf.GGUFWriter.add_string,
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    list: gguf.GGUFWriter.add_array,
}


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write a value by its type."""
    _ADD[type(value)](writer, key, value)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Kind) -> None:
    is_router = name.endswith("ffn_gate_inp.weight")
    # The biases of experts have a row per expert.
    is_vector = values.ndim == 1 or name.endswith(".bias")
    if is_vector or is_router or kind == Kind.F32:
        writer.add_tensor(name, np.ascontiguousarray(values))
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
    # Files without merges have scores instead.
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template(TEMPLATE)


def dequantised_copy(folder: Path, kind: Kind) -> None:
    """Replace a directory's matrices with their values after quantisation to this kind."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or kind in (Kind.F32, Kind.F16):
            continue
        packed = gguf.quantize(tensor.float().numpy(), kind)
        tensors[name] = torch.from_numpy(gguf.dequantize(packed, kind)).to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
