"""The grammar of one call in XML, whose parameters are texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from turret.server.http.tools.schemas import UnenforceableError, json_rule, kinds_of, resolved
from turret.server.words import Text, say

_END = "\n</parameter>\n"
# Unsupported keywords: in objects those that relate several parameters, in texts those that
# constrain more than the length.
_OF_OBJECTS = (
    *("$ref", "allOf", "anyOf", "oneOf", "not", "if", "patternProperties", "dependentRequired"),
    *("dependentSchemas", "minProperties"),
)
_OF_TEXTS = ("pattern", "format", "allOf", "not", "if")
_NOTES = frozenset({"type", "title", "description", "default", "examples", "deprecated"})
_DEFINITIONS = ("$defs", "definitions")
_REFERENCE = re.compile(r'"\$ref": "(?!#/(?:\$defs|definitions)/)')
_MAX_REFERENCES = 8


def xml_call(index: int, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    """The rules of a call: its parameters in the schema's order.

    Args:
        index: Of the tool; ``call`` with it is the rule of the call, and ``value`` with it and the
            parameter's number that of a value.
        name: Of the tool.
        schema: Of its arguments.

    Raises:
        UnenforceableError: The grammar cannot keep to the schema.
    """
    for key in _OF_OBJECTS:
        if key in schema:
            raise UnenforceableError(name, f".{key}", say("UNENFORCEABLE_IN_XML"))
    required, properties = schema.get("required", []), schema.get("properties", {})
    if not isinstance(properties, dict):
        raise UnenforceableError(
            name, ".properties", say("UNENFORCEABLE_SCHEMA", expected="an object")
        )
    if not isinstance(required, list) or not all(
        isinstance(key, str) and key in properties for key in required
    ):
        raise UnenforceableError(
            name, ".required", say("UNENFORCEABLE_SCHEMA", expected="a list of properties")
        )
    parts: list[str] = []
    for number, (key, value) in enumerate(properties.items()):
        path, rule = f".properties.{key}", f"value{index}_{number}"
        if not isinstance(value, dict) or re.search(r"[<>\n]", key) or not key:
            raise UnenforceableError(name, path, say("UNENFORCEABLE_IN_XML"))
        yield from _Value(name, path, schema).rules(rule, value)
        part = f"{json.dumps(f'<parameter={key}>{chr(10)}')} {rule}"
        parts.append(part if key in required else f"({part})?")
    head = json.dumps(f"<function={name}>\n")
    yield f"call{index}: {' '.join([head, *parts])} {json.dumps('</function>')}"


class _Value:
    """A parameter's value, with what identifies it in an error."""

    def __init__(self, tool: str, path: str, root: Mapping[str, Any]) -> None:
        self._tool = tool
        self._path = path
        self._root = root

    def rules(self, rule: str, schema: Mapping[str, Any]) -> Iterator[str]:
        """The value and its end tag."""
        at = self._followed(schema)
        kinds = kinds_of(at, self._root)
        if "const" in at or isinstance(at.get("enum"), list):
            texts = [_as_text(one) for one in at.get("enum", [at.get("const")])]
            yield f"{rule}: " + " | ".join(json.dumps(f"{text}{_END}") for text in texts)
        elif "string" in kinds:
            yield f"{rule}[suffix={json.dumps(_END)}]: {self._text(at)}"
        else:
            definitions = {key: self._root[key] for key in _DEFINITIONS if key in self._root}
            whole = {**definitions, **schema}
            if _REFERENCE.search(json.dumps(whole)):
                raise self._error("", say("UNENFORCEABLE_SCHEMA", expected="a reference to $defs"))
            yield f"{rule}: {rule}_json {json.dumps(_END)}"
            yield f"{rule}_json: {json_rule(whole)}"

    def _followed(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        for _ in range(_MAX_REFERENCES):
            if "$ref" not in schema:
                return schema
            found = resolved(schema["$ref"], self._root)
            if not isinstance(found, dict):
                break
            schema = found
        raise self._error(".$ref", say("UNENFORCEABLE_SCHEMA", expected="a reference within it"))

    def _text(self, schema: Mapping[str, Any]) -> str:
        """Any text, of the length that it may have."""
        for key in _OF_TEXTS:
            if key in schema:
                raise self._error(f".{key}", say("UNENFORCEABLE_IN_XML"))
        for several in ("anyOf", "oneOf"):
            members = schema.get(several, [])
            if not isinstance(members, list) or not all(isinstance(m, dict) for m in members):
                raise self._error(
                    f".{several}", say("UNENFORCEABLE_SCHEMA", expected="a list of schemas")
                )
            for number, member in enumerate(members):
                if "string" in kinds_of(member, self._root) and set(member) - _NOTES:
                    raise self._error(f".{several}[{number}]", say("UNENFORCEABLE_IN_XML"))
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if not least and most is None:
            return "/(.|\\n)*/"
        if type(least) is not int or type(most) not in (int, type(None)):
            raise self._error("", say("UNENFORCEABLE_SCHEMA", expected="bounded by integers"))
        return f"/(.|\\n){{{least},{'' if most is None else most}}}/"

    def _error(self, path: str, text: Text) -> UnenforceableError:
        return UnenforceableError(self._tool, self._path + path, text)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
