"""The right side of the grammar rule for what a constraint allows."""

from __future__ import annotations

import re
from typing import Any

from turret.server.http.tools.schemas import json_rule

# Text that llguidance reads as a Lark grammar, not as GBNF.
_LARK = re.compile(r"(?m)^\s*(%llguidance\b|start\s*:)")
_META = re.compile(r"([\\.+*?()|\[\]{}^$#&~/-])")
_SLASH = re.compile(r"(?s)(\\.)|(/)|(\n)")


def constrained(kind: str, value: Any) -> str | None:
    """The rule for an answer; None if a constraint cannot be combined with other rules.

    Args:
        kind: ``json_schema``, ``json_object``, ``regex``, ``grammar`` or ``choice``.
        value: A schema, true, an expression, Lark, or texts.
    """
    if kind == "json_schema":
        return json_rule(value)
    if kind == "json_object":
        return json_rule({"type": "object"})
    if kind == "regex":
        return f"/{_SLASH.sub(_escaped, value)}/"
    if kind == "choice":
        texts = "|".join(_META.sub(r"\\\1", text).replace("\n", "\\n") for text in value)
        return f"/(?:{texts})/"
    return f"%lark {{\n{value}\n}}" if _LARK.search(value) else None


def _escaped(found: re.Match[str]) -> str:
    return found[1] or ("\\/" if found[2] else "\\n")
