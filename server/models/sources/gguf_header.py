"""What the first bytes of a GGUF file say, read without torch and without the rest of it.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from turret.server.errors import InvalidRequestError
from turret.server.models.sources.gguf_layouts import LAYOUTS, layout_of

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# Type → form of a value, as ``struct`` writes it.
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i"},
    **{6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"},
}
_MAX_TEXT = 1 << 16
# Keys about the model come before the vocabulary, which is long.
_MAX_KEYS = 256
_VOCABULARY = "tokenizer."


def check_gguf(path: Path) -> str:
    """Refuse a file that is no GGUF of an architecture that is served.

    Returns:
        Its ``model_type``.

    Raises:
        InvalidRequestError: Says what it is instead.
    """
    said = _said_by(path)
    architecture = said.get("general.architecture", "")
    if not isinstance(architecture, str) or not architecture:
        raise refuse(path, "is no GGUF file of version 2 or 3 that names its architecture")
    if architecture not in LAYOUTS:
        served = ", ".join(sorted(LAYOUTS))
        raise refuse(
            path,
            f"is of architecture {architecture!r:.80}; of GGUF files {served} are served, others as"
            " a directory in Hugging Face format",
        )
    prefix = f"{architecture}."
    return layout_of(
        architecture, {key.removeprefix(prefix): value for key, value in said.items()}
    ).model_type


def gguf_size(path: Path) -> tuple[int, int] | None:
    """Width and layers of the model in a file that :func:`check_gguf` took; None if not told."""
    sizes = read_sizes(path)
    width, layers = sizes.get("embedding_length"), sizes.get("block_count")
    return (width, layers) if isinstance(width, int) and isinstance(layers, int) else None


def read_sizes(path: Path) -> dict[str, Any]:
    """What a file that :func:`check_gguf` took says of its architecture, by key without prefix."""
    said = _said_by(path)
    prefix = f"{said['general.architecture']}."
    return {k.removeprefix(prefix): value for k, value in said.items() if k.startswith(prefix)}


def _said_by(path: Path) -> dict[str, Any]:
    """Nothing if it is no GGUF file."""
    try:
        with path.open("rb") as file:
            return _keys(file)
    except (struct.error, UnicodeDecodeError):
        return {}


def refuse(path: Path, why: str) -> InvalidRequestError:
    """A refusal of the file."""
    return InvalidRequestError.of("model", f"{path} {why}")


def _keys(file: BinaryIO) -> dict[str, Any]:
    """Texts and numbers of the keys before the vocabulary."""
    magic, version, _, num_keys = struct.unpack("<4sIQQ", file.read(24))
    said: dict[str, Any] = {}
    if magic != _MAGIC or version not in (2, 3):
        return said
    for _ in range(min(num_keys, _MAX_KEYS)):
        key = _text(file)
        (kind,) = struct.unpack("<I", file.read(4))
        if key.startswith(_VOCABULARY):
            break
        if kind == _STRING:
            said[key] = _text(file)
        elif kind in _SCALARS:
            form = _SCALARS[kind]
            (said[key],) = struct.unpack(form, file.read(struct.calcsize(form)))
        elif kind != _ARRAY or not _skip_array(file):
            break
    return said


def _skip_array(file: BinaryIO) -> bool:
    """Whether it is one of texts or numbers, which are passed over."""
    kind, count = struct.unpack("<IQ", file.read(12))
    if count > _MAX_TEXT or (kind != _STRING and kind not in _SCALARS):
        return False
    if kind != _STRING:
        file.seek(struct.calcsize(_SCALARS[kind]) * count, 1)
        return True
    for _ in range(count):
        _text(file)
    return True


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_TEXT:
        raise struct.error("a text that long is none")
    return file.read(length).decode()
