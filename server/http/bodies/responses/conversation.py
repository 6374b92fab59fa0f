"""The items of ``input``, to the turns of a conversation."""

from __future__ import annotations

from typing import Any

from turret.server.http.bodies.fields import Fields, why_no_text
from turret.server.http.bodies.responses.fields import STATELESS
from turret.v1 import inference_pb2

_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
_TEXTS = ("input_text", "output_text", "text")
_KINDS = "must be message, function_call or function_call_output: there are no other items"


class Conversation:
    """The turns made from the instructions and ``input``; errors are noted.

    A call of a function is part of the assistant's turn before it, if there is one, as an answer
    that says something and then calls is one turn.

    Attributes:
        chat: The turns.
        names: Of a turn in turret.v1, the item that made it.
    """

    def __init__(self, fields: Fields, instructions: str | None) -> None:
        self.chat = inference_pb2.Chat()
        self.names: dict[str, str] = {}
        if instructions is not None:
            self._add("instructions", role="system", content=instructions)
        sent = fields.get("input")
        if sent is None:
            is_chat = not fields.is_null("messages")
            hint = "; what answers messages is /v1/chat/completions" if is_chat else ""
            fields.refuse("input", f"must be set{hint}")
        elif isinstance(sent, str):
            self._add("input", role="user", content=fields.text("input") or "")
        elif not isinstance(sent, list) or not sent:
            fields.refuse("input", "must be a string or a list of items, at least one")
        else:
            for index, item in enumerate(sent):
                path = f"input[{index}]"
                if isinstance(item, dict):
                    self._read(fields.nested(path, item), path)
                else:
                    fields.refuse(path, "must be an object")

    def _read(self, item: Fields, path: str) -> None:
        kind = item.get("type")
        if kind in (None, "message"):
            role = item.text("role")
            if role in _ROLES:
                self._add(path, role=_ROLES[role], content=_text_of(item, "content"))
            elif role is not None or item.is_null("role"):
                item.refuse("role", f"must be one of {', '.join(_ROLES)}")
        elif kind == "function_call":
            self._read_call(item, path)
        elif kind == "function_call_output":
            self._add(
                path,
                role="tool",
                content=_text_of(item, "output"),
                tool_call_id=item.text("call_id") or "",
            )
        elif kind == "item_reference":
            item.refuse("type", STATELESS)
        # Skip the reasoning of earlier turns: the model does not see it again.
        elif kind != "reasoning":
            item.refuse("type", _KINDS)

    def _read_call(self, item: Fields, path: str) -> None:
        turns = self.chat.messages
        if not turns or turns[-1].role != "assistant":
            self._add(path, role="assistant")
        calls = turns[-1].tool_calls
        calls.add(
            id=item.text("call_id") or "",
            name=item.text("name") or "",
            arguments=item.text("arguments") or "",
        )
        self.names[f"chat.messages[{len(turns) - 1}].tool_calls[{len(calls) - 1}]"] = path

    def _add(self, path: str, **turn: Any) -> None:
        self.names[f"chat.messages[{len(self.chat.messages)}]"] = path
        self.chat.messages.add(**turn)


def _text_of(item: Fields, name: str) -> str:
    """The text of a string or of parts that are text."""
    content = item.get(name)
    if not isinstance(content, list):
        if content is None:
            item.refuse(name, "must be set")
        return item.text(name) or ""
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS:
            item.refuse(f"{name}[{index}]", "must be text: the model reads nothing else")
            return ""
        why = why_no_text(part.get("text"))
        if why is not None:
            item.refuse(f"{name}[{index}].text", why)
            return ""
        texts.append(part["text"])
    return "".join(texts)
