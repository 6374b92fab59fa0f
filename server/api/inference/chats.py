"""Conversations, from proto to the chat template's form: turns, tools and calls of tools."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from turret.server.api.limits import (
    MAX_CHAT_MESSAGES,
    MAX_CHAT_TOOL_CALLS,
    MAX_ROLE_CHARS,
    MAX_TOOL_CALLS,
    MAX_TOOL_NAME_CHARS,
    MAX_TOOLS,
    InputLimits,
)
from turret.server.api.violations import Violations
from turret.server.constraints.spec import MAX_CONSTRAINT_CHARS
from turret.server.errors import PromptTooLongError
from turret.server.models.chat_template import Rendering
from turret.server.words import say
from turret.v1 import inference_pb2

if TYPE_CHECKING:
    from turret.server.models.tokenizer import RenderedChat, Tokenizer

TOOL_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_TOOL_NAME_CHARS}}}")
# Cost of every turn, call and tool, in characters, in addition to its text.
_TURN_CHARS = 32
# Variables of a chat template that fields of their own set.
_FIELDS = ("messages", "tools", "add_generation_prompt")


def check_chat(chat: inference_pb2.Chat, limits: InputLimits, violations: Violations) -> None:
    """Check a conversation as far as possible without tokenising it.

    Raises:
        PromptTooLongError: It cannot be as few tokens as the limit, whatever they are.
    """
    turns = chat.messages
    violations.check(len(turns) > 0, "chat.messages", "EMPTY")
    if not violations.check_count(len(turns), MAX_CHAT_MESSAGES, "chat.messages"):
        return
    # Check the length of every list before reading any of them.
    is_counted = violations.check_count(len(chat.tools), MAX_TOOLS, "chat.tools")
    num_calls = 0
    for index, turn in enumerate(turns):
        path = f"chat.messages[{index}].tool_calls"
        is_counted &= violations.check_count(len(turn.tool_calls), MAX_TOOL_CALLS, path)
        num_calls += len(turn.tool_calls)
    path = "chat.messages.tool_calls"
    is_counted &= violations.check_count(num_calls, MAX_CHAT_TOOL_CALLS, path)
    if not is_counted:
        return
    check_length(_num_chars(chat), limits.max_chars, "characters")
    for index, turn in enumerate(turns):
        path = f"chat.messages[{index}]"
        violations.check(turn.role != "", f"{path}.role", "REQUIRED")
        violations.check_chars(turn.role, MAX_ROLE_CHARS, f"{path}.role")
        violations.check_chars(turn.tool_call_id, MAX_TOOL_NAME_CHARS, f"{path}.tool_call_id")
        for number, call in enumerate(turn.tool_calls):
            _check_call(call, violations, f"{path}.tool_calls[{number}]")
    for index, tool in enumerate(chat.tools):
        _check_tool(tool, violations, f"chat.tools[{index}]")
    _check_rendering(chat, violations)
    names = Counter(tool.name for tool in chat.tools)
    for name, count in names.most_common(1):
        violations.check(count == 1, "chat.tools", "DUPLICATE", value=name)


def _check_rendering(chat: inference_pb2.Chat, violations: Violations) -> None:
    path, text = "chat.chat_template_kwargs", chat.chat_template_kwargs
    violations.check_chars(text, MAX_CONSTRAINT_CHARS, path)
    variables = _json(text)
    violations.check(isinstance(variables, dict), path, "NOT_A_JSON_OBJECT")
    for name in _FIELDS if isinstance(variables, dict) else ():
        violations.check(name not in variables, f"{path}.{name}", "CONFLICTS_WITH", other=name)
    violations.check(
        not (chat.continue_final_message and chat.add_generation_prompt),
        "chat.continue_final_message",
        "CONFLICTS_WITH",
        other="add_generation_prompt",
    )


def _check_call(call: inference_pb2.ToolCall, violations: Violations, path: str) -> None:
    violations.check_chars(call.id, MAX_TOOL_NAME_CHARS, f"{path}.id")
    _check_name(call.name, violations, f"{path}.name")
    _check_object(call.arguments, violations, f"{path}.arguments")


def _check_tool(tool: inference_pb2.Tool, violations: Violations, path: str) -> None:
    _check_name(tool.name, violations, f"{path}.name")
    violations.check_chars(tool.parameters, MAX_CONSTRAINT_CHARS, f"{path}.parameters")
    _check_object(tool.parameters, violations, f"{path}.parameters")


def _check_name(name: str, violations: Violations, path: str) -> None:
    is_name = TOOL_NAME.fullmatch(name) is not None
    violations.check(is_name, path, "NOT_MATCHING", pattern=TOOL_NAME.pattern)


def _check_object(text: str, violations: Violations, path: str) -> None:
    violations.check(isinstance(_json(text), dict), path, "NOT_A_JSON_OBJECT")


def _json(text: str) -> Any:
    """A value; an empty object for an empty text, and None for one that is not JSON."""
    try:
        # Unlike ``json.loads``, this rejects halves of surrogate pairs, which no tokenizer takes.
        return from_json(text, allow_inf_nan=False) if text else {}
    except ValueError:
        return None


def _num_chars(chat: inference_pb2.Chat) -> int:
    said = sum(len(turn.content) for turn in chat.messages)
    called = sum(len(call.arguments) for turn in chat.messages for call in turn.tool_calls)
    told = sum(len(tool.description) + len(tool.parameters) for tool in chat.tools)
    return said + called + told + len(chat.chat_template_kwargs)


def chat_size(chat: inference_pb2.Chat) -> int:
    """The approximate number of characters that the template makes of a conversation."""
    num_calls = sum(len(turn.tool_calls) for turn in chat.messages)
    return _num_chars(chat) + _TURN_CHARS * (len(chat.messages) + num_calls + len(chat.tools))


def check_length(length: int, limit: int, unit: str) -> None:
    """Reject input that is longer than the model can read.

    Raises:
        PromptTooLongError: It is.
    """
    if length > limit:
        said = say("PROMPT_TOO_LONG", length=length, limit=limit, unit=unit)
        raise PromptTooLongError(said, violations=[("input", said)])


def render_chat(chat: inference_pb2.Chat, tokenizer: Tokenizer, is_short: bool) -> RenderedChat:
    """The text of a checked conversation; errors are those of ``Tokenizer.render_chat``."""
    turns = [_turn(message) for message in chat.messages]
    tools = [_tool(tool) for tool in chat.tools]
    return tokenizer.render_chat(
        turns, tools, special=chat.special_tokens, is_short=is_short, how=_rendering(chat)
    )


def _rendering(chat: inference_pb2.Chat) -> Rendering:
    continues = chat.continue_final_message
    has_begin = chat.HasField("add_generation_prompt")
    begins = chat.add_generation_prompt if has_begin else not continues
    return Rendering(_object(chat.chat_template_kwargs), begins, continues)


def _turn(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _object(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _tool(tool: inference_pb2.Tool) -> dict[str, Any]:
    """A tool in the form that templates are written for, which is OpenAI's."""
    parameters = _object(tool.parameters) or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _object(text: str) -> dict[str, Any]:
    return json.loads(text) if text else {}
