"""The table in docs/models.md of the memory that models of several sizes take."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from turret.server.models.families import read_arch
from turret.server.models.memory import memory_of
from turret.words import about_bytes

_RANKS = (8, 16, 64)


def _shape(
    model_type: str, hidden: int, inner: int, layers: int, heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    """The part of a published config.json that determines the memory; Qwen2 has four KV heads."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4 if model_type == "qwen2" else 8,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "Llama 3.2 1B": _shape("llama", 2048, 8192, 16, 32, 128256, True),
    "Qwen2.5 7B": _shape("qwen2", 3584, 18944, 28, 28, 152064, False),
    "Llama 3.1 8B": _shape("llama", 4096, 14336, 32, 32, 128256, False),
    "Llama 3.3 70B": _shape("llama", 8192, 28672, 80, 64, 128256, False),
}


def render_memory() -> str:
    ranks = " | ".join(f"LoRA, rank {rank}" for rank in _RANKS)
    lines = [f"| model | base | base in 16 bits | KV cache, 1,000 tokens | {ranks} |"]
    lines.append("|---" * lines[0].count(" | ") + "|---|")
    for name, shape in SHAPES.items():
        found = memory_of(read_arch(AutoConfig.for_model(**shape)))
        sizes = [found.base, found.base_wide, 1000 * found.kv_per_token]
        sizes += [rank * found.adapter_per_rank for rank in _RANKS]
        lines.append(f"| {name} | {' | '.join(map(about_bytes, sizes))} |")
    return "\n".join(lines)
