"""The tools of a request: which there are, and whether the model must call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turret.server.api.limits import MAX_CONSTRAINT_CHARS
from turret.server.http.bodies.fields import Fields, is_longer, json_text
from turret.v1 import inference_pb2

_CHOICES = "must be none, auto, required, a function or allowed_tools"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How tools may appear in the answer.

    Attributes:
        tools: Those that may be called, by name, with their arguments' JSON schemas (empty: no
            arguments); none if tools are not to be called.
        must_call: Whether the answer has to be calls.
        is_parallel: Whether there may be several.
        paths: Of each tool, where the schema of its arguments lies in the request.
    """

    tools: Mapping[str, Mapping[str, Any]]
    must_call: bool
    is_parallel: bool
    paths: Mapping[str, str]


def read_tools(fields: Fields, chat: inference_pb2.Chat, *, is_flat: bool = False) -> ToolUse:
    """Read ``tools`` and ``tool_choice``, and pass the tools to the template; errors are noted.

    Args:
        fields: The request.
        chat: Its conversation, which takes in the tools.
        is_flat: Whether a function's fields lie in the tool itself, as in the Responses API, or in
            an object ``function`` within it.
    """
    parameters: dict[str, dict[str, Any]] = {}
    paths: dict[str, str] = {}
    for index, value in enumerate(fields.array("tools") or []):
        path = f"tools[{index}]"
        if not isinstance(value, dict) or value.get("type") != "function":
            fields.refuse(path, "must be of type function: this server has no tools of its own")
            continue
        tool = fields.nested(path, value)
        name = _read_tool(tool if is_flat else tool.inner("function"), chat, parameters)
        paths[name] = f"{path}.parameters" if is_flat else f"{path}.function.parameters"
    is_parallel = fields.flag("parallel_tool_calls", default=True)
    names, must_call = _read_choice(fields, tuple(parameters), is_flat)
    if not must_call:
        # Hide tools that the model may not call. Required calls are enforced by the grammar.
        may_call = set(names)
        told = [tool for tool in chat.tools if tool.name in may_call]
        del chat.tools[:]
        chat.tools.extend(told)
    tools = {name: parameters[name] for name in names}
    return ToolUse(tools, must_call, is_parallel, paths)


def _read_tool(
    function: Fields, chat: inference_pb2.Chat, parameters: dict[str, dict[str, Any]]
) -> str:
    """Take in one tool; returns its name."""
    name = function.text("name")
    if name is None:
        if function.is_null("name"):
            function.refuse("name", "must be set")
        return ""
    schema = function.object("parameters") or {}
    if is_longer(schema, MAX_CONSTRAINT_CHARS):
        function.refuse("parameters", f"at most {MAX_CONSTRAINT_CHARS} characters")
        return name
    text, why = json_text(schema) if schema else ("", None)
    if why is not None:
        function.refuse("parameters", why)
        return name
    parameters[name] = schema
    description = function.text("description") or ""
    chat.tools.add(name=name, description=description, parameters=text)
    return name


def _read_choice(
    fields: Fields, names: tuple[str, ...], is_flat: bool
) -> tuple[tuple[str, ...], bool]:
    """The tools that may be called, and whether the answer has to be calls."""
    choice = fields.get("tool_choice")
    if choice == "none":
        return (), False
    if choice in (None, "auto"):
        return names, False
    if choice == "required":
        if not names:
            fields.refuse("tool_choice", "needs tools")
        return names, True
    if not isinstance(choice, dict):
        fields.refuse("tool_choice", _CHOICES)
        return (), False
    if choice.get("type") == "allowed_tools":
        allowed = fields.inner("tool_choice")
        return _read_allowed(allowed if is_flat else allowed.inner("allowed_tools"), names, is_flat)
    name = _function_name(choice, is_flat)
    if choice.get("type") != "function" or name is None:
        fields.refuse("tool_choice", _CHOICES)
        return (), False
    if name not in names:
        fields.refuse("tool_choice", "must name one of tools")
        return (), False
    return (name,), True


def _read_allowed(
    allowed: Fields, names: tuple[str, ...], is_flat: bool
) -> tuple[tuple[str, ...], bool]:
    mode = allowed.text("mode")
    if mode not in ("auto", "required"):
        allowed.refuse("mode", "must be auto or required")
    found = [
        _function_name(one, is_flat) if isinstance(one, dict) else None
        for one in allowed.array("tools") or []
    ]
    if not found or not set(found) <= set(names):
        allowed.refuse("tools", "must name some of tools")
    allowed_names = set(found)
    return tuple(name for name in names if name in allowed_names), mode == "required"


def _function_name(value: Mapping[str, Any], is_flat: bool) -> str | None:
    function = value if is_flat else value.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
