"""Reads the first bytes of a GGUF file, without torch and without the rest of the file.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from turret.server.errors import InvalidRequestError
from turret.server.models.sources.gguf_layouts import LAYOUTS, WANTED, layout_of
from turret.server.models.sources.model_directory import MOST_SIZES, check_size
from turret.server.words import say

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# Value type → format character of ``struct``.
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i"},
    **{6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"},
}
_MAX_TEXT = 1 << 16
# Maximum number of keys to read. Keys about the model come before the vocabulary, which is long.
_MAX_KEYS = 256
_MAX_SIZES = 8
_VOCABULARY = "tokenizer."
_ALIGNMENT = "general.alignment"
# Tensor type → elements and bytes of a block, copied from ``gguf``, which is slow to import.
_BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110)},
    **{22: (256, 82), 23: (256, 136), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54)},
    **{35: (256, 66), 39: (32, 17)},
}


def check_gguf(path: Path) -> str:
    """Check that a file is a GGUF file with a supported architecture.

    Returns:
        Its ``model_type``.

    Raises:
        InvalidRequestError: The file is not. The error states what it is instead.
    """
    architecture, keys = _own_keys(path)
    if not architecture:
        raise refuse(path, "GGUF_INVALID")
    if architecture not in LAYOUTS:
        served = ", ".join(sorted(LAYOUTS))
        raise refuse(path, "GGUF_ARCHITECTURE", value=architecture[:80], choices=served)
    # ``keys`` has no lists. Sizes that are lists are checked when the file is opened.
    for key in WANTED.keys() & keys:
        if WANTED[key] in MOST_SIZES:
            check_size(f"{architecture}.{key}", keys[key], WANTED[key])
    return layout_of(architecture, keys).model_type


def check_whole(path: Path) -> None:
    """Check that a file that :func:`check_gguf` accepted does not end before its tensors do.

    Raises:
        InvalidRequestError: The file is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            whole = _end_of_tensors(file)
        except struct.error:
            whole = size + (file.tell() >= size)
        except (ValueError, OverflowError, OSError, RecursionError):
            # Other damage is reported by the gguf reader.
            return
    if size < whole:
        raise refuse(path, "FILE_DAMAGED")


def known_fields(path: Path) -> dict[str, Any]:
    """Config fields of a file that :func:`check_gguf` accepted, read before its tensors.

    Only texts and numbers are read. The names are those of transformers' fields.
    """
    architecture, keys = _own_keys(path)
    layout = layout_of(architecture, keys)
    others = {"attention.head_count_kv": "num_key_value_heads", "vocab_size": "vocab_size"}
    wanted = {**WANTED, **others, **layout.fields}
    config = {
        name: keys[key] for key, names in wanted.items() if key in keys for name in names.split()
    }
    hidden, heads = (config.get(name) for name in ("hidden_size", "num_attention_heads"))
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        config["head_dim"] = keys.get("attention.key_length", hidden // heads)
    return {**config, **layout.constants}


def refuse(path: Path, reason: str, **params: object) -> InvalidRequestError:
    """The error for a file that is rejected."""
    return InvalidRequestError.of("model", say(reason, path=path, **params))


def _own_keys(path: Path) -> tuple[str, dict[str, Any]]:
    """The architecture of a file, and the texts and numbers whose keys begin with it.

    The keys are returned without that prefix. Only keys before the vocabulary are read. Both
    results are empty if the file is not GGUF.
    """
    keys: dict[str, Any] = {}
    with path.open("rb") as file:
        try:
            magic, version, _, num_keys = struct.unpack("<4sIQQ", file.read(24))
            if magic != _MAGIC or version not in (2, 3):
                return "", {}
            for key, value in _entries(file, min(num_keys, _MAX_KEYS)):
                if key.startswith(_VOCABULARY):
                    break
                if value is not None:
                    keys[key] = value
        except (struct.error, ValueError, OverflowError, OSError, RecursionError):
            return "", {}
    architecture = keys.get("general.architecture")
    if not isinstance(architecture, str):
        return "", {}
    prefix = f"{architecture}."
    return architecture, {
        k.removeprefix(prefix): v for k, v in keys.items() if k.startswith(prefix)
    }


def _end_of_tensors(file: BinaryIO) -> int:
    """End of the last tensor, in bytes from the file's start; a lower bound for unknown types."""
    _, _, num_tensors, num_keys = struct.unpack("<4sIQQ", file.read(24))
    alignment = 32
    for key, value in _entries(file, num_keys):
        if key == _ALIGNMENT and isinstance(value, int):
            alignment = value
    ends = [0]
    for _ in range(num_tensors):
        _text(file)
        (num_sizes,) = struct.unpack("<I", file.read(4))
        if num_sizes > _MAX_SIZES:
            raise ValueError("a tensor has too many dimensions")
        *sizes, kind, offset = struct.unpack(f"<{num_sizes}QIQ", file.read(8 * num_sizes + 12))
        numbers, block = _BLOCKS.get(kind, (1, 0))
        ends.append(offset + math.prod(sizes) // numbers * block)
    begin = file.tell()
    return begin + -begin % max(1, alignment) + max(ends)


def _entries(file: BinaryIO, count: int) -> Iterator[tuple[str, Any]]:
    """Keys and their values: texts and numbers, None for arrays and for long texts."""
    for _ in range(count):
        key = _text(file)
        (kind,) = struct.unpack("<I", file.read(4))
        yield key, _value(file, kind)


def _value(file: BinaryIO, kind: int) -> Any:
    """Read a value, or skip it, even past the end of the file."""
    if kind in _SCALARS:
        form = _SCALARS[kind]
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]
    if kind == _STRING:
        (length,) = struct.unpack("<Q", file.read(8))
        if length <= _MAX_TEXT:
            return file.read(length).decode(errors="replace")
        file.seek(length, 1)
        return None
    if kind != _ARRAY:
        raise ValueError("a value has an unknown type")
    inner, count = struct.unpack("<IQ", file.read(12))
    if inner in _SCALARS:
        file.seek(struct.calcsize(_SCALARS[inner]) * count, 1)
    else:
        for _ in range(count):
            _value(file, inner)
    return None


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_TEXT:
        raise struct.error("a string is too long")
    return file.read(length).decode()
