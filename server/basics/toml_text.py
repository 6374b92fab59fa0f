"""TOML as people write it."""

from __future__ import annotations

import json
import tomllib
from typing import Any

from turret.server.words import say


def parse_toml(data: bytes) -> dict[str, Any]:
    """The tables of a file; a byte-order mark, as editors on Windows write one, is passed over.

    Raises:
        ValueError: It is no UTF-8 or no TOML; says where.
    """
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(say("NOT_TOML", why=str(error))) from None


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
