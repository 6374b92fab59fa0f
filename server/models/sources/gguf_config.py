"""The transformers config for the keys of a GGUF file.

Every key about the architecture is used or rejected, because ignoring a key may give a different
function.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from turret.server.models.sources.gguf_header import refuse
from turret.server.models.sources.gguf_layouts import WANTED, GgufLayout, layout_of

if TYPE_CHECKING:
    from gguf import ReaderTensor


# Reads rotary positions from the keys of a GGUF file, and from tensors of factors.


# Tensors that hold rotary factors, not weights.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_ORIGINAL = "rope.scaling.original_context_length"
# Converters use either of these names for the factor.
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
    """``rope_parameters`` of a config, for the layers without a window.

    Args:
        path: The path for messages.
        said: The file's keys below the architecture.
        theta: The default for files without this number.
        head_dim: Features of a head.
        tensors: The file's, by name.

    Raises:
        InvalidRequestError: The positions are scaled in an unsupported way.
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
            "long_factor": _rope_values(long),
            "short_factor": _rope_values(short),
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


def _rope_values(tensor: ReaderTensor) -> list[float]:
    return [float(value) for value in np.array(tensor.data, np.float32)]


def _llama3(path: Path, theta: float, head_dim: int, freqs: ReaderTensor) -> dict[str, Any]:
    """Find the parameters that give llama.cpp's divisors of the frequencies."""
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


# Keys that are read below, or that add no information.
_READ = frozenset(
    {
        *("attention.key_length", "attention.value_length", "vocab_size"),
        "attention.head_count_kv",
        *ROPE_KEYS,
    }
)
# Keys of the vision tower, whose tensors are in a separate file.
_OF_IMAGES = ("mm.", "vision.")
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_KINDS = ("full_attention", "sliding_attention")


def read_gguf_config(
    path: Path, fields: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]
) -> tuple[Any, GgufLayout]:
    """A transformers config, and the layout of the file.

    Args:
        path: The path for messages.
        fields: All keys of the file.
        tensors: Its tensors by name.

    Raises:
        InvalidRequestError: A key is missing or has an unsupported value.
    """
    from transformers import AutoConfig

    prefix = f"{fields['general.architecture']}."
    said = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
    layout = layout_of(fields["general.architecture"], said)
    wanted = {**WANTED, **layout.fields}
    if layout.window in ("all", "some"):
        wanted |= {_WINDOW: "sliding_window"}
    _check_keys(path, prefix, said, layout, wanted)
    heads = said["attention.head_count"]
    head_dim = said.get("attention.key_length", said["embedding_length"] // heads)
    # One key may set several fields.
    values = {name: said[key] for key, names in wanted.items() for name in names.split()}
    values |= {name: said[key] for key, name in layout.optional.items() if key in said}
    values |= {
        **layout.constants,
        "num_key_value_heads": _kv_heads(path, said.get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        **_attention(said, layout, head_dim),
        "rope_parameters": _ropes(path, said, layout, head_dim, tensors),
    }
    if layout.window == "all":
        # Zero means that there is no window.
        values["sliding_window"] = values["sliding_window"] or None
    return AutoConfig.for_model(layout.model_type, **values), layout


def _check_keys(
    path: Path,
    prefix: str,
    said: Mapping[str, Any],
    layout: GgufLayout,
    wanted: Mapping[str, str],
) -> None:
    needed = wanted.keys() | layout.rope_fields.keys()
    lacking = sorted(f"{prefix}{key}" for key in needed if key not in said)
    known = _READ | needed | layout.optional.keys() | layout.ignored
    if layout.window == "some":
        known |= {_PATTERN}
    # Ignore keys that declare zero experts.
    odd = sorted(
        key
        for key in said.keys() - known
        if not key.startswith(_OF_IMAGES) and not (key.startswith("expert_") and said[key] == 0)
    )
    if lacking:
        raise refuse(path, "GGUF_KEY_MISSING", key=lacking[0])
    if odd:
        raise refuse(path, "GGUF_KEY_UNSUPPORTED", key=f"{prefix}{odd[0]}")


def _kv_heads(path: Path, said: int | list[int]) -> int:
    """The number of key and value heads, which the file may list for each layer."""
    counts = set(said) if isinstance(said, list) else {said}
    if len(counts) != 1:
        raise refuse(path, "GGUF_HEADS_DIFFER")
    return int(counts.pop())


def _attention(said: Mapping[str, Any], layout: GgufLayout, head_dim: int) -> dict[str, Any]:
    """The config's keys for sliding windows and for the scale of the scores."""
    layers: int = said["block_count"]
    values: dict[str, Any] = {}
    if layout.window == "never":
        values["layer_types"] = [_KINDS[0]] * layers
    if layout.window == "some":
        pattern = said.get(_PATTERN, layout.full_every)
        if isinstance(pattern, list):
            has_window = [bool(flag) for flag in pattern]
        else:
            has_window = [(layer + 1) % pattern != 0 for layer in range(layers)]
        values["layer_types"] = [_KINDS[flag] for flag in has_window]
    if layout.wide_layers is not None:
        is_wide = layers == layout.wide_layers
        width = said["embedding_length"] // said["attention.head_count"]
        values["query_pre_attn_scalar"] = width if is_wide else head_dim
    return values


def _ropes(
    path: Path,
    said: Mapping[str, Any],
    layout: GgufLayout,
    head_dim: int,
    tensors: Mapping[str, ReaderTensor],
) -> dict[str, Any]:
    rotated = said.get("rope.dimension_count", head_dim)
    if said.get("attention.value_length", head_dim) != head_dim or (
        rotated != head_dim and not layout.rotates_part
    ):
        raise refuse(path, "GGUF_HEADS_UNSUPPORTED")
    rope = read_rope_parameters(path, said, layout.theta, head_dim, tensors)
    if layout.rotates_part:
        if "rope.dimension_count" not in said:
            raise refuse(path, "GGUF_KEY_MISSING", key="rope.dimension_count")
        rope["partial_rotary_factor"] = rotated / head_dim
    rope |= {name: float(said[key]) for key, name in layout.rope_fields.items()}
    if rope["rope_type"] != "default":
        rope |= layout.rope_constants
    own = said.get("rope.freq_base_swa", layout.swa_theta or rope["rope_theta"])
    if layout.ropes_by_kind:
        plain = {"rope_type": "default", "rope_theta": float(own)}
        return dict(zip(_KINDS, (rope, plain), strict=True))
    if own != rope["rope_theta"]:
        raise refuse(path, "GGUF_KEY_UNSUPPORTED", key="rope.freq_base_swa")
    return rope
