"""The turns of a conversation, and the tools that it may call, from plain Python values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from turret.clients.messages.fields import (
    ArgumentTypeError,
    ArgumentValueError,
    as_json,
    check_text,
    fill,
    given,
    not_of_type,
    several,
)
from turret.clients.words import say
from turret.v1 import inference_pb2

# {"role": "user", "content": "hi"}, ("user", "hi"), or the message itself. A mapping has the
# format of OpenAI's messages and may contain tool_calls and tool_call_id.
MessageLike = Mapping[str, Any] | tuple[str, str] | inference_pb2.ChatMessage

_TURN_FIELDS = ("content", "tool_calls", "tool_call_id")
# Keys that answers in OpenAI's format may contain, but chat templates do not read.
_IGNORED = ("name", "reasoning_content")


def chat_messages(chat: str | Iterable[MessageLike]) -> list[inference_pb2.ChatMessage]:
    """Convert a conversation; a plain text is the user's only turn.

    Raises:
        TypeError: A turn has none of the accepted forms.
        ValueError: The conversation is empty.
    """
    if isinstance(chat, str):
        check_text("messages", chat)
        return [inference_pb2.ChatMessage(role="user", content=chat)]
    check_is_no_turn("messages", chat)
    wanted = "a string or a list of messages"
    turns = to_messages("messages", several("messages", chat, wanted))
    if not turns:
        # Without this, an empty list would be sent as token ids, which the caller did not mention.
        raise ArgumentValueError("messages", say("EMPTY"))
    return turns


def to_messages(name: str, turns: Iterable[Any]) -> list[inference_pb2.ChatMessage]:
    """Convert turns.

    Args:
        name: The name of the list in errors.
        turns: The turns, in any of the accepted forms.

    Raises:
        TypeError: A turn has none of the accepted forms.
        ValueError: A text is not UTF-8.
    """
    return [_to_message(f"{name}[{index}]", turn) for index, turn in enumerate(turns)]


def is_like_a_turn(value: object) -> bool:
    """Whether a value has the type of a turn, regardless of its content."""
    return isinstance(value, Mapping | tuple | list | inference_pb2.ChatMessage)


def check_is_no_turn(name: str, value: object) -> None:
    """Reject a single turn in place of a list of turns; ``name`` is the name of the list in errors.

    Raises:
        TypeError: The value is a single turn.
    """
    is_pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str)
    if is_pair or isinstance(value, Mapping | inference_pb2.ChatMessage):
        raise ArgumentTypeError(name, say("SINGLE_MESSAGE"))


def _to_message(place: str, turn: object) -> inference_pb2.ChatMessage:
    match turn:
        case inference_pb2.ChatMessage():
            return turn
        case {"role": role, **rest} if rest.keys() & {"content", "tool_calls"}:
            return _of_mapping(place, role, rest)
        case (str() as role, str() as content):
            return _said(place, role, content)
    raise not_of_type(place, "a message with role and content", turn)


def _of_mapping(place: str, role: Any, rest: Mapping[str, Any]) -> inference_pb2.ChatMessage:
    # Libraries fill unused fields with None or an empty list of annotations.
    values = {key: value for key, value in rest.items() if value is not None and value != []}
    unknown = values.keys() - {*_TURN_FIELDS, *_IGNORED}
    if unknown:
        known = ", ".join(("role", *_TURN_FIELDS))
        key = min(map(str, unknown))
        raise ArgumentTypeError(place, say("UNKNOWN_MESSAGE_KEY", value=key, choices=known))
    # Answers that consist only of calls or reasoning have no content, and callers pass them back
    # like that.
    content = rest.get("content")
    content = "" if content is None and role == "assistant" else content
    made = _said(place, role, _content(f"{place}.content", content))
    fill(made, given(tool_call_id=values.get("tool_call_id")), within=f"{place}.")
    calls = several(f"{place}.tool_calls", values.get("tool_calls", ()), "a list of tool calls")
    made.tool_calls.extend(
        _to_call(f"{place}.tool_calls[{index}]", call) for index, call in enumerate(calls)
    )
    return made


def _said(place: str, role: Any, content: Any) -> inference_pb2.ChatMessage:
    turn = inference_pb2.ChatMessage()
    fill(turn, {"role": role, "content": content}, within=f"{place}.")
    return turn


def _content(place: str, content: Any) -> Any:
    """A turn's text; parts of type ``text`` are joined."""
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for index, part in enumerate(content):
        match part:
            case {"type": "text", "text": str() as text}:
                texts.append(text)
            case _:
                wanted = '{"type": "text", "text": ...}'
                raise not_of_type(f"{place}[{index}]", wanted, part)
    return "".join(texts)


def _to_call(place: str, call: object) -> inference_pb2.ToolCall:
    match call:
        case inference_pb2.ToolCall():
            return call
        case {"function": {"name": name, "arguments": arguments}, **rest}:
            made = inference_pb2.ToolCall()
            fill(made, {"name": name, "arguments": arguments}, within=f"{place}.function.")
            fill(made, given(id=rest.get("id")), within=f"{place}.")
            return made
    raise not_of_type(place, "a call with a function, its name and its arguments", call)


def to_tool(place: str, tool: object) -> inference_pb2.Tool:
    """Convert a tool; ``place`` is its name in errors.

    Raises:
        TypeError: The value does not have the accepted form.
        ValueError: A text is not UTF-8.
    """
    match tool:
        case inference_pb2.Tool():
            return tool
        case {"function": {"name": name, **function}}:
            made, within = inference_pb2.Tool(), f"{place}.function."
            parameters = function.get("parameters")
            schema = as_json(f"{within}parameters", parameters) if parameters else None
            optional = given(description=function.get("description"), parameters=schema)
            fill(made, {"name": name, **optional}, within=within)
            return made
    raise not_of_type(place, "a tool with a function and its name", tool)
