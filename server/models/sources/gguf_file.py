"""A model in a GGUF file: its config, its tokenizer, and its weights, dequantised one at a time.

Every tensor and every key is used or rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from turret.server.errors import TurretError
from turret.server.models.encoder import LLAMA3
from turret.server.models.sources.gguf_config import ROPE_TENSORS, read_gguf_config
from turret.server.models.sources.gguf_header import check_gguf, check_whole, refuse
from turret.server.models.sources.gguf_layouts import GgufLayout, Pair

if TYPE_CHECKING:
    from gguf import ReaderTensor


# The weights of a GGUF file by their names in Hugging Face's checkpoints.


_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_KINDS = ("weight", "bias")
_NUMBERS = ("f32", "f16", "bf16")


class GgufTensors:
    """Iterates over name and float32 values of each weight. Only one is in memory at a time.

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
            if kind not in _KINDS or (known is None and other is None):
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
    """A tensor, or two as one."""
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

# Key for the pre-tokenizer, the rules that split a text before merging, by llama.cpp's names.
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
    tokenizer = kind.from_pretrained(path.parent, gguf_file=path.name, **_bos_rule(fields))
    if is_bytes and pre in _AS_LLAMA3:
        _split_as_llama3(tokenizer)
    return tokenizer


def _bos_rule(fields: Mapping[str, object]) -> dict[str, bool]:
    """Add the BOS rule that older files of Llama 3 and Mistral Nemo lack."""
    is_silent = "tokenizer.ggml.add_bos_token" not in fields
    return {"add_bos_token": True} if is_silent and fields.get(_PRE) in _WITH_BOS else {}


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
        tensors: Name and float32 values of each weight, as Hugging Face's checkpoints have them.
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
