"""Models with the shapes of known ones, random weights, and the bundled model's tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common.machine import ROOT
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2Config,
)

from turret.training.base_model import find_base


def _sizes(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": True,
    }


# The sizes are those in the models' config.json on Hugging Face's hub.
_EXPERTS = {"num_experts": 64, "num_experts_per_tok": 8, "tie_word_embeddings": False}
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "SmolLM2-1.7B": lambda: LlamaConfig(**_sizes(2048, 8192, 24, 32, 32, 49152)),
    "Llama-3.2-1B": lambda: LlamaConfig(**_sizes(2048, 8192, 16, 32, 8, 128256)),
    "Qwen2.5-1.5B": lambda: Qwen2Config(**_sizes(1536, 8960, 28, 12, 2, 151936)),
    "Qwen2.5-3B": lambda: Qwen2Config(**_sizes(2048, 11008, 36, 16, 2, 151936)),
    "OLMoE-1B-7B": lambda: OlmoeConfig(**_sizes(2048, 1024, 16, 16, 16, 50304) | _EXPERTS),
}
_SPREAD = 0.02
_FILE_BYTES = 1 << 30


def write_model(name: str) -> Path:
    """The folder of a model with one of ``SHAPES``, below ``build/shapes``; written once."""
    folder = ROOT / "build" / "shapes" / name
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tokenizer = find_base(None).tokenizer
    tokenizer.save_pretrained(part)
    config = SHAPES[name]()
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    config.dtype = "bfloat16"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(part)
    _write_weights(model, part)
    part.rename(folder)
    return folder


def _as_saved(path: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter under its names in published checkpoints, which have separate experts."""
    experts, _, role = path.rpartition(".")
    if not experts.endswith(".experts"):
        return {path: value}
    roles = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[role]
    return {
        f"{experts}.{number}.{name}.weight": part.clone()
        for number, expert in enumerate(value)
        for name, part in zip(roles, expert.chunk(len(roles)), strict=True)
    }


def _write_weights(model: Any, folder: Path) -> None:
    """Write random weights to files of about a gigabyte, so that little memory is needed."""
    generator = torch.Generator().manual_seed(1)
    files: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if held:
            file = f"model-{len(set(files.values())):05}.safetensors"
            save_file(held, folder / file, {"format": "pt"})
            files.update(dict.fromkeys(held, file))
            held.clear()

    for path, weight in model.named_parameters():
        value = torch.ones(weight.shape, dtype=torch.bfloat16)
        if weight.dim() > 1:
            value.normal_(0.0, _SPREAD, generator=generator)
        held |= _as_saved(path, value)
        if sum(each.nbytes for each in held.values()) >= _FILE_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
