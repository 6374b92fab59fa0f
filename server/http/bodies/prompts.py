"""Prompts in OpenAI's form: a string, a list of strings, token ids, or a list of lists of them."""

from __future__ import annotations

from typing import TypeVar

from turret.server.http.bodies.fields import Fields, are_token_ids, why_no_text
from turret.server.http.bodies.messages import read_messages
from turret.server.http.bodies.unsupported import refuse_unsupported
from turret.v1 import inference_pb2

MAX_PROMPTS = 2048
# Field paths of turret.v1 in calls with several inputs, mapped to the names of this API.
NAMES = {"inputs": "input"}
_CHAT_NAMES = {"inputs": "messages", "inputs[0].chat.": ""}

_M = TypeVar("_M", inference_pb2.GenerateRequest, inference_pb2.Input)


def read_prompts(fields: Fields, name: str, kind: type[_M]) -> dict[str, _M]:
    """A message per prompt, by its path in the request; none after an error, which is noted.

    Args:
        fields: The request.
        name: Of the field.
        kind: What is made: a message with the inputs ``prompt`` and ``token_ids``.
    """
    sent = fields.get(name)
    if sent is None:
        is_chat = name == "prompt" and not fields.is_null("messages")
        hint = "; what answers messages is /v1/chat/completions" if is_chat else ""
        fields.refuse(name, f"must be set{hint}")
        return {}
    # A list of integers is one prompt; an empty list contains no prompt.
    is_one = isinstance(sent, str) or (
        isinstance(sent, list) and (not sent or not isinstance(sent[0], str | list))
    )
    values = [sent] if is_one else sent
    if not isinstance(values, list):
        fields.refuse(name, "must be a string, token ids, or a list of either")
        return {}
    if len(values) > MAX_PROMPTS:
        fields.refuse(name, f"at most {MAX_PROMPTS}, not {len(values)}")
        return {}
    read: dict[str, _M] = {}
    for index, value in enumerate(values):
        path = name if is_one else f"{name}[{index}]"
        if isinstance(value, str):
            why = why_no_text(value)
            if why is not None:
                fields.refuse(path, why)
                return {}
            read[path] = kind(prompt=value)
        elif isinstance(value, list) and value and are_token_ids(value):
            read[path] = kind(token_ids=inference_pb2.TokenIds(ids=value))
        else:
            fields.refuse(path, "must be a string or token ids, at least one")
            return {}
    return read


def read_inputs(fields: Fields, names: dict[str, str]) -> list[inference_pb2.Input]:
    """The entries of ``input``, or the one conversation in ``messages``, which is vLLM's form.

    Args:
        fields: The request; what is wrong is noted.
        names: Those of ``NAMES``; changed where the client knows others.
    """
    is_chat = fields.get("messages") is not None
    refuse_unsupported(fields, is_chat=is_chat)
    if not is_chat:
        read = read_prompts(fields, "input", inference_pb2.Input)
        for index, place in enumerate(read):
            names.update({f"inputs[{index}]{within}": place for within in ("", ".token_ids.ids")})
        return list(read.values())
    if fields.get("input") is not None:
        fields.refuse("input", "send either input or messages")
    names.update(_CHAT_NAMES)
    return [inference_pb2.Input(chat=read_messages(fields))]
