"""The pieces of an answer, the formats of tool calls, and the types in the schemas of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from turret.server.basics.codes import CHANNEL
from turret.server.words import Text


@dataclass(frozen=True, slots=True)
class Said:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The beginning of a tool call: the answer's ``index``-th, counted from 0.

    ``call_id`` is empty unless the model wrote an id; ``reader.py`` then creates one.
    """

    index: int
    name: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class CallGrown:
    """The next piece of a call's arguments, which are JSON."""

    index: int
    text: str


AnswerPiece = Said | Thought | CallBegun | CallGrown


@dataclass(frozen=True, slots=True)
class Form:
    """How a model writes calls.

    Attributes:
        begin: The mark before the first call of an answer, or before each one.
        end: The mark after a call, if there is one.
        separators: Characters that may separate two calls.
        is_bare: Whether an answer may begin with a call without ``begin``.
        is_list: Whether calls are entries of a JSON list.
        parameters: The name of the field with the arguments.
        syntax: The syntax of a call: ``{"name": ..., "arguments": {...}}`` (json), a name and then
            the arguments (named), ``<function=NAME>`` with a ``<parameter=NAME>`` for each (xml),
            or a message to the tool (channels; see ``server/basics/codes.py``).
    """

    begin: str
    end: str = ""
    separators: str = ""
    is_bare: bool = False
    is_list: bool = False
    parameters: str = "arguments"
    syntax: Literal["json", "named", "xml", "channels"] = "json"


FORMS = {
    "hermes": Form("<tool_call>", "</tool_call>"),
    # Qwen3-Coder and later Qwen models.
    "xml": Form("<tool_call>", "</tool_call>", syntax="xml"),
    "llama3": Form("<|python_tag|>", separators=";", is_bare=True, parameters="parameters"),
    "mistral": Form("[TOOL_CALLS]", separators=",", is_bare=True, is_list=True),
    # Mistral's tokenizers, since version 11, write a mark before each call instead of a list.
    "mistral11": Form("[TOOL_CALLS]", syntax="named"),
    # gpt-oss: a call ends the answer.
    "harmony": Form(CHANNEL, syntax="channels"),
}
# Marks of ``mistral11``: before the id of a call, and before its arguments.
CALL_ID, ARGUMENTS = "[CALL_ID]", "[ARGS]"


_KINDS_OF_TYPES = {
    **{str: "string", int: "number", float: "number", bool: "boolean"},
    **{type(None): "null", list: "array", dict: "object"},
}
KINDS = frozenset(_KINDS_OF_TYPES.values())
# Limits on what is followed for the type of one value. Otherwise, alternatives that refer to each
# other could take any amount of time.
MAX_ALTERNATIVES = 32
_MAX_REFERENCE_CHARS = 256
# The same whitespace as between the tokens of any constrained JSON.
_BLANKS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}


class UnenforceableError(Exception):
    """A grammar cannot enforce the schema of a tool's parameters.

    Args:
        tool: The tool's name.
        path: The faulty part of the schema, with a dot before each step.
        text: The fault.
    """

    def __init__(self, tool: str, path: str, text: Text) -> None:
        super().__init__(text)
        self.tool = tool
        self.path = path
        self.text = text


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a grammar rule, on one line, for JSON that matches a schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': _BLANKS})}"


def allowed_values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that ``enum`` or ``const`` allows; None if neither restricts the value."""
    if isinstance(schema.get("enum"), list):
        return schema["enum"]
    return [schema["const"]] if "const" in schema else None


def kinds_of(schema: Any, root: Any) -> frozenset[str]:
    """The JSON types that a value may have, ``integer`` counted as ``number``.

    Args:
        schema: The value's schema. A value whose schema is invalid counts as a string, and so does
            a value with more than ``MAX_ALTERNATIVES`` schemas.
        root: The schema in which ``#/...`` references are looked up.
    """
    found: set[str] = set()
    followed: list[Any] = []
    left = [schema]
    while left:
        one = left.pop()
        # References and alternatives can form cycles.
        if any(one is each for each in followed):
            continue
        if len(followed) == MAX_ALTERNATIVES:
            return frozenset((*found, "string"))
        followed.append(one)
        if not isinstance(one, dict):
            found.add("string")
        elif "$ref" in one:
            left.append(resolved(one["$ref"], root))
        elif (values := allowed_values(one)) is not None:
            found.update(_KINDS_OF_TYPES[kind] for kind in set(map(type, values)))
        elif one.get("type") is not None:
            named = one["type"] if isinstance(one["type"], list) else [one["type"]]
            names = {"number" if name == "integer" else str(name) for name in named}
            found |= names & KINDS or {"string"}
        else:
            joined = (one.get(key) for key in ("anyOf", "oneOf", "allOf"))
            members = next((each for each in joined if isinstance(each, list) and each), None)
            if members is None:
                found |= KINDS
            else:
                left += members[: MAX_ALTERNATIVES + 1]
    return frozenset(found or {"string"})


def resolved(reference: Any, root: Any) -> Any:
    """The target of a reference within a schema, or None."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    if len(reference) > _MAX_REFERENCE_CHARS:
        return None
    found = root
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found


def kind_of(value: Any) -> str:
    """The JSON type of a parsed value, without ``integer``."""
    return _KINDS_OF_TYPES[type(value)]
