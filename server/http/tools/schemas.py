"""JSON schemas of tools' arguments: what values they allow, and the grammar of these."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from turret.server.words import Text

KINDS = frozenset({"string", "number", "boolean", "null", "array", "object"})
_DEPTH = 8
# The same whitespace as between the tokens of any constrained JSON.
_BLANKS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}


class UnenforceableError(Exception):
    """A grammar cannot keep to a tool's parameters.

    Args:
        tool: Its name.
        path: Within the schema of its arguments, a dot before each part.
        text: What is wrong there.
    """

    def __init__(self, tool: str, path: str, text: Text) -> None:
        super().__init__(text)
        self.tool = tool
        self.path = path
        self.text = text


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a rule, on one line: JSON that a schema describes."""
    return f"%json {json.dumps({**schema, 'x-guidance': _BLANKS})}"


def kinds_of(schema: Any, root: Any, depth: int = 0) -> frozenset[str]:
    """The JSON types that a value may have, ``integer`` counted as ``number``.

    Args:
        schema: Of the value; what is no schema says that it is a text.
        root: Where ``#/...`` references begin.
        depth: Of references and alternatives so far.
    """
    if not isinstance(schema, dict) or depth > _DEPTH:
        return frozenset({"string"})
    if "$ref" in schema:
        return kinds_of(resolved(schema["$ref"], root), root, depth + 1)
    if "const" in schema or isinstance(schema.get("enum"), list):
        return frozenset(map(kind_of, schema.get("enum", [schema.get("const")])))
    named = schema.get("type")
    if named is not None:
        names = named if isinstance(named, list) else [named]
        found = frozenset("number" if name == "integer" else str(name) for name in names)
        return found & KINDS or frozenset({"string"})
    for several in ("anyOf", "oneOf", "allOf"):
        members = schema.get(several)
        if isinstance(members, list) and members:
            return frozenset().union(*(kinds_of(one, root, depth + 1) for one in members))
    return KINDS


def resolved(reference: Any, root: Any) -> Any:
    """What a reference within a schema points to, or None."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found


def kind_of(value: Any) -> str:
    """The JSON type of a value, without ``integer``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"
