"""TOML as people write it, with errors in their terms."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

# Maximum length of a quoted line.
_MOST_SHOWN = 80
_TWICE = "Cannot overwrite a value"
_PLACE = re.compile(r"\(at line (\d+), column \d+\)")
_BARE = re.compile(r"([\w-]+)\s*=\s*([A-Za-z./~][\w./~@:-]*)")
_YAML = re.compile(r"([\w-]+):(?:\s+(.*))?")


def parse_toml(data: bytes) -> dict[str, Any]:
    """The tables of a file; a byte-order mark, as editors on Windows write one, is passed over.

    Raises:
        ValueError: It is no UTF-8 or no TOML; says where.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is no UTF-8 text, as TOML is") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said = str(error).replace(_TWICE, "the same key stands twice")
        raise ValueError(f"{said}{_step(text, said)}") from None


def _step(text: str, said: str) -> str:
    """The line that the error concerns, and a hint about a frequent mistake in such lines."""
    place = _PLACE.search(said)
    line = text.split("\n")[int(place[1]) - 1].strip() if place else ""
    if found := _BARE.fullmatch(line):
        return f"; a text stands in quotes: {found[1]} = {json.dumps(found[2])}"
    if found := _YAML.fullmatch(line):
        return f"; this is YAML, and TOML has: {found[1]} = {found[2] or '…'}"
    shown = line if len(line) <= _MOST_SHOWN else f"{line[: _MOST_SHOWN - 1]}…"
    return f"; the line is {shown!r}" if line else ""


def toml_value(value: object) -> str:
    """A value in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON strings are valid TOML, except for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(each)}" for key, each in value.items()) + "}"
    return str(value)
