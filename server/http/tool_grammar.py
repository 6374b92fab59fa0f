"""Grammars, in llguidance's Lark dialect, for answers that are tool calls."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from turret.server.basics.codes import CHANNEL, FUNCTIONS, MARKS, MESSAGE
from turret.server.constraints.grammar import MAX_CONSTRAINT_CHARS, any_of, is_lark
from turret.server.http.fields import closed
from turret.server.http.tool_calls import (
    ARGUMENTS,
    CALL_ID,
    FORMS,
    MAX_ALTERNATIVES,
    Form,
    UnenforceableError,
    allowed_values,
    json_rule,
    kinds_of,
    resolved,
)
from turret.server.words import Text, say

_SLASH = re.compile(r"(?s)(\\.)|(/)|(\n)")


def constrained(kind: str, value: Any) -> str | None:
    """The right side of a rule for answers that match a constraint.

    None if the constraint cannot be combined with other rules.

    Args:
        kind: ``json_schema``, ``json_object``, ``regex``, ``grammar`` or ``choice``.
        value: For these kinds: a schema, true, a regular expression, a grammar, or a list of texts.
    """
    if kind == "json_schema":
        return json_rule(value)
    if kind == "json_object":
        return json_rule({"type": "object"})
    if kind == "regex":
        return f"/{_SLASH.sub(_escaped, value)}/"
    if kind == "choice":
        return f"/{any_of(value)}/".replace("\n", "\\n")
    return f"%lark {{\n{value}\n}}" if is_lark(value) else None


def _escaped(found: re.Match[str]) -> str:
    return found[1] or ("\\/" if found[2] else "\\n")


_END = "\n</parameter>\n"
# Unsupported keywords of a schema: for objects, those that relate several parameters; for texts,
# those that constrain anything but the length.
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
        index: The number of the tool. The rule of the call is named ``call`` with this number; the
            rule of a value is named ``value`` with this number and the parameter's number.
        name: The name of the tool.
        schema: The schema of its arguments.

    Raises:
        UnenforceableError: A grammar cannot enforce the schema.
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
    """A parameter's value, and the names that identify it in errors."""

    def __init__(self, tool: str, path: str, root: Mapping[str, Any]) -> None:
        self._tool = tool
        self._path = path
        self._root = root

    def rules(self, rule: str, schema: Mapping[str, Any]) -> Iterator[str]:
        """The rules of the value and its end tag."""
        at = self._followed(schema)
        kinds = kinds_of(at, self._root)
        if (values := allowed_values(at)) is not None:
            texts = [_as_text(one) for one in values]
            yield f"{rule}: " + " | ".join(json.dumps(f"{text}{_END}") for text in texts)
        elif "string" in kinds:
            yield f"{rule}[suffix={json.dumps(_END)}]: {self._text(at)}"
        else:
            definitions = {key: self._root[key] for key in _DEFINITIONS if key in self._root}
            whole = {**definitions, **schema}
            if _REFERENCE.search(json.dumps(whole)):
                expected = "a schema whose references are all to $defs"
                raise self._error("", say("UNENFORCEABLE_SCHEMA", expected=expected))
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
        expected = "a reference to a schema in these parameters"
        raise self._error(".$ref", say("UNENFORCEABLE_SCHEMA", expected=expected))

    def _text(self, schema: Mapping[str, Any]) -> str:
        """The rule of any text of an allowed length."""
        for key in _OF_TEXTS:
            if key in schema:
                raise self._error(f".{key}", say("UNENFORCEABLE_IN_XML"))
        for several in ("anyOf", "oneOf"):
            members = schema.get(several, [])
            if not isinstance(members, list) or not all(isinstance(m, dict) for m in members):
                raise self._error(
                    f".{several}", say("UNENFORCEABLE_SCHEMA", expected="a list of schemas")
                )
            if len(members) > MAX_ALTERNATIVES:
                raise self._error(f".{several}", say("UNENFORCEABLE_IN_XML"))
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


_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}

Schema = Mapping[str, Any]


class CallsGrammar:
    """Makes grammars of answers that are tool calls, alone or beside other answers.

    Args:
        form: How the model writes calls: a key of ``FORMS``.
        tools: The tools that may be called, with the JSON schemas of their arguments.
        is_parallel: Whether several calls are allowed.
        marks: The ids of special tokens around calls, by their texts.
        has_call_ids: Whether the model writes an id for each call.
    """

    def __init__(
        self,
        form: str,
        tools: Mapping[str, Schema],
        *,
        is_parallel: bool,
        marks: Mapping[str, int] | None = None,
        has_call_ids: bool = False,
    ) -> None:
        self._form = FORMS[form]
        self._tools = tools
        self._is_parallel = is_parallel
        self._marks = marks or {}
        self._has_call_ids = has_call_ids

    @property
    def is_object(self) -> bool:
        """Whether a call begins like any JSON object, with no mark before it."""
        return self._form.is_bare and not self._form.is_list

    def alone(self) -> str:
        """A grammar for calls and nothing else.

        Raises:
            UnenforceableError: A grammar cannot enforce a tool's parameters in this form.
        """
        return _joined("start: calls", self._rules())

    def beside(self, answer: str) -> str:
        """A grammar for answers that are calls, or that match a rule.

        Args:
            answer: The right side of the answer's rule. Its first token must differ from a call's.

        Raises:
            UnenforceableError: See ``alone``.
        """
        rules = itertools.chain(self._rules(), [f"answer: {answer}"])
        return _joined("start: calls | answer", rules)

    def schema_beside(self, answer: Schema) -> dict[str, Any]:
        """The schema of one call, or of an answer in JSON, for forms whose calls are plain JSON."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    # The id makes the references in a schema relative to that schema.
                    self._form.parameters: {"$id": f"urn:turret:arguments{index}", **schema},
                },
                "required": ["name", self._form.parameters],
                "additionalProperties": False,
            }
            for index, (name, schema) in enumerate(self._schemas())
        ]
        return {"anyOf": [{"$id": "urn:turret:answer", **answer}, *calls]}

    def places(self) -> dict[str, tuple[str, str]]:
        """The origin of each rule made from a schema: the tool, and the path in its schema."""
        found: dict[str, tuple[str, str]] = {}
        for index, (name, schema) in enumerate(self._schemas()):
            if self._form.syntax != "xml":
                found[f"arguments{index}"] = name, ""
                continue
            properties = schema.get("properties")
            for number, key in enumerate(properties if isinstance(properties, dict) else ()):
                found[f"value{index}_{number}_json"] = name, f".properties.{key}"
        return found

    def _schemas(self) -> Iterator[tuple[str, Schema]]:
        for name, parameters in self._tools.items():
            yield name, closed(parameters) or _NO_ARGUMENTS

    def _rules(self) -> Iterator[str]:
        for index, (name, schema) in enumerate(self._schemas()):
            if self._form.syntax == "xml":
                yield from xml_call(index, name, schema)
            else:
                yield from self._call(index, name)
                yield f"arguments{index}: {json_rule(schema)}"
        yield "call: " + " | ".join(f"call{index}" for index in range(len(self._tools)))
        yield from _all_calls(self._form, self._mark, self._is_parallel)

    def _call(self, index: int, name: str) -> Iterator[str]:
        if self._form.syntax == "json":
            head = f'{{"name": {json.dumps(name)}, "{self._form.parameters}": '
            yield f'call{index}: {json.dumps(head)} arguments{index} "}}"'
            return
        if self._form.syntax == "channels":
            head = json.dumps(f"commentary to={FUNCTIONS}{name} ")
            kind = f'{self._mark("<|constrain|>")} "json" {self._mark(MESSAGE)}'
            yield f"call{index}: {self._mark(CHANNEL)} {head} {kind} arguments{index}"
            return
        call_id = f"{self._mark(CALL_ID)} /[a-zA-Z0-9]{{9}}/ " if self._has_call_ids else ""
        yield f"call{index}: {json.dumps(name)} {call_id}{self._mark(ARGUMENTS)} arguments{index}"

    def _mark(self, text: str) -> str:
        """A mark, as a special token if the model has one for it."""
        return f"<[{self._marks[text]}]>" if text in self._marks else json.dumps(text)


def _joined(start: str, rules: Iterable[str]) -> str:
    """A grammar of rules.

    Rules beyond the maximum length are left out, because the service rejects the grammar anyway.
    Rules can be hundreds of times as long as the tools, because each parameter in XML repeats all
    definitions of its tool.
    """
    lines, left = [start], MAX_CONSTRAINT_CHARS
    for rule in rules:
        lines.append(rule)
        left -= len(rule)
        if left < 0:
            break
    return "\n".join(lines)


def _all_calls(form: Form, mark: Callable[[str], str], is_parallel: bool) -> Iterator[str]:
    """The rule ``calls``, for one or several ``call``."""
    if form.end:
        yield f'wrapped: {mark(form.begin)} "\\n" call "\\n" {mark(form.end)}'
        yield "calls: " + ('wrapped ("\\n" wrapped)*' if is_parallel else "wrapped")
    elif form.is_list:
        more = ' (", " call)*' if is_parallel else ""
        yield f'calls: {mark(form.begin)} "[" call{more} "]"'
    elif form.syntax == "channels":
        # When every mark is a special token, the free text of a thought cannot contain one.
        if all(mark(text).startswith("<") for text in MARKS):
            yield f'thought: {mark(CHANNEL)} "analysis" {mark(MESSAGE)} /(?s:.*)/ {mark("<|end|>")}'
            yield f'calls: (thought {mark("<|start|>")} "assistant")? call'
        else:
            yield "calls: call"
    elif form.syntax == "named":
        yield f"wrapped: {mark(form.begin)} call"
        yield "calls: " + ("wrapped+" if is_parallel else "wrapped")
    else:
        yield "calls: " + ('call ("; " call)*' if is_parallel else "call")
