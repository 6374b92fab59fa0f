"""What a request says of tools: which there are, and whether they must be called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from turret.server.http.bodies.fields import Fields, why_no_text
from turret.server.http.tools.calls import FORMS, Form
from turret.v1 import inference_pb2

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
# As between the tokens of any constrained JSON.
_BLANKS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What may come of tools in the answer.

    Attributes:
        names: Of those that may be called; none if tools are not to be called.
        must_call: Whether the answer has to be calls.
        is_parallel: Whether there may be several.
        parameters: Of each tool, its arguments' JSON schema.
    """

    names: tuple[str, ...]
    must_call: bool
    is_parallel: bool
    parameters: dict[str, dict[str, Any]]

    def grammar(self, form: str) -> str:
        """The grammar, in Lark, of an answer that is nothing but calls."""
        return _grammar(FORMS[form], self)


def read_tools(fields: Fields, chat: inference_pb2.Chat) -> ToolUse:
    """Read ``tools`` and ``tool_choice``, and tell the template of the tools; faults are noted."""
    parameters: dict[str, dict[str, Any]] = {}
    for index, value in enumerate(fields.array("tools") or []):
        path = f"tools[{index}]"
        if not isinstance(value, dict) or value.get("type") != "function":
            fields.refuse(path, "must be an object of type function")
            continue
        function = fields.nested(path, value).inner("function")
        name = function.text("name")
        if name is None:
            function.refuse("name", "must be set")
            continue
        schema = function.object("parameters") or {}
        text = json.dumps(schema, ensure_ascii=False) if schema else ""
        why = why_no_text(text)
        if why is not None:
            function.refuse("parameters", why)
            continue
        parameters[name] = schema
        chat.tools.add(
            name=name,
            description=function.text("description") or "",
            parameters=text,
        )
    is_parallel = fields.flag("parallel_tool_calls", default=True)
    names, must_call = _read_choice(fields, tuple(parameters))
    if not names:
        # The model is not told of what it may not call.
        del chat.tools[:]
    return ToolUse(names, must_call, is_parallel, parameters)


def _read_choice(fields: Fields, names: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    choice = fields.get("tool_choice")
    if choice == "none":
        return (), False
    if choice in (None, "auto"):
        return names, False
    if choice == "required":
        if not names:
            fields.refuse("tool_choice", "needs tools")
        return names, True
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or choice.get("type") != "function":
        fields.refuse("tool_choice", "must be none, auto, required or a function")
        return (), False
    if function.get("name") not in names:
        fields.refuse("tool_choice", "must name one of tools")
        return (), False
    return (function["name"],), True


def _grammar(form: Form, use: ToolUse) -> str:
    lines: list[str] = []
    for index, name in enumerate(use.names):
        schema = {**(use.parameters[name] or _NO_ARGUMENTS), "x-guidance": _BLANKS}
        head = f'{{"name": {json.dumps(name)}, "{form.parameters}": '
        lines.append(f'call{index}: {json.dumps(head)} arguments{index} "}}"')
        lines.append(f"arguments{index}: %json {json.dumps(schema)}")
    calls = " | ".join(f"call{index}" for index in range(len(use.names)))
    lines.append(f"call: {calls}")
    begin, end = json.dumps(f"{form.begin}\n"), json.dumps(f"\n{form.end}")
    if form.end:
        lines.append(f"wrapped: {begin} call {end}")
        start = 'wrapped ("\\n" wrapped)*' if use.is_parallel else "wrapped"
    elif form.is_list:
        more = ' (", " call)*' if use.is_parallel else ""
        start = f'{json.dumps(form.begin)} "[" call{more} "]"'
    else:
        start = 'call ("; " call)*' if use.is_parallel else "call"
    return "\n".join([f"start: {start}", *lines])
