"""A model in a GGUF file: its config, its tokenizer, and its weights, dequantised one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from turret.server.errors import TurretError
from turret.server.models.encoder import LLAMA3
from turret.server.models.families import transformers_config
from turret.server.models.sources.gguf_header import check_gguf, check_whole, refuse
from turret.server.models.sources.gguf_layouts import WANTED, GgufLayout, Pair, layout_of
from turret.server.models.sources.model_directory import check_numbers

if TYPE_CHECKING:
    from gguf import ReaderTensor


# The transformers config for the keys of a GGUF file.
#
# Every tensor, and every key about the architecture, is used or rejected, because the model may
# compute something else without it.

# Rotary positions, from the keys of a GGUF file and from tensors of factors.


# Tensors that hold rotary factors, not weights.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_ORIGINAL = "rope.scaling.original_context_length"
# Converters use either of these names for the attention factor.
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
    keys: Mapping[str, Any],
    theta: float,
    head_dim: int,
    tensors: Mapping[str, ReaderTensor],
) -> dict[str, Any]:
    """``rope_parameters`` of a config, for the layers without a window.

    Args:
        path: The path for messages.
        keys: The file's keys below the architecture.
        theta: The default of ``rope_theta``, for files without that key.
        head_dim: Features of a head.
        tensors: The file's tensors by name.

    Raises:
        InvalidRequestError: The positions are scaled in an unsupported way.
    """
    rope: dict[str, Any] = {"rope_theta": float(keys.get("rope.freq_base", theta))}
    kind = keys.get("rope.scaling.type", "none")
    freqs, long, short = (tensors.get(name) for name in ROPE_TENSORS)
    scales = {float(keys[key]) for key in _ATTENTION_FACTORS if key in keys}
    if freqs is not None:
        if kind != "none" or long is not None:
            raise refuse(path, "GGUF_ROPE_UNSUPPORTED", kind=kind)
        return {**rope, **_llama3(path, rope["rope_theta"], head_dim, freqs)}
    if long is not None and short is not None and kind in ("none", "longrope"):
        rope |= {
            "rope_type": "longrope",
            "long_factor": _rope_values(long),
            "short_factor": _rope_values(short),
            "original_max_position_embeddings": _original(path, keys),
        }
    elif kind == "none" and long is short is None:
        rope["rope_type"] = "default"
    elif kind in ("linear", "yarn") and "rope.scaling.factor" in keys and long is short is None:
        rope |= {"rope_type": kind, "factor": float(keys["rope.scaling.factor"])}
    else:
        raise refuse(path, "GGUF_ROPE_UNSUPPORTED", kind=kind)
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = _original(path, keys)
        rope |= {name: float(keys[key]) for key, name in _YARN.items() if key in keys}
        if "mscale_all_dim" in rope:
            # llama.cpp uses mscale 1 whenever mscale_all_dim is present.
            rope["mscale"] = 1.0
    if rope["rope_type"] in ("yarn", "longrope"):
        if scales:
            rope["attention_factor"] = scales.pop()
    elif not scales <= {1.0}:
        raise refuse(path, "GGUF_ROPE_UNSUPPORTED", kind=kind)
    return rope


def _original(path: Path, keys: Mapping[str, Any]) -> int:
    if _ORIGINAL not in keys:
        raise refuse(path, "GGUF_KEY_MISSING", key=_ORIGINAL)
    return int(keys[_ORIGINAL])


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
    prefix = f"{fields['general.architecture']}."
    keys = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
    layout = layout_of(fields["general.architecture"], keys)
    wanted = {**WANTED, **layout.fields}
    if layout.window in ("all", "some"):
        wanted |= {_WINDOW: "sliding_window"}
    _check_keys(path, prefix, keys, layout, wanted)
    heads = keys["attention.head_count"]
    head_dim = keys.get("attention.key_length", keys["embedding_length"] // heads)
    # One key may set several fields.
    values = {name: keys[key] for key, names in wanted.items() for name in names.split()}
    values |= {name: keys[key] for key, name in layout.optional.items() if key in keys}
    values |= {
        **layout.constants,
        "num_key_value_heads": _kv_heads(path, keys.get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        **_attention(keys, layout, head_dim),
        "rope_parameters": _ropes(path, keys, layout, head_dim, tensors),
    }
    if layout.window == "all":
        # Zero means that there is no window.
        values["sliding_window"] = values["sliding_window"] or None
    check_numbers(values)
    return transformers_config({"model_type": layout.model_type, **values}), layout


def _check_keys(
    path: Path,
    prefix: str,
    keys: Mapping[str, Any],
    layout: GgufLayout,
    wanted: Mapping[str, str],
) -> None:
    needed = wanted.keys() | layout.rope_fields.keys()
    missing = sorted(f"{prefix}{key}" for key in needed if key not in keys)
    known = _READ | needed | layout.optional.keys() | layout.ignored
    if layout.window == "some":
        known |= {_PATTERN}
    # Ignore keys that declare zero experts.
    unknown = sorted(
        key
        for key in set(keys) - known
        if not key.startswith(_OF_IMAGES) and not (key.startswith("expert_") and keys[key] == 0)
    )
    if missing:
        raise refuse(path, "GGUF_KEY_MISSING", key=missing[0])
    if unknown:
        raise refuse(path, "GGUF_KEY_UNSUPPORTED", key=f"{prefix}{unknown[0]}")


def _kv_heads(path: Path, found: int | list[int]) -> int:
    """The number of key and value heads, which the file may list for each layer."""
    counts = set(found) if isinstance(found, list) else {found}
    if len(counts) != 1:
        raise refuse(path, "GGUF_HEADS_DIFFER")
    return int(counts.pop())


def _attention(keys: Mapping[str, Any], layout: GgufLayout, head_dim: int) -> dict[str, Any]:
    """The config's keys for sliding windows and for the scale of the scores."""
    layers: int = keys["block_count"]
    values: dict[str, Any] = {}
    if layout.window == "never":
        values["layer_types"] = [_KINDS[0]] * layers
    if layout.window == "some":
        pattern = keys.get(_PATTERN, layout.full_every)
        if isinstance(pattern, list):
            has_window = [bool(flag) for flag in pattern]
        else:
            has_window = [(layer + 1) % pattern != 0 for layer in range(layers)]
        values["layer_types"] = [_KINDS[flag] for flag in has_window]
    if layout.wide_layers is not None:
        is_wide = layers == layout.wide_layers
        width = keys["embedding_length"] // keys["attention.head_count"]
        values["query_pre_attn_scalar"] = width if is_wide else head_dim
    return values


def _ropes(
    path: Path,
    keys: Mapping[str, Any],
    layout: GgufLayout,
    head_dim: int,
    tensors: Mapping[str, ReaderTensor],
) -> dict[str, Any]:
    rotated = keys.get("rope.dimension_count", head_dim)
    if keys.get("attention.value_length", head_dim) != head_dim or (
        rotated != head_dim and not layout.rotates_part
    ):
        raise refuse(path, "GGUF_HEADS_UNSUPPORTED")
    rope = read_rope_parameters(path, keys, layout.theta, head_dim, tensors)
    if layout.rotates_part:
        if "rope.dimension_count" not in keys:
            raise refuse(path, "GGUF_KEY_MISSING", key="rope.dimension_count")
        rope["partial_rotary_factor"] = rotated / head_dim
    rope |= {name: float(keys[key]) for key, name in layout.rope_fields.items()}
    if rope["rope_type"] != "default":
        rope |= layout.rope_constants
    own = keys.get("rope.freq_base_swa", layout.swa_theta or rope["rope_theta"])
    if layout.ropes_by_kind:
        plain = {"rope_type": "default", "rope_theta": float(own)}
        return dict(zip(_KINDS, (rope, plain), strict=True))
    if own != rope["rope_theta"]:
        raise refuse(path, "GGUF_KEY_UNSUPPORTED", key="rope.freq_base_swa")
    return rope


# The weights of a GGUF file by their names in Hugging Face's checkpoints.


_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_SUFFIXES = ("weight", "bias")
_NUMBERS = ("f32", "f16", "bf16")


class GgufTensors:
    """Iterates over the weights as (name, float32 values). Only one is in memory at a time.

    Args:
        path: The path for messages.
        tensors: The file's tensors by name.
        layout: The layout of the file.
        config: The model's config.

    Raises:
        InvalidRequestError: The file has an unknown tensor, or one of a pair without the other.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, ReaderTensor], layout: GgufLayout, config: Any
    ) -> None:
        self._tensors = tensors
        self._layout = layout
        self._config = config
        self._pairs = {pair.first: pair for pair in layout.pairs}
        # Name in the file → name in a checkpoint; the second tensor of a pair has no entry.
        self._names: dict[str, str] = {}
        for name in tensors:
            if name in ROPE_TENSORS:
                continue
            block, part, kind = _split(name)
            other = self._other(part)
            known = self._name(block, part, kind)
            if kind not in _SUFFIXES or (known is None and other is None):
                raise refuse(path, "TENSORS_UNEXPECTED", names=name)
            if other is not None and f"{block}.{other}.{kind}" not in tensors:
                raise refuse(path, "TENSOR_MISSING", name=f"{block}.{other}.{kind}")
            if known is not None:
                self._names[name] = known

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for stored, name in self._names.items():
            block, part, kind = _split(stored)
            tensor, pair = self._tensors[stored], self._pairs.get(part)
            second = None if pair is None else self._tensors[f"{block}.{pair.second}.{kind}"]
            if "{}" not in name:
                yield name, self._transformed(name, _whole(_values(tensor), pair, second))
                continue
            for expert in range(len(tensor.data)):
                values = _whole(_values(tensor, expert), pair, second, expert)
                yield name.format(expert), values

    def formats(self) -> dict[str, str]:
        """The quantised format of each weight, such as ``q8_0``; empty if it is stored as numbers.

        The keys are the names that iteration yields.
        """
        found = {}
        for stored, name in self._names.items():
            tensor = self._tensors[stored]
            kind = tensor.tensor_type.name.lower()
            count = len(tensor.data) if "{}" in name else 1
            for expert in range(count):
                found[name.format(expert)] = "" if kind in _NUMBERS else kind
        return found

    def _other(self, part: str) -> str | None:
        """The other tensor of a pair, or None if the part is stored in one tensor."""
        for pair in self._layout.pairs:
            if part in (pair.first, pair.second):
                return pair.second if part == pair.first else pair.first
        return None

    def _name(self, block: str, part: str, kind: str) -> str | None:
        """``blk.3``, ``attn_q``, ``weight`` → ``model.layers.3.self_attn.q_proj.weight``."""
        if not block:
            return f"{_WHOLE[part]}.{kind}" if part in _WHOLE else None
        folder, _, number = block.partition(".")
        own = self._pairs[part].name if part in self._pairs else self._layout.parts.get(part)
        if folder != "blk" or not number.isdecimal() or own is None:
            return None
        suffix = "" if part in self._layout.bare else f".{kind}"
        return f"model.layers.{number}.{own}{suffix}"

    def _transformed(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if self._layout.norm_offset and name.endswith("norm.weight"):
            return values - self._layout.norm_offset
        if self._layout.is_permuted:
            return _unpermuted(name, values, self._config)
        return values


def _split(name: str) -> tuple[str, str, str]:
    """``blk.3.attn_q.weight`` → ``blk.3``, ``attn_q``, ``weight``."""
    module, _, kind = name.rpartition(".")
    block, _, part = module.rpartition(".")
    return block, part, kind


def _values(tensor: ReaderTensor, expert: int | None = None) -> torch.Tensor:
    import gguf

    data = tensor.data if expert is None else tensor.data[expert]
    return torch.from_numpy(np.array(gguf.dequantize(data, tensor.tensor_type), np.float32))


def _whole(
    first: torch.Tensor,
    pair: Pair | None,
    other: ReaderTensor | None,
    expert: int | None = None,
) -> torch.Tensor:
    """A tensor, or the two tensors of a pair as one."""
    if pair is None or other is None:
        return first
    second = _values(other, expert)
    if pair.alternates:
        return torch.stack((first, second), dim=1).flatten(0, 1)
    return torch.cat((first, second))


def _unpermuted(name: str, values: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of q and k of a Llama, in Hugging Face's order.

    llama.cpp rotates neighbouring features, and stores rows in that order (``permute`` in its
    convert_hf_to_gguf.py). transformers rotates a feature together with the one half a head away.
    """
    for module, heads in (
        ("q_proj", config.num_attention_heads),
        ("k_proj", config.num_key_value_heads),
    ):
        if f".{module}." in name:
            rows = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
            return rows.transpose(1, 2).reshape(values.shape)
    return values


# The tokenizer of a GGUF file, with its chat template.

# Key for llama.cpp's name of the pre-tokenizer: the rules that split a text before merging.
_PRE = "tokenizer.ggml.pre"
# Pre-tokenizers that put a BOS before every text if the file does not specify it (llama.cpp's
# rule).
_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "tekken")
# Pre-tokenizers that equal Llama 3's but that transformers does not know.
_AS_LLAMA3 = ("chatglm-bpe", "glm4")
# Pre-tokenizers that transformers supports, and those that equal its fallback, GPT-2's. Some of the
# latter split digits, which makes no difference, because none of their merges joins digits.
_KNOWN = frozenset(
    {
        *("dbrx", "falcon3", "falcon-h1", "llama3", "llama-bpe", "llama-v3", "midm-2.0", "pixtral"),
        *("smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "kormo", "megrez"),
        *("gpt-4o", "llama4", "kanana2"),
        *("default", "gpt-2", "granite-docling", "olmo", "refact", "smollm", "starcoder"),
        *_AS_LLAMA3,
    }
)


def read_gguf_tokenizer(path: Path, fields: Mapping[str, Any], layout: GgufLayout) -> Any:
    """A transformers tokenizer.

    Args:
        path: The file.
        fields: Its keys.
        layout: The layout of its architecture.

    Raises:
        InvalidRequestError: The tokenizer splits texts in an unsupported way.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    pre = fields.get(_PRE, "default")
    is_bytes = fields.get("tokenizer.ggml.model") == "gpt2"
    if is_bytes and pre not in _KNOWN:
        raise refuse(path, "GGUF_TOKENIZER_UNSUPPORTED", pre=pre)
    kind: Any = AutoTokenizer if layout.tokenizer == "auto" else PreTrainedTokenizerFast
    # Older files of Llama 3 and Mistral Nemo lack the rule.
    lacks_bos = "tokenizer.ggml.add_bos_token" not in fields and fields.get(_PRE) in _WITH_BOS
    rule = {"add_bos_token": True} if lacks_bos else {}
    tokenizer = kind.from_pretrained(path.parent, gguf_file=path.name, **rule)
    if is_bytes and pre in _AS_LLAMA3:
        _split_as_llama3(tokenizer)
    return tokenizer


def _split_as_llama3(tokenizer: Any) -> None:
    from tokenizers import Regex, pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model in the form of transformers.

    Attributes:
        config: A transformers config.
        tokenizer: The tokenizer, with the file's chat template.
        eos_token_ids: All tokens that end an answer.
        tensors: The weights, by their names in Hugging Face's checkpoints.
    """

    config: Any
    tokenizer: Any
    eos_token_ids: list[int]
    tensors: GgufTensors


def open_gguf(path: Path) -> GgufModel:
    """Open a GGUF file and read everything except the weights.

    Raises:
        InvalidRequestError: The file is damaged, or its model is not supported.
    """
    # Imported here because it is slow and most models are not GGUF files.
    import gguf

    check_gguf(path)
    check_whole(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        if fields.get("split.count", 1) > 1:
            raise refuse(path, "GGUF_SPLIT")
        by_name = {tensor.name: tensor for tensor in reader.tensors}
        if "token_embd.weight" not in by_name:
            raise refuse(path, "TENSOR_MISSING", name="token_embd.weight")
        config, layout = read_gguf_config(path, fields, by_name)
        tensors = GgufTensors(path, by_name, layout, config)
        ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        eos = list(dict.fromkeys(int(end) for end in ends if end is not None))
        return GgufModel(config, read_gguf_tokenizer(path, fields, layout), eos, tensors)
    except (TurretError, MemoryError):
        raise
    except Exception as error:
        # The libraries that read a damaged file raise errors of any type.
        raise refuse(path, "GGUF_UNREADABLE", problem=error) from None
