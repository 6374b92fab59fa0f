"""A model in a GGUF file: its config, its tokenizer, and its weights, dequantised one at a time.

Every tensor is used or refused, as every key is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turret.server.models.sources.gguf_config import read_gguf_config
from turret.server.models.sources.gguf_header import check_gguf, check_whole, refuse
from turret.server.models.sources.gguf_tensors import GgufTensors
from turret.server.models.sources.gguf_tokenizer import read_gguf_tokenizer


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model as transformers would have it.

    Attributes:
        config: A transformers config.
        tokenizer: With the file's chat template.
        eos_token_ids: All that end an answer.
        num_tensors: How many ``tensors`` yields.
    """

    config: Any
    tokenizer: Any
    eos_token_ids: list[int]
    num_tensors: int
    _tensors: GgufTensors

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and float32 values of each weight, as Hugging Face's checkpoints have them."""
        return iter(self._tensors)


def open_gguf(path: Path) -> GgufModel:
    """Open a GGUF file and read everything except the weights.

    Raises:
        InvalidRequestError: It is damaged, or says what is not served.
    """
    # Imported here because it is slow and most models are not GGUF files.
    import gguf

    check_gguf(path)
    check_whole(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise refuse(path, "GGUF_UNREADABLE", problem=error) from None
    if fields.get("split.count", 1) > 1:
        raise refuse(path, "GGUF_SPLIT")
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in by_name:
        raise refuse(path, "TENSOR_MISSING", name="token_embd.weight")
    config, layout = read_gguf_config(path, fields, by_name)
    tensors = GgufTensors(path, by_name, layout, config)
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(int(end) for end in ends if end is not None))
    return GgufModel(config, read_gguf_tokenizer(path, fields, layout), eos, len(tensors), tensors)
