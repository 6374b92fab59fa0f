"""Anthropic's Messages API: turns, blocks, events and errors."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError
from servers.fakes import failing, knows_tools, saying
from servers.http_harness import TURNS, HttpHarness, http_harness
from servers.rpc_harness import tokens_of

from turret.server.engine.scheduling.request import FinishReason
from turret.server.errors import UnavailableError
from turret.server.http.messages import CountRequest, _chat_of
from turret.server.http.request_models import ChatRequest
from turret.server.words import say

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
TOOLS = [
    {
        "name": "weather",
        "description": "looks out of the window",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    {"type": "custom", "name": "clock", "input_schema": {"type": "object"}},
]
ASKED: dict[str, Any] = {"model": "base", "max_tokens": 64, "messages": TURNS}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
ANSWER = f"<think>hm</think>Well. {CALL}"

TEXT = {"type": "text", "text": "a"}
USE = {"type": "tool_use", "id": "1", "name": "weather", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "r"}
LONG = "a" * 100_000


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, dict[str, Any]]]:
    """The inputs of the simulated tokenizer, whose template supports tools."""
    return knows_tools(monkeypatch, has_reasoning=True)


def events_of(answer: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a stream; the name of each is its type."""
    found = []
    for event in answer.text.strip().split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


async def test_an_answer_has_a_block_for_each_part(rendered: Any, http: HttpHarness) -> None:
    http.engine.script = saying(*ANSWER, "")
    asked = ASKED | {"tools": TOOLS, "system": [{"type": "text", "text": "be short"}]}
    whole = (await http.post(PATH, asked)).json()
    events = events_of(await http.post(PATH, asked | {"stream": True}))
    thought, said, call = whole["content"]
    assert thought == {"type": "thinking", "thinking": "hm", "signature": ""}
    assert said == {"type": "text", "text": "Well. "}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Oslo"})
    assert (whole["role"], whole["model"], whole["stop_reason"]) == (
        "assistant",
        "base",
        "tool_use",
    )
    used = whole["usage"]
    assert (used["cache_read_input_tokens"], used["output_tokens"]) == (1, 2)
    messages, tools, _ = rendered[0]
    assert messages[0] == {"role": "system", "content": "be short"}
    assert [tool["function"]["name"] for tool in tools] == ["weather", "clock"]
    assert tools[0]["function"]["parameters"] == TOOLS[0]["input_schema"]

    kinds = [event["type"] for event in events]
    order = [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert order == ["message_start", "ping", *block * 3, "message_delta", "message_stop"]
    first = events[0]["message"]
    assert (first["content"], first["stop_reason"]) == ([], None)
    assert first["usage"]["input_tokens"] == (
        used["input_tokens"] + used["cache_read_input_tokens"]
    )
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    for kind, field, text in (
        ("thinking_delta", "thinking", "hm"),
        ("text_delta", "text", "Well. "),
        ("input_json_delta", "partial_json", '{"city": "Oslo"}'),
    ):
        assert "".join(each[field] for each in deltas if each["type"] == kind) == text
    assert [e["index"] for e in events if e["type"] == "content_block_stop"] == [0, 1, 2]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"] == whole["usage"]


async def test_turns_become_messages_of_the_template(rendered: Any, http: HttpHarness) -> None:
    use = {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "5"}]}
    turns = [
        *TURNS,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "Well."},
                use,
            ],
        },
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    asked = ASKED | {"messages": turns, "tools": TOOLS}
    asked |= {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    await http.post(PATH, asked)
    begun = [*TURNS, {"role": "assistant", "content": "It is"}]
    await http.post(PATH, ASKED | {"messages": begun})
    count = await http.post(COUNT, {"model": "base", "messages": turns, "tools": TOOLS})
    messages, _, how = rendered[0]
    assert [(each["role"], each["content"]) for each in messages] == [
        *(("user", "hi"), ("assistant", "Well."), ("tool", "5"), ("user", "And?"))
    ]
    (call,) = messages[1]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert messages[2]["tool_call_id"] == call["id"] == "a"
    assert how["how"].variables == {"enable_thinking": True}
    assert rendered[-2][2]["how"].continues
    assert count.json() == {"input_tokens": 1}


@pytest.mark.parametrize(
    ("script", "reason", "sequence"),
    [
        (saying("a"), "end_turn", None),
        (saying("a", reason=FinishReason.LENGTH), "max_tokens", None),
        (saying("a", stop="END"), "stop_sequence", "END"),
    ],
)
async def test_stop_reasons_are_reported(
    script: Any, reason: str, sequence: str | None, http: HttpHarness
) -> None:
    http.engine.script = script
    whole = (await http.post(PATH, ASKED | {"stop_sequences": ["END"]})).json()
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    assert http.engine.requests[0].stop.stop_strings == ("END",)


@pytest.mark.parametrize(
    ("choice", "is_forced", "names"),
    [
        ({"type": "auto"}, False, ["weather", "clock"]),
        ({"type": "none"}, False, []),
        ({"type": "any"}, True, ["weather", "clock"]),
        ({"type": "tool", "name": "clock"}, True, ["weather", "clock"]),
    ],
)
async def test_tool_choice_is_applied(
    rendered: Any, choice: Any, is_forced: bool, names: list[str], http: HttpHarness
) -> None:
    http.engine.script = saying(*CALL, *CALL, "")
    asked = ASKED | {"tools": TOOLS, "tool_choice": choice}
    whole = (await http.post(PATH, asked)).json()
    assert (http.engine.requests[0].constraint is not None) is is_forced
    choice |= {"disable_parallel_tool_use": True}
    one = (await http.post(PATH, asked | {"tool_choice": choice})).json()
    assert [tool["function"]["name"] for tool in rendered[0][1] or ()] == names
    if choice["type"] == "auto":
        assert len(whole["content"]) == 2
        assert len(one["content"]) == 1


@pytest.mark.parametrize(
    ("changed", "param", "code"),
    [
        ({"max_tokens": None}, "max_tokens", "required"),
        ({"stop_sequence": ["a"]}, "stop_sequence", "unknown_field"),
        ({"mcp_servers": [{}]}, "mcp_servers", "not_supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            *("messages[0].content[0]", "not_text"),
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "a"}]}, "tools[0].type", "not_one_of"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "needs_field"),
        ({"output_config": {"effort": "most"}}, "output_config.effort", "not_one_of"),
        (
            {"messages": [{"role": "user", "content": [TEXT, RESULT | {"tool_use_id": LONG}]}]},
            *("messages[0].content[1].tool_use_id", "too_many_characters"),
        ),
        (
            {"messages": [{"role": "assistant", "content": [TEXT, USE, USE | {"id": LONG}, USE]}]},
            *("messages[0].content[2].id", "too_many_characters"),
        ),
        (
            {"messages": [{"role": "assistant", "content": [USE] * 129}]},
            *("messages[0].content", "too_many_entries"),
        ),
    ],
)
async def test_errors_have_the_format_of_anthropic(
    changed: Any, param: str, code: str, http: HttpHarness
) -> None:
    answer = await http.post(PATH, ASKED | changed)
    body = answer.json()
    assert (answer.status_code, body["type"]) == (400, "error")
    assert body["request_id"] == answer.headers["x-request-id"]
    error = body["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert len(error["violations"]) == 1


async def test_errors_of_other_kinds() -> None:
    async with http_harness(tokens=tokens_of("a")) as http:
        key = {"x-api-key": "a", "anthropic-version": "2023-06-01"}
        assert (await http.post(PATH, ASKED, key)).status_code == 200
        for body, headers, status, kind in (
            (ASKED, {"x-api-key": "b"}, 401, "authentication_error"),
            (ASKED, {}, 401, "authentication_error"),
            (ASKED | {"model": "a b"}, key, 404, "not_found_error"),
        ):
            answer = await http.post(PATH, body, headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)

        http.engine.script = failing(UnavailableError(say("REQUEST_ENDED")))
        events = events_of(await http.post(PATH, ASKED | {"stream": True}, key))
    assert events[0]["type"] == "message_start"
    assert (events[-1]["type"], events[-1]["error"]["type"]) == ("error", "overloaded_error")


def test_many_blocks_cost_no_more_than_their_texts():
    """Copying the text with every block made 3.7 MB take gigabytes and block the event loop."""
    blocks = [{"type": "text", "text": "a" * 900}] * 4000
    turns = [{"role": "user", "content": [*blocks, RESULT, *blocks[:2]]}]
    body = CountRequest.model_validate({"model": "base", "messages": turns})
    begun = time.process_time()
    chat = _chat_of(body, {})
    assert time.process_time() - begun < 1.0
    assert [len(message.content) for message in chat.messages] == [900 * 4000, 1, 1800]


@pytest.mark.parametrize(
    ("model", "turn"),
    [
        (CountRequest, {"role": "user", "content": [1] * 32}),
        (ChatRequest, {"role": "assistant", "tool_calls": [1] * 128}),
    ],
)
def test_a_nested_list_is_refused_at_its_first_wrong_entry(model: Any, turn: Any):
    with pytest.raises(ValidationError) as refused:
        model.model_validate({"model": "base", "messages": [turn] * 250})
    assert refused.value.error_count() == 250


def test_all_turns_together_have_a_limit_of_blocks():
    block = {"type": "text", "text": ""}
    full, more = ({"role": "user", "content": [block] * count} for count in (4096, 1))
    CountRequest.model_validate({"model": "base", "messages": [full, full]})
    with pytest.raises(ValidationError) as refused:
        CountRequest.model_validate({"model": "base", "messages": [full, full, more]})
    (error,) = refused.value.errors()
    text = error.get("ctx", {})["text"]
    assert (text.reason, dict(text.params)) == ("TOO_MANY_ENTRIES", {"most": 8192, "found": 8193})
