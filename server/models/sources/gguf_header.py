"""What the first bytes of a GGUF file say, read without torch and without the rest of it.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from turret.server.errors import InvalidRequestError
from turret.server.models.sources.gguf_layouts import LAYOUTS

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_STRING = 8
# Type → bytes of a value.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_TEXT = 1 << 16
# The architecture comes first, by the specification's own advice.
_MAX_KEYS = 64


def check_gguf(path: Path) -> str:
    """Refuse a file that is no GGUF of an architecture that is served.

    Returns:
        Its ``model_type``.

    Raises:
        InvalidRequestError: Says what it is instead.
    """
    try:
        with path.open("rb") as file:
            architecture = _architecture(file)
    except (struct.error, UnicodeDecodeError):
        architecture = ""
    if not architecture:
        raise refuse(path, "is no GGUF file of version 2 or 3 that names its architecture")
    if architecture not in LAYOUTS:
        served = ", ".join(sorted(LAYOUTS))
        raise refuse(
            path,
            f"is of architecture {architecture!r:.80}; of GGUF files {served} are served, others as"
            " a directory in Hugging Face format",
        )
    return ARCHITECTURES[architecture]


def refuse(path: Path, why: str) -> InvalidRequestError:
    """A refusal of the file."""
    return InvalidRequestError.of("model", f"{path} {why}")


def _architecture(file: BinaryIO) -> str:
    magic, version, _, num_keys = struct.unpack("<4sIQQ", file.read(24))
    if magic != _MAGIC or version not in (2, 3):
        return ""
    for _ in range(min(num_keys, _MAX_KEYS)):
        key = _text(file)
        (kind,) = struct.unpack("<I", file.read(4))
        if kind == _STRING:
            value = _text(file)
            if key == "general.architecture":
                return value
        elif kind in _SCALARS:
            file.read(_SCALARS[kind])
        else:
            return ""
    return ""


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_TEXT:
        raise struct.error("a text that long is none")
    return file.read(length).decode()
