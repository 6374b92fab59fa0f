"""Writes safetensors files in parts.

The library's single call would build a whole file in memory, and hold the GIL meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from turret.lazy_torch import torch


def safetensors_parts(tensors: Mapping[str, Any], line: int = 8) -> Iterator[bytes | memoryview]:
    """The header of a file with tensors in this order, then the bytes of each tensor.

    Args:
        tensors: The tensors by name, on the CPU.
        line: The header ends at a multiple of this number of bytes.
    """
    dtypes = {
        **{torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"},
        **{torch.int8: "I8", torch.uint8: "U8"},
    }
    header, end = dict[str, Any](__metadata__={"format": "pt"}), 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entry = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % line)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
