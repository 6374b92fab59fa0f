"""The conversation of a request, to a Chat."""

from __future__ import annotations

from typing import Any

from turret.server.http.bodies.fields import Fields, why_no_text
from turret.v1 import inference_pb2

# OpenAI's newer name for the role that chat templates call ``system``.
_ROLES = {"developer": "system"}


def read_messages(fields: Fields) -> inference_pb2.Chat:
    """Read the conversation; errors are noted."""
    chat = inference_pb2.Chat()
    turns = fields.array("messages")
    if turns is None and fields.get("messages") is None:
        is_prompt = not fields.is_null("prompt")
        hint = "; what continues a prompt is /v1/completions" if is_prompt else ""
        fields.refuse("messages", f"must be set{hint}")
    for index, turn in enumerate(turns or []):
        path = f"messages[{index}]"
        if not isinstance(turn, dict):
            fields.refuse(path, "must be an object with role and content")
            continue
        entry = fields.nested(path, turn)
        role = entry.text("role")
        if entry.get("role") is None:
            entry.refuse("role", "must be set")
        if role == "function" or entry.get("function_call"):
            entry.refuse("role", "send tool and tool_calls")
        # Answers made only of calls or reasoning have no content, and clients return them as such.
        if entry.get("content") is None and role != "assistant":
            entry.refuse("content", "must be set")
        said = chat.messages.add(role=_ROLES.get(role or "", role or ""), content=_content(entry))
        said.tool_call_id = entry.text("tool_call_id") or ""
        for number, call in enumerate(entry.array("tool_calls") or []):
            _read_call(entry, number, call, said)
    return chat


def _content(entry: Fields) -> str:
    """A turn's text: a string, or parts of type ``text``."""
    content = entry.get("content")
    if content is None:
        return ""
    if not isinstance(content, list):
        return entry.text("content") or ""
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            entry.refuse(f"content[{index}]", "must be of type text: the model reads nothing else")
            return ""
        why = why_no_text(part.get("text"))
        if why is not None:
            entry.refuse(f"content[{index}].text", why)
            return ""
        texts.append(part["text"])
    return "".join(texts)


def _read_call(entry: Fields, number: int, value: Any, turn: inference_pb2.ChatMessage) -> None:
    path = f"tool_calls[{number}]"
    if not isinstance(value, dict) or not isinstance(value.get("function"), dict):
        entry.refuse(path, "must be an object with id, type and function")
        return
    call = entry.nested(path, value)
    function = call.inner("function")
    turn.tool_calls.add(
        id=call.text("id") or "",
        name=function.text("name") or "",
        arguments=function.text("arguments") or "",
    )
