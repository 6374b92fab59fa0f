"""POST /v1/responses: one answer to a conversation. The server does not store it."""

from __future__ import annotations

import time
from typing import Any

from turret.server.http.answers import Ended, adapters_of, chat_logprobs, usage_of
from turret.server.http.asked import (
    asked_of,
    read_request,
    set_rendering,
    set_text_format,
    tools_of,
)
from turret.server.http.choices import Dialect, Event, Item, Logprobs, answer_in_items
from turret.server.http.endpoint import Exchange
from turret.server.http.refusals import Refusal
from turret.server.http.request_models import ResponseRequest, TextFormat
from turret.server.http.tool_calls import CallBegun, Said, Thought
from turret.v1 import inference_pb2

LOGPROBS = "message.output_text.logprobs"
# Fields of the request that the answer repeats as they are.
_REPEATED = (
    *("model", "instructions", "max_output_tokens", "metadata", "tool_choice"),
    *("user", "safety_identifier", "prompt_cache_key"),
)


async def respond(exchange: Exchange) -> None:
    """Answer a conversation (Responses API); nothing is stored."""
    _, body, mix = read_request(exchange, ResponseRequest)
    asked = asked_of(body, mix, exchange.names)
    message = asked.message
    if body.max_output_tokens is not None:
        message.stop.max_tokens = body.max_output_tokens
        exchange.names.update(ResponseRequest.names)
    message.options.logprobs = _wants_logprobs(body)
    message.options.top_n = body.top_logprobs or 0
    set_text_format(body.text.format, message, exchange.names, "text")
    prompt = inference_pb2.GenerateRequest(chat=_chat_of(body, exchange.names))
    use = tools_of(body.tools, body.tool_choice, body.parallel_tool_calls, prompt.chat)
    response = _Response(exchange.call.request_id, body)
    del body
    await answer_in_items(exchange, asked, prompt, use, response)


def _wants_logprobs(body: ResponseRequest) -> bool:
    return LOGPROBS in body.include or bool(body.top_logprobs)


def _text_format(form: TextFormat | None) -> dict[str, Any]:
    """The text format as OpenAI's clients expect it: with a name and ``strict`` for a schema."""
    if form is None:
        return {"type": "text"}
    blank = {"name": "answer", "strict": True} if form.type == "json_schema" else {}
    return {**blank, **form.model_dump(by_alias=True, exclude_none=True)}


def _chat_of(body: ResponseRequest, names: dict[str, str]) -> inference_pb2.Chat:
    """The turns of a conversation; adds to ``names`` the item that each turn came from.

    A function call joins the preceding turn of the assistant, if there is one, because an answer
    with text followed by a call is one turn.
    """
    chat = inference_pb2.Chat()
    set_rendering(body, chat)
    turns = chat.messages

    def add(path: str, role: str, content: str = "", call_id: str = "") -> None:
        turn = f"chat.messages[{len(turns)}]"
        names.update({turn: path, f"{turn}.tool_call_id": f"{path}.call_id"})
        turns.add(role=role, content=content, tool_call_id=call_id)

    if body.instructions is not None:
        add("instructions", "system", body.instructions)
    for index, item in enumerate(body.input):
        path = f"input[{index}]"
        if item.type == "message":
            role = "system" if item.role == "developer" else item.role or ""
            add(path, role, item.content or "")
        elif item.type == "function_call_output":
            add(path, "tool", item.output or "", item.call_id)
        elif item.type == "function_call":
            if not turns or turns[-1].role != "assistant":
                add(path, "assistant")
            calls = turns[-1].tool_calls
            call = f"chat.messages[{len(turns) - 1}].tool_calls[{len(calls)}]"
            names |= {call: path, f"{call}.id": f"{path}.call_id"}
            calls.add(id=item.call_id, name=item.name, arguments=item.arguments)
        # Reasoning of earlier turns is left out.
    return chat


# The kind of an item → its type, the prefix of its id, and the prefix of its events' types.
_TYPES = {
    Said: ("message", "msg", "response.output_text"),
    Thought: ("reasoning", "rs", "response.reasoning_text"),
    CallBegun: ("function_call", "fc", "response.function_call_arguments"),
}


class _Response(Dialect):
    """The response object in each of its states, and its events.

    Args:
        request_id: The id of the call, from which the ids of the answer and its items are made.
        body: The request; the answer repeats parts of it.
    """

    is_never_empty = True
    has_done = True

    def __init__(self, request_id: str, body: ResponseRequest) -> None:
        self._request_id = request_id
        self._has_logprobs = _wants_logprobs(body)
        self._names_ids = body.return_tokens_as_token_ids
        self._num_sent = 0
        self._output: list[dict[str, Any]] = []
        self.whole = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "max_tool_calls": None,
            "output": [],
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
            "usage": None,
            "reasoning": {"effort": body.effort, "summary": None},
            "text": {"format": _text_format(body.text.format)},
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "top_logprobs": body.top_logprobs or 0,
            "tools": [
                {"type": "function", "name": tool.name, "description": tool.description or None}
                | {"parameters": tool.parameters, "strict": bool(tool.strict)}
                for tool in body.tools
            ],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            **{name: getattr(body, name) for name in _REPEATED},
        }

    def start(self) -> list[Event]:
        kinds = ("response.created", "response.in_progress")
        return [(kind, {"response": self.whole}) for kind in kinds]

    def begin(self, item: Item) -> list[Event]:
        place = {"output_index": item.index, "item": self._item(item, "in_progress", [])}
        events: list[Event] = [("response.output_item.added", place)]
        if item.call is None:
            part = {**self._place(item), "part": _part(item)}
            events.append(("response.content_part.added", part))
        return events

    def grow(self, item: Item, text: str, logprobs: Logprobs) -> Event:
        scored = {"logprobs": logprobs} if item.kind is Said else {}
        return f"{_TYPES[item.kind][2]}.delta", {**self._place(item), "delta": text, **scored}

    def end(self, item: Item, is_cut: bool) -> list[Event]:
        done = self._place(item)
        events = [(f"{_TYPES[item.kind][2]}.done", done)]
        if item.call is None:
            part = _part(item)
            done |= {name: part[name] for name in ("text", "logprobs") if name in part}
            events.append(("response.content_part.done", {**self._place(item), "part": part}))
        else:
            done |= {"name": item.call.name, "arguments": item.text}
        whole = self._item(item, "incomplete" if is_cut else "completed", [_part(item)])
        self._output.append(whole)
        place = {"output_index": item.index, "item": whole}
        return [*events, ("response.output_item.done", place)]

    def finish(self, answer: Ended, is_cut: bool) -> list[Event]:
        """The event with the whole response, whose status is incomplete if a limit cut it off."""
        used = usage_of([answer], 1)
        self.whole |= {
            "status": "incomplete" if is_cut else "completed",
            "completed_at": int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._output,
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": used["prompt_tokens_details"],
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            },
            "adapters_used": adapters_of([answer]),
        }
        return [(f"response.{self.whole['status']}", {"response": self.whole})]

    def fail(self, refusal: Refusal) -> list[Event]:
        code = "rate_limit_exceeded" if refusal.status == 429 else "server_error"
        error = {"code": code, "message": refusal.body["error"]["message"]}
        failed = self.whole | {"status": "failed", "error": error}
        return [("response.failed", {"response": failed})]

    def event(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        number, self._num_sent = self._num_sent, self._num_sent + 1
        return {"type": kind, "sequence_number": number, **fields}

    def logprobs_of(self, answer: Ended) -> Logprobs:
        if not self._has_logprobs:
            return []
        # In the Responses API ``bytes`` is always a list.
        found = chat_logprobs(answer.logprobs, names_ids=self._names_ids)["content"]
        for token in found:
            for one in (token, *token["top_logprobs"]):
                one["bytes"] = one["bytes"] or []
        return found

    def _id(self, item: Item) -> str:
        """The id of an item: the answer's id, followed by a number for all items but the first."""
        number = f"_{item.index}" if item.index else ""
        return f"{_TYPES[item.kind][1]}_{self._request_id}{number}"

    def _place(self, item: Item) -> dict[str, Any]:
        within = {"content_index": 0} if item.call is None else {}
        return {"item_id": self._id(item), "output_index": item.index, **within}

    def _item(self, item: Item, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        whole = {"id": self._id(item), "type": _TYPES[item.kind][0], "status": status}
        if item.call is not None:
            call = {"call_id": item.call.call_id, "name": item.call.name}
            return whole | call | {"arguments": item.text}
        more = {"role": "assistant"} if item.kind is Said else {"summary": []}
        return whole | more | {"content": content}


def _part(item: Item) -> dict[str, Any]:
    """The only part of an item's content."""
    if item.kind is Thought:
        return {"type": "reasoning_text", "text": item.text}
    # Copy the list, which grows with the item.
    logprobs = list(item.logprobs)
    return {"type": "output_text", "text": item.text, "annotations": [], "logprobs": logprobs}
