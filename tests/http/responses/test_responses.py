"""/v1/responses on a simulated engine, read by OpenAI's client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from servers.fakes import endless, failing, finish
from servers.http_harness import HttpHarness, Refused, http_harness

from turret.server.engine.scheduling.request import FinishReason, Output, Request
from turret.server.errors import UnavailableError

PATH = "/v1/responses"
ASK: Any = {"model": "base", "input": "hi"}


def connect(http: HttpHarness) -> openai.AsyncOpenAI:
    url = f"http://{http.server.address}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)


def prompt_of(http: HttpHarness) -> str:
    return bytes(http.engine.requests[-1].prompt_token_ids).decode()


async def test_an_answer_is_what_the_client_expects() -> None:
    async with http_harness() as http, connect(http) as client:
        answer = await client.responses.create(
            model="sql",
            input="hi",
            instructions="be brief",
            max_output_tokens=5,
            metadata={"a": "b"},
            store=False,
            top_logprobs=1,
            include=["message.output_text.logprobs"],
        )
        assert prompt_of(http) == "system:be brief;user:hi;"
        assert http.engine.requests[-1].stop.max_tokens == 5
        body = await http.post(PATH, ASK)
    assert answer.output_text == "Hi"
    assert (answer.status, answer.model) == ("completed", "sql")
    assert answer.to_dict()["store"] is False
    assert (answer.metadata, answer.instructions) == ({"a": "b"}, "be brief")
    assert answer.usage is not None
    assert answer.usage.input_tokens == len("system:be brief;user:hi;")
    assert answer.usage.output_tokens == 2
    assert answer.usage.total_tokens == answer.usage.input_tokens + 2
    (item,) = answer.output
    assert item.type == "message"
    (part,) = item.content
    assert part.type == "output_text"
    assert [(t.token, t.logprob) for t in part.logprobs or []] == [("H", -0.5), ("i", -0.25)]
    assert body.json()["id"] == f"resp_{body.headers['x-request-id']}"
    assert body.json()["output"][0]["content"][0]["logprobs"] == []


async def test_items_become_turns() -> None:
    turns: Any = [
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"role": "assistant", "content": [
            {"type": "output_text", "text": "b", "annotations": []},
            {"type": "output_text", "text": "c"},
        ]},
        {"role": "user", "content": "e"},
    ]  # fmt: skip
    async with http_harness() as http, connect(http) as client:
        answer = await client.responses.create(model="base", input=turns)
        assert prompt_of(http) == "system:d;user:a;assistant:bc;user:e;"
        # The output may be sent again unchanged.
        again = [*turns, *(item.to_dict() for item in answer.output)]
        await client.responses.create(model="base", input=again)
        assert prompt_of(http).endswith("user:e;assistant:Hi;")


async def test_the_events_of_a_stream() -> None:
    async with http_harness() as http, connect(http) as client:
        async with client.responses.stream(model="base", input="hi") as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert (final.output_text, final.status) == ("Hi", "completed")
        plain = await client.responses.create(model="base", input="hi", stream=True)
        numbers = [event.sequence_number async for event in plain]
        assert numbers == list(range(10))
        whole = (await http.post(PATH, ASK)).json()
        ignored = ("id", "created_at", "completed_at", "output")
        same = {name: value for name, value in whole.items() if name not in ignored}
        streamed = final.to_dict()
        assert {name: streamed[name] for name in same} == same
        raw = await http.post(PATH, {**ASK, "stream": True})
        for part in raw.text.strip().split("\n\n")[:-1]:
            name, data = part.split("\n")
            assert f'"type":"{name.removeprefix("event: ")}"' in data


async def test_a_truncated_answer_is_incomplete() -> None:
    async def cut(request: Request) -> AsyncIterator[Output]:
        yield Output(text="H", token_ids=(72,), finish=finish(request, FinishReason.LENGTH))

    async with http_harness() as http, connect(http) as client:
        http.engine.script = cut
        answer = await client.responses.create(model="base", input="hi", max_output_tokens=1)
        assert answer.status == "incomplete"
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"
        events = [e async for e in await client.responses.create(stream=True, **ASK)]
        assert events[-1].type == "response.incomplete"


async def test_an_answer_that_fails_midway_reports_the_error() -> None:
    async with http_harness() as http, connect(http) as client:
        http.engine.script = failing(UnavailableError("the engine is dead"))
        stream = await client.responses.create(stream=True, **ASK)
        events: list[Any] = []

        async def read() -> None:
            async for event in stream:
                events.append(event)

        with pytest.raises(openai.APIError, match="the engine is dead"):
            await read()
        last = events[-1]
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert last.response.error.message == "the engine is dead"
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(**ASK)
        assert await http.sample("turret_calls_total", protocol="http", code="UNAVAILABLE") == 2


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        ("store", True, False),
        ("previous_response_id", "resp_1", None),
        ("conversation", "conv_1", None),
        ("background", True, False),
        ("prompt", {"id": "p"}, None),
        ("tools[0].type", [{"type": "web_search"}], []),
        ("tools[0].name", [{"type": "function"}], None),
        ("tool_choice", "required", "auto"),
        ("tool_choice", {"type": "function", "name": "f"}, "none"),
        ("tool_choice.mode", {"type": "allowed_tools"}, None),
        ("truncation", "auto", "disabled"),
        ("text.format.type", {"format": {"type": "xml"}}, {"format": {"type": "text"}}),
        ("text.format.schema", {"format": {"type": "json_schema"}}, {"format": None}),
        ("reasoning.effort", {"effort": "much"}, {"effort": "low"}),
        ("n", 2, 1),
        ("max_output_tokens", 0, 5),
        ("input", [], "a"),
        ("input", 5, [{"role": "user", "content": "a"}]),
        ("input[0].role", [{"role": "tool", "content": "a"}], "a"),
        ("input[0].type", [{"type": "item_reference", "id": "msg_1"}], "a"),
        ("input[0].type", [{"type": "web_search_call", "id": "ws_1"}], "a"),
        ("input[0].output", [{"type": "function_call_output", "call_id": "c"}], "a"),
        ("input[0].content[0]", [{"role": "user", "content": [{"type": "input_image"}]}], "a"),
        ("input[0].content", [{"role": "user"}], "a"),
        ("input[0]", ["a"], "a"),
        ("temperature", -1, 1),
    ],
)
async def test_unsupported_values_are_rejected(field: str, value: Any, neutral: Any) -> None:
    name = field.partition(".")[0].partition("[")[0]
    async with http_harness() as http:
        refused = await http.refused(PATH, {**ASK, name: value})
        assert (refused.status, refused.param) == (400, field)
        fine = await http.post(PATH, {**ASK, name: neutral})
        assert fine.status_code == 200, fine.text


async def test_input_and_model_are_required() -> None:
    async with http_harness() as http:
        assert (await http.refused(PATH, {"model": "base"})).param == "input"
        assert (await http.refused(PATH, {"input": "hi"})).param == "model"
        missing = await http.refused(PATH, {**ASK, "model": "a b"})
        assert (missing.status, missing.code) == (404, "model_not_found")


async def test_a_disconnect_cancels() -> None:
    async with http_harness() as http, connect(http) as client:
        http.engine.script = endless
        stream = await client.responses.create(stream=True, **ASK)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        await http.engine.streams[0].cancelled.wait()


async def test_get_is_rejected() -> None:
    async with http_harness() as http:
        answer = await http.client.get(PATH)
        assert Refused.of(answer).status == 405
