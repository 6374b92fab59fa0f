"""The weights of a GGUF file by their names in Hugging Face's checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from turret.server.models.sources.gguf_header import refuse
from turret.server.models.sources.gguf_layouts import GgufLayout, Pair
from turret.server.models.sources.gguf_rope import ROPE_TENSORS

if TYPE_CHECKING:
    from gguf import ReaderTensor

_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_KINDS = ("weight", "bias")


class GgufTensors:
    """Iterates over name and float32 values of each weight; one is in memory at a time.

    Args:
        path: For messages.
        tensors: The file's, by name.
        layout: How they are stored.
        config: The model's.

    Raises:
        InvalidRequestError: The file has a tensor that nobody knows, or one of a pair without the
            other.
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

    def __len__(self) -> int:
        return sum(
            len(self._tensors[stored].data) if "{}" in name else 1
            for stored, name in self._names.items()
        )

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
    """Rows of q and k of a Llama in Hugging Face's order.

    llama.cpp rotates neighbouring features and stores rows so (``permute`` in its
    convert_hf_to_gguf.py); transformers rotates a feature with the one half a head away.
    """
    for module, heads in (
        ("q_proj", config.num_attention_heads),
        ("k_proj", config.num_key_value_heads),
    ):
        if f".{module}." in name:
            rows = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
            return rows.transpose(1, 2).reshape(values.shape)
    return values
