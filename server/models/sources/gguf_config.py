"""The transformers config that a GGUF file's keys make.

Every key about the architecture is used or refused: what a file says that nobody reads would make
another function of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turret.server.models.sources.gguf_header import refuse
from turret.server.models.sources.gguf_layouts import WANTED, GgufLayout, layout_of
from turret.server.models.sources.gguf_rope import ROPE_KEYS, read_rope_parameters

if TYPE_CHECKING:
    from gguf import ReaderTensor

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
    """A transformers config, and the row of the table that the file is read by.

    Args:
        path: For messages.
        fields: All keys of the file.
        tensors: Its tensors by name.

    Raises:
        InvalidRequestError: A key is lacking, or says what is not served.
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
    """The number of key and value heads, which the file may list layer by layer."""
    counts = set(said) if isinstance(said, list) else {said}
    if len(counts) != 1:
        raise refuse(path, "GGUF_HEADS_DIFFER")
    return int(counts.pop())


def _attention(said: Mapping[str, Any], layout: GgufLayout, head_dim: int) -> dict[str, Any]:
    """Which layers have a window, and what scales the scores."""
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
