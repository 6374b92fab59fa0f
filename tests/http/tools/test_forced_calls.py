"""Forced calls: their number, their ends, and their arguments."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from servers.fakes import FakeTokenizer, finish
from servers.http_harness import http_harness

from turret.server.engine.scheduling.request import FinishReason, Output, Request
from turret.server.http.schemas.fields import closed
from turret.server.models.chat_template import ChatFormat
from turret.server.models.tokenizer import RenderedChat

OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
CLOSED = {**OBJECT, "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": OBJECT}}
ASKED: dict[str, Any] = {
    "model": "base",
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [TOOL],
    "tool_choice": "required",
}


@pytest.fixture(autouse=True)
def knows_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    def render(self: Any, messages: Any, tools: Any = (), **how: Any) -> RenderedChat:
        return RenderedChat(["\1"])

    monkeypatch.setattr(FakeTokenizer, "chat_format", ChatFormat("hermes"))
    monkeypatch.setattr(FakeTokenizer, "render_chat", render)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (OBJECT, CLOSED),
        ({"type": "object"}, {"type": "object"}),
        ({**OBJECT, "additionalProperties": True}, {**OBJECT, "additionalProperties": True}),
        ({"anyOf": [OBJECT, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"type": "array", "items": OBJECT}, {"type": "array", "items": CLOSED}),
        (
            {"$defs": {"A": OBJECT}, "properties": {"properties": {"$ref": "#/$defs/A"}}},
            {
                "$defs": {"A": CLOSED},
                "properties": {"properties": {"$ref": "#/$defs/A"}},
                "additionalProperties": False,
            },
        ),
        ({"enum": [OBJECT]}, {"enum": [OBJECT]}),
        ({"allOf": [OBJECT, OBJECT]}, {"allOf": [OBJECT, OBJECT]}),
        ({**OBJECT, "anyOf": [OBJECT]}, {**OBJECT, "anyOf": [OBJECT]}),
    ],
)
def test_schemas_of_objects_are_closed_unless_they_are_shared(schema: Any, expected: Any) -> None:
    assert closed(schema) == expected


async def test_only_openais_fields_close_objects() -> None:
    schema = {"name": "a", "schema": OBJECT}
    asked = {"model": "base", "messages": ASKED["messages"]}
    async with http_harness() as http:
        for more in (
            {"response_format": {"type": "json_schema", "json_schema": schema}},
            {"guided_json": OBJECT},
        ):
            assert (await http.post("/v1/chat/completions", asked | more)).status_code == 200
        given = [json.loads(each.constraint.texts[0]) for each in http.engine.requests]  # type: ignore[union-attr]
    assert given == [CLOSED, OBJECT]


async def test_a_truncated_forced_call_is_not_returned_as_text() -> None:
    async def script(request: Request) -> AsyncIterator[Output]:
        yield Output(text='<tool_call>\n{"name": "', token_ids=(1,))
        end = finish(request, FinishReason.LENGTH)
        yield Output(text="", token_ids=(2,), finish=end)

    async with http_harness() as http:
        http.engine.script = script
        whole = (await http.post("/v1/chat/completions", ASKED)).json()["choices"][0]
        events = await http.events("/v1/chat/completions", ASKED | {"stream": True})
        free = ASKED | {"tool_choice": "auto"}
        text = (await http.post("/v1/chat/completions", free)).json()["choices"][0]
    assert (whole["finish_reason"], whole["message"]["content"]) == ("length", "")
    assert not any(event["choices"][0]["delta"].get("content") for event in events[:-1])
    assert text["message"]["content"].startswith("<tool_call>")


@pytest.mark.parametrize(("is_parallel", "is_one"), [(None, True), (True, False), (False, True)])
async def test_only_one_call_is_forced_by_default(is_parallel: bool | None, is_one: bool) -> None:
    async with http_harness() as http:
        asked = ASKED | {"parallel_tool_calls": is_parallel}
        assert (await http.post("/v1/chat/completions", asked)).status_code == 200
        rules = http.engine.requests[0].constraint.texts[0].splitlines()  # type: ignore[union-attr]
    assert ("calls: wrapped" in rules) is is_one
