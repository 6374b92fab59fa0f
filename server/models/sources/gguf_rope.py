"""Reads rotary positions from a GGUF file: from keys, and from tensors of factors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from turret.server.models.sources.gguf_header import refuse

if TYPE_CHECKING:
    from gguf import ReaderTensor

# Tensors that hold rotary factors, not weights.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_ORIGINAL = "rope.scaling.original_context_length"
# Different converters use one name or the other for this factor.
_ATTENTION_FACTORS = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
_YARN = {
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
}
# ``rope.scaling.finetuned`` is accepted but has no effect.
ROPE_KEYS = frozenset(
    {
        *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned", _ORIGINAL),
        *_ATTENTION_FACTORS,
        *_YARN,
    }
)
# Llama 3.1 and 3.2 as released (arXiv 2407.21783): llama.cpp stores the factors that result from
# these parameters, but not the parameters themselves.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_FACTORS = (8.0, 32.0)


def read_rope_parameters(
    path: Path,
    said: Mapping[str, Any],
    theta: float,
    head_dim: int,
    tensors: Mapping[str, ReaderTensor],
) -> dict[str, Any]:
    """``rope_parameters`` of a config, of the layers that see everything.

    Args:
        path: For messages.
        said: The file's keys below the architecture.
        theta: Of files that do not tell it.
        head_dim: Features of a head.
        tensors: The file's, by name.

    Raises:
        InvalidRequestError: They are scaled in a way that is not read.
    """
    rope: dict[str, Any] = {"rope_theta": float(said.get("rope.freq_base", theta))}
    kind = said.get("rope.scaling.type", "none")
    freqs, long, short = (tensors.get(name) for name in ROPE_TENSORS)
    scales = {float(said[key]) for key in _ATTENTION_FACTORS if key in said}
    if freqs is not None:
        if kind != "none" or long is not None:
            raise refuse(path, "GGUF_ROPE_UNSUPPORTED", kind=kind)
        return {**rope, **_llama3(path, rope["rope_theta"], head_dim, freqs)}
    if long is not None and short is not None and kind in ("none", "longrope"):
        rope |= {
            "rope_type": "longrope",
            "long_factor": _values(long),
            "short_factor": _values(short),
            "original_max_position_embeddings": _original(path, said),
        }
    elif kind == "none" and long is short is None:
        rope["rope_type"] = "default"
    elif kind in ("linear", "yarn") and "rope.scaling.factor" in said and long is short is None:
        rope |= {"rope_type": kind, "factor": float(said["rope.scaling.factor"])}
    else:
        raise refuse(path, "GGUF_ROPE_UNSUPPORTED", kind=kind)
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = _original(path, said)
        rope |= {name: float(said[key]) for key, name in _YARN.items() if key in said}
        if "mscale_all_dim" in rope:
            # llama.cpp uses mscale 1 whenever mscale_all_dim is present.
            rope["mscale"] = 1.0
    if rope["rope_type"] in ("yarn", "longrope"):
        if scales:
            rope["attention_factor"] = scales.pop()
    elif not scales <= {1.0}:
        raise refuse(path, "GGUF_ROPE_UNSUPPORTED", kind=kind)
    return rope


def _original(path: Path, said: Mapping[str, Any]) -> int:
    if _ORIGINAL not in said:
        raise refuse(path, "GGUF_KEY_MISSING", key=_ORIGINAL)
    return int(said[_ORIGINAL])


def _values(tensor: ReaderTensor) -> list[float]:
    return [float(value) for value in np.array(tensor.data, np.float32)]


def _llama3(path: Path, theta: float, head_dim: int, freqs: ReaderTensor) -> dict[str, Any]:
    """Find the parameters that give the factors by which llama.cpp divides the frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = torch.from_numpy(np.array(freqs.data, np.float32))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    for factor in _LLAMA3_FACTORS:
        rope = {**_LLAMA3, "factor": factor}
        config = LlamaConfig(
            head_dim=head_dim,
            max_position_embeddings=131072,
            rope_parameters={**rope, "rope_theta": theta},
        )
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if found.shape == plain.shape and torch.allclose(plain / scaled, found, rtol=1e-3):
            return rope
    raise refuse(path, "GGUF_ROPE_UNSUPPORTED", kind="llama3")
