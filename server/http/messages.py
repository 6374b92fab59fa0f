"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pydantic_core import from_json

from turret.server.http.answers import Ended, adapters_of, stop_reason, usage_of
from turret.server.http.asked import (
    ToolUse,
    asked_of,
    read_request,
    set_rendering,
    set_text_format,
    tools_of,
)
from turret.server.http.choices import Dialect, Event, Item, Kind, answer_in_items
from turret.server.http.endpoint import Exchange, Json
from turret.server.http.refusals import Refusal
from turret.server.http.request_models import CountRequest, MessagesRequest
from turret.server.http.tool_calls import CallBegun, Said, Thought
from turret.v1 import inference_pb2


def _chat_of(body: CountRequest, names: dict[str, str]) -> inference_pb2.Chat:
    """The conversation. Adds to ``names`` the part of the request from which each turn comes."""
    chat = inference_pb2.Chat()
    set_rendering(body, chat)

    def add(path: str, role: str, content: str = "", call_id: str = "") -> None:
        names[f"chat.messages[{len(chat.messages)}]"] = path
        chat.messages.add(role=role, content=content, tool_call_id=call_id)

    if body.system is not None:
        add("system", "system", body.system)
    for index, turn in enumerate(body.messages):
        path = f"messages[{index}]"
        # The texts and calls of a turn form one message, and each result forms another. Texts are
        # collected and then joined, because each assignment to a protobuf field copies the text.
        is_open, texts = False, list[str]()
        for place, block in enumerate(turn.content):
            at = f"{path}.content[{place}]"
            if block.type == "tool_result":
                if is_open:
                    chat.messages[-1].content = "".join(texts)
                names[f"chat.messages[{len(chat.messages)}].tool_call_id"] = f"{at}.tool_use_id"
                add(at, "tool", block.content, block.tool_use_id)
                is_open = False
            elif block.type in ("text", "tool_use"):
                if not is_open:
                    add(path, turn.role)
                    is_open, texts = True, []
                texts.append(block.text or "")
                if block.type == "tool_use":
                    calls = chat.messages[-1].tool_calls
                    called = f"chat.messages[{len(chat.messages) - 1}].tool_calls"
                    names |= {called: f"{path}.content", f"{called}[{len(calls)}]": at}
                    arguments = json.dumps(block.input, ensure_ascii=False)
                    calls.add(id=block.id, name=block.name, arguments=arguments)
        if is_open:
            chat.messages[-1].content = "".join(texts)
    # If the last turn is the assistant's and ends with a text, the answer continues this text.
    last_turn = body.messages[-1]
    if last_turn.role == "assistant" and last_turn.content and last_turn.content[-1].text:
        chat.continue_final_message = True
    return chat


# The answer.

# The kind of an item → its block without content, the field for the content, and the type and the
# field of a delta.
_BLOCKS: dict[Kind, tuple[dict[str, Any], str, str, str]] = {
    Said: ({"type": "text", "text": ""}, "text", "text_delta", "text"),
    Thought: (
        {"type": "thinking", "thinking": "", "signature": ""},
        *("thinking", "thinking_delta", "thinking"),
    ),
    CallBegun: ({"type": "tool_use", "input": {}}, "input", "input_json_delta", "partial_json"),
}


class _Message(Dialect):
    """The message that answers, and its events."""

    is_never_empty = False
    has_done = False

    def __init__(self, exchange: Exchange, model: str) -> None:
        self._call = exchange.call
        self._content: list[dict[str, Any]] = []
        self.whole = {
            "id": f"msg_{exchange.call.request_id}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def start(self) -> list[Event]:
        begun = self.whole | {"usage": _usage(self._call.prompt_tokens, 0, 0)}
        return [("message_start", {"message": begun}), ("ping", {})]

    def begin(self, item: Item) -> list[Event]:
        return [("content_block_start", {"index": item.index, "content_block": _block(item)})]

    def grow(self, item: Item, text: str, logprobs: object) -> Event:
        _, _, kind, field = _BLOCKS[item.kind]
        return "content_block_delta", {"index": item.index, "delta": {"type": kind, field: text}}

    def end(self, item: Item, is_cut: bool) -> list[Event]:
        content = item.text if item.call is None else _arguments(item.text)
        self._content.append(_block(item) | {_BLOCKS[item.kind][1]: content})
        return [("content_block_stop", {"index": item.index})]

    def finish(self, answer: Ended, is_cut: bool) -> list[Event]:
        stop = stop_reason(answer)
        if is_cut:
            reason = "max_tokens"
        elif any(block["type"] == "tool_use" for block in self._content):
            reason = "tool_use"
        else:
            reason = "stop_sequence" if isinstance(stop, str) else "end_turn"
        used = usage_of([answer], 1)
        cached = used["prompt_tokens_details"]["cached_tokens"]
        usage = _usage(used["prompt_tokens"] - cached, cached, used["completion_tokens"])
        ended = {
            "stop_reason": reason,
            "stop_sequence": stop if reason == "stop_sequence" else None,
        }
        more = {"usage": usage, "adapters_used": adapters_of([answer])}
        self.whole |= {"content": self._content, **ended, **more}
        return [("message_delta", {"delta": ended, **more}), ("message_stop", {})]


def _block(item: Item) -> dict[str, Any]:
    """The block of an item, without its content."""
    block = _BLOCKS[item.kind][0]
    if item.call is None:
        return block
    return block | {"id": item.call.call_id, "name": item.call.name}


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call, or the part of them before it was cut."""
    try:
        found = from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _usage(fresh: int, cached: int, completion: int) -> dict[str, Any]:
    return {
        "input_tokens": fresh,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
    }


_ERRORS = {
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    501: "api_error",
    503: "overloaded_error",
}


def anthropic_refusal(refusal: Refusal, request_id: str) -> Refusal:
    """A refusal in the form of Anthropic's API, with turret's additional fields."""
    error = refusal.body["error"]
    kind = _ERRORS.get(refusal.status, error["type"])
    body = {"type": "error", "error": {**error, "type": kind}, "request_id": request_id}
    return dataclasses.replace(refusal, body=body, event="error")


async def answer_messages(exchange: Exchange) -> None:
    """Answer a conversation (Anthropic's Messages API)."""
    _, body, mix = read_request(exchange, MessagesRequest)
    asked = asked_of(body, mix, exchange.names)
    asked.message.stop.stop_strings.extend(body.stop_sequences)
    set_text_format(body.output_config.format, asked.message, exchange.names, "output_config")
    prompt = inference_pb2.GenerateRequest(chat=_chat_of(body, exchange.names))
    use = _tools_of(body, prompt.chat)
    del body
    await answer_in_items(exchange, asked, prompt, use, _Message(exchange, asked.model))


async def count_tokens(exchange: Exchange) -> Json:
    """Count the tokens of a conversation (Anthropic's Messages API)."""
    _, body, mix = read_request(exchange, CountRequest)
    chat = _chat_of(body, exchange.names)
    _tools_of(body, chat)
    question = inference_pb2.TokenizeRequest(adapters=mix, chat=chat)
    answer = await exchange.services.inference.tokenize(question, exchange.call)
    return {"input_tokens": len(answer.token_ids)}


def _tools_of(body: CountRequest, chat: inference_pb2.Chat) -> ToolUse:
    is_single = body.tool_choice.disable_parallel_tool_use
    is_parallel = None if is_single is None else not is_single
    return tools_of(body.tools, body.tool_choice.choice, is_parallel, chat, "input_schema")
