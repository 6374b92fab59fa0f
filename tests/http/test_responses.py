"""/v1/responses on a simulated engine, read by OpenAI's client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from servers.fakes import endless, failing, knows_tools, saying
from servers.http_harness import HttpHarness

from turret.server.engine.scheduling.request import FinishReason
from turret.server.errors import UnavailableError

PATH = "/v1/responses"
ASK: Any = {"model": "base", "input": "hi"}


@pytest.fixture
async def client(http: HttpHarness) -> AsyncIterator[AsyncOpenAI]:
    url = f"http://{http.server.address}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as connected:
        yield connected


def prompt_of(http: HttpHarness) -> str:
    return bytes(http.engine.requests[-1].prompt_token_ids).decode()


async def test_an_answer_is_what_the_client_expects(http: HttpHarness, client: AsyncOpenAI) -> None:
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


async def test_items_become_turns(http: HttpHarness, client: AsyncOpenAI) -> None:
    turns: Any = [
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"role": "assistant", "content": [
            {"type": "output_text", "text": "b", "annotations": []},
            {"type": "output_text", "text": "c"},
        ]},
        {"role": "user", "content": "e"},
    ]  # fmt: skip
    answer = await client.responses.create(model="base", input=turns)
    assert prompt_of(http) == "system:d;user:a;assistant:bc;user:e;"
    # The output may be sent again unchanged.
    again = [*turns, *(item.to_dict() for item in answer.output)]
    await client.responses.create(model="base", input=again)
    assert prompt_of(http).endswith("user:e;assistant:Hi;")


async def test_the_events_of_a_stream(http: HttpHarness, client: AsyncOpenAI) -> None:
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


async def test_a_truncated_answer_is_incomplete(http: HttpHarness, client: AsyncOpenAI) -> None:
    http.engine.script = saying("H", reason=FinishReason.LENGTH)
    answer = await client.responses.create(model="base", input="hi", max_output_tokens=1)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    events = [e async for e in await client.responses.create(stream=True, **ASK)]
    assert events[-1].type == "response.incomplete"


async def test_an_answer_that_fails_midway_reports_the_error(
    http: HttpHarness, client: AsyncOpenAI
) -> None:
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


async def test_an_unknown_model_is_refused(http: HttpHarness) -> None:
    missing = await http.refused(PATH, {**ASK, "model": "a b"})
    assert (missing.status, missing.code) == (404, "model_not_found")


async def test_a_disconnect_cancels(http: HttpHarness, client: AsyncOpenAI) -> None:
    http.engine.script = endless
    stream = await client.responses.create(stream=True, **ASK)
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    await http.engine.streams[0].cancelled.wait()


WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "looks out of the window",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CLOCK: Any = {"type": "function", "name": "clock"}
NAMED: Any = {"type": "function", "name": "clock"}
END = '"}}</tool_call>'
ANSWER = (
    "<think>hm</think>Well. "
    '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    '<tool_call>{"name": "weather", "arguments": {"city": "Oslo' + END
)


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, dict[str, Any]]]:
    """The inputs of the simulated tokenizer, whose template supports tools."""
    return knows_tools(monkeypatch, has_reasoning=True)


async def test_an_answer_has_an_item_for_each_part(
    rendered: Any, http: HttpHarness, client: AsyncOpenAI
) -> None:
    http.engine.script = saying(*ANSWER, "")
    answer = await client.responses.create(model="base", input="hi", tools=[WEATHER, CLOCK])
    items: list[Any] = list(answer.output)
    thought, said, clock, weather = items
    raw = (await http.post(PATH, {"model": "base", "input": "hi", "tools": [CLOCK]})).json()
    assert thought.type == "reasoning"
    assert [part.text for part in thought.content or []] == ["hm"]
    assert (said.type, answer.output_text) == ("message", "Well. ")
    assert clock.type == weather.type == "function_call"
    assert (clock.name, clock.arguments) == ("clock", "{}")
    assert (weather.name, weather.arguments) == ("weather", '{"city": "Oslo"}')
    ids = [item.id for item in items]
    assert [str(one).split("_")[0] for one in ids] == ["rs", "msg", "fc", "fc"]
    assert len({*ids, clock.call_id, weather.call_id}) == 6
    assert {item.status for item in items} == {"completed"}
    tool = answer.tools[0]
    assert tool.type == "function"
    assert (tool.name, tool.description) == ("weather", "looks out of the window")
    assert (answer.tool_choice, answer.parallel_tool_calls) == ("auto", True)
    # The model sees the tools in the form that templates expect.
    told = [one["function"] for one in rendered[0][1]]
    assert [one["name"] for one in told] == ["weather", "clock"]
    assert told[0]["parameters"] == WEATHER["parameters"]
    # A call of an unknown tool is text.
    assert [item["type"] for item in raw["output"]] == [
        *("reasoning", "message", "function_call", "message")
    ]


async def test_the_events_of_calls(rendered: Any, http: HttpHarness, client: AsyncOpenAI) -> None:
    http.engine.script = saying(*ANSWER, "")
    asked: Any = {"model": "base", "input": "hi", "tools": [WEATHER, CLOCK]}
    async with client.responses.stream(**asked) as stream:
        helped = [event.type async for event in stream]
    plain = await client.responses.create(stream=True, **asked)
    events: list[Any] = [event async for event in plain]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed"
    whole = [item.to_dict() for item in last.response.output]
    kinds = [event.type for event in events]
    assert kinds == helped
    order = [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]]
    assert order == [
        *("response.created", "response.in_progress"),
        *("response.output_item.added", "response.content_part.added"),
        *("response.reasoning_text.delta", "response.reasoning_text.done"),
        *("response.content_part.done", "response.output_item.done"),
        *("response.output_item.added", "response.content_part.added"),
        *("response.output_text.delta", "response.output_text.done"),
        *("response.content_part.done", "response.output_item.done"),
        *("response.output_item.added", "response.function_call_arguments.delta"),
        *("response.function_call_arguments.done", "response.output_item.done"),
        *("response.output_item.added", "response.function_call_arguments.delta"),
        *("response.function_call_arguments.done", "response.output_item.done"),
        "response.completed",
    ]
    added = [event.item for event in events if event.type == "response.output_item.added"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in added] == [item.id for item in done]
    assert {item.status for item in added} == {"in_progress"}
    for index, item in enumerate(done):
        assert item.to_dict() == whole[index]
        of_it = [e for e in events if getattr(e, "item_id", None) == item.id]
        assert {e.output_index for e in of_it if hasattr(e, "output_index")} == {index}
        if item.type == "function_call":
            grown = [e.delta for e in of_it if e.type == "response.function_call_arguments.delta"]
            assert "".join(grown) == item.arguments
            (told,) = [e for e in of_it if e.type == "response.function_call_arguments.done"]
            assert told.arguments == item.arguments


async def test_logprobs_cover_the_text_of_the_answer(rendered: Any, http: HttpHarness) -> None:
    asked: Any = {"model": "base", "input": "hi", "tools": [WEATHER, CLOCK], "top_logprobs": 1}
    http.engine.script = saying(*ANSWER, "")
    whole = (await http.post(PATH, asked)).json()
    events = await http.post(PATH, {**asked, "stream": True})
    (said,) = [item for item in whole["output"] if item["type"] == "message"]
    scored = said["content"][0]["logprobs"]
    assert "".join(token["token"] for token in scored) == "Well. "
    assert '"logprobs":[{"token":"W"' in events.text


async def test_a_truncated_item_is_incomplete(
    rendered: Any, http: HttpHarness, client: AsyncOpenAI
) -> None:
    http.engine.script = saying(*ANSWER[: -len(END)], "", reason=FinishReason.LENGTH)
    answer = await client.responses.create(model="base", input="hi", tools=[WEATHER, CLOCK])
    items: list[Any] = list(answer.output)
    assert [item.status for item in items] == ["completed"] * 3 + ["incomplete"]
    last = answer.output[-1]
    assert last.type == "function_call"
    assert last.arguments == '{"city": "Oslo'
    assert answer.status == "incomplete"


async def test_output_items_can_be_sent_back_as_input(
    rendered: Any, http: HttpHarness, client: AsyncOpenAI
) -> None:
    http.engine.script = saying(*ANSWER, "")
    asked: Any = {"model": "base", "tools": [WEATHER, CLOCK]}
    answer = await client.responses.create(input="hi", **asked)
    calls = [item for item in answer.output if item.type == "function_call"]
    turns: Any = [{"role": "user", "content": "hi"}]
    turns += [item.to_dict() for item in answer.output]
    for call in calls:
        output = [{"type": "input_text", "text": "so "}, {"type": "input_text", "text": "be it"}]
        turns.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
    await client.responses.create(input=turns, **asked)
    messages, *_ = rendered[-1]
    # Text and two calls form one turn; reasoning is left out.
    assert [turn["role"] for turn in messages] == ["user", "assistant", "tool", "tool"]
    assert messages[1]["content"] == "Well. "
    assert [call["id"] for call in messages[1]["tool_calls"]] == [c.call_id for c in calls]
    assert [call["function"] for call in messages[1]["tool_calls"]] == [
        {"name": "clock", "arguments": {}},
        {"name": "weather", "arguments": {"city": "Oslo"}},
    ]
    assert messages[2] == {"role": "tool", "content": "so be it", "tool_call_id": calls[0].call_id}
    bad = {"type": "function_call", "call_id": "c", "name": "clock", "arguments": "[1]"}
    body = {**asked, "input": [turns[0], bad], "instructions": "be brief"}
    refused = await http.refused(PATH, body)
    assert (refused.status, refused.param) == (400, "input[1].arguments")
    long = {"call_id": "c" * 100_000}
    result = {"type": "function_call_output", "output": "a"}
    for each in (bad | {"arguments": ""} | long, result | long):
        refused = await http.refused(PATH, body | {"input": [turns[0], each]})
        assert (refused.status, refused.param) == (400, "input[1].call_id")


@pytest.mark.parametrize(
    ("choice", "told", "forced"),
    [
        ("auto", ["weather", "clock"], None),
        ("none", [], None),
        ("required", ["weather", "clock"], ["weather", "clock"]),
        (NAMED, ["weather", "clock"], ["clock"]),
        ({"type": "allowed_tools", "mode": "auto", "tools": [NAMED]}, ["clock"], None),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [NAMED]},
            ["weather", "clock"],
            ["clock"],
        ),
    ],
)
async def test_tool_choice_determines_which_tools_are_offered_and_forced(
    rendered: Any,
    choice: Any,
    told: list[str],
    forced: list[str] | None,
    http: HttpHarness,
    client: AsyncOpenAI,
) -> None:
    http.engine.script = saying("no")
    tools: Any = [WEATHER, CLOCK]
    answer = await client.responses.create(
        model="base", input="hi", tools=tools, tool_choice=choice, parallel_tool_calls=False
    )
    assert [tool["function"]["name"] for tool in rendered[-1][1]] == told
    spec: Any = http.engine.requests[-1].constraint
    names = [n for n in ("weather", "clock") if spec and f'\\"{n}\\"' in spec.texts[0]]
    assert (names or None) == forced
    assert answer.to_dict()["tool_choice"] == choice
    assert answer.parallel_tool_calls is False
