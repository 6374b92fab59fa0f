"""Constrained answers through OpenAI's client, from a real server on a tiny model.

The model is random, so only the constraints make its answers meaningful.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal

import openai
import pydantic
import pytest
from builders.bases.tiny_models import save_tiny_model
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient
from turret.clients.errors import InvalidArgumentError
from turret.server.constraints.grammar import MAX_CONSTRAINT_CHARS

ASK: Any = [{"role": "user", "content": "hi"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }} <tool_call>\n{% endfor %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Color(Enum):
    red = "red"
    blue = "blue"


class Part(pydantic.BaseModel, extra="forbid"):
    color: Color
    sold: bool


class Order(pydantic.BaseModel, extra="forbid"):
    kind: Literal["cup", "plate"]
    parts: list[Part] = pydantic.Field(max_length=2)
    note: Literal["fragile"] | None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    folder = tmp_path_factory.mktemp("structured")
    model = save_tiny_model("llama", folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    flags = ["--http-address", "127.0.0.1:0", "--model", str(model), "--dtype", "float32"]
    environment = {"XDG_CACHE_HOME": str(folder / "cache")}
    with start_server(folder, *flags, environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerUnderTest) -> Iterator[openai.OpenAI]:
    url = f"http://{server.http_address}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as connected:
        yield connected


@pytest.fixture(scope="module")
def rpc(server: ServerUnderTest) -> Iterator[TurretClient]:
    with TurretClient(server.address) as connected:
        yield connected


def test_a_response_has_the_requested_format(client: openai.OpenAI) -> None:
    answer = client.responses.parse(
        model="base", input="hi", text_format=Order, max_output_tokens=400
    )
    assert isinstance(answer.output_parsed, Order)
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == "json_schema"
    free = client.responses.create(
        model="base",
        input="hi",
        text={"format": {"type": "json_object"}},
        max_output_tokens=400,
        extra_body={"min_tokens": 5},
    )
    assert free.output_text.startswith("{")
    with pytest.raises(openai.BadRequestError, match=r"text\.format") as refused:
        client.responses.create(
            model="base",
            input="hi",
            text={"format": {"type": "json_object"}},
            extra_body={"guided_regex": "a+"},
        )
    assert refused.value.param == "text.format.type"
    form: Any = {"type": "json_schema", "name": "a", "schema": {"not": {"type": "string"}}}
    with pytest.raises(openai.BadRequestError, match=r"text\.format") as refused:
        client.responses.create(model="base", input="hi", text={"format": form})
    assert refused.value.param == "text.format.schema.not"


def test_parse_returns_pydantic_objects(client: openai.OpenAI) -> None:
    kinds = set()
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="base", messages=ASK, response_format=Order, seed=seed, max_tokens=400
        )
        (choice,) = answer.choices
        assert isinstance(choice.message.parsed, Order)
        assert choice.finish_reason == "stop"
        kinds.add(choice.message.content)
    assert len(kinds) > 1


def test_structured_answers_can_be_streamed_and_repeated(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="base", messages=ASK, response_format=Order, seed=1, max_tokens=400
    ) as stream:
        contents = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message
    assert len(contents) > 5
    assert isinstance(final.parsed, Order)
    several = client.completions.create(
        model="base", prompt=["a", "b"], n=2, seed=3, logprobs=2, max_tokens=30, stop=["z"],
        extra_body={"structured_outputs": {"regex": "[a-y]{4,8}z?[0-9]"}},
    )  # fmt: skip
    for choice in several.choices:
        assert re.fullmatch("[a-y]{4,8}[0-9]?", choice.text), choice.text


def test_every_kind_over_grpc(rpc: TurretClient) -> None:
    schema = json.dumps(Order.model_json_schema())
    options: Any = {"seed": 2, "max_tokens": 400, "min_tokens": 2, "ignore_eos": True}
    Order.model_validate_json(rpc.chat(ASK, json_schema=schema, **options).text)
    Order.model_validate_json(rpc.chat(ASK, json_schema=Order.model_json_schema(), **options).text)
    assert rpc.generate("a", regex="[ab]{5}c", **options).text[5] == "c"
    assert rpc.generate("a", grammar='start: "x"~3 | "yyyy"', **options).text in ("xxx", "yyyy")
    assert rpc.generate("a", choice=["left", "right"], **options).text in ("left", "right")
    empty = rpc.generate("a", json_object=True, logit_bias={92: 100.0}, **options).text
    assert isinstance(json.loads(empty), dict)
    free = rpc.generate("a", json_object=False, seed=2, max_tokens=4)
    assert free.text == rpc.generate("a", seed=2, max_tokens=4).text


def test_an_unsupported_schema_is_rejected_by_both_protocols(
    client: openai.OpenAI, rpc: TurretClient
) -> None:
    schema = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(InvalidArgumentError) as refused:
        rpc.chat(ASK, json_schema=schema)
    path = "json_schema.properties.tags.uniqueItems"
    assert refused.value.violations[0].field == path
    asked: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="base", messages=ASK, response_format=asked)
    assert (
        bad.value.param == f"response_format.json_schema.schema{path.removeprefix('json_schema')}"
    )
    for constraint, param in (
        ({"guided_json": schema}, f"guided_json{path.removeprefix('json_schema')}"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar"),
        ({"guided_choice": [""]}, "guided_choice"),
    ):
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="base", prompt="a", extra_body=constraint)
        assert bad.value.param == param


async def test_hostile_grammars_beside_a_polite_client(server: ServerUnderTest) -> None:
    chain = "".join(f"r{i}: r{i + 1}\n" for i in range(5000))
    hostile: list[dict[str, Any]] = [
        {"grammar": f'start: r0\n{chain}r5000: "z"'},
        {"grammar": "start: " + "(" * 60_000},
        {"regex": "((a{0,1000}){0,1000}){0,1000}"},
        {"regex": "(.|\n)*a(.|\n){2000}"},
        {"regex": "a" * (MAX_CONSTRAINT_CHARS + 1)},
        {"json_schema": '{"items":' * 7000},
        {"json_schema": {"enum": [f"v{i}" for i in range(5000)]}},
        {"choice": ["x"] * 1025},
    ]
    async with AsyncTurretClient(server.address) as client:
        polite = {"seed": 1, "max_tokens": 60, "ignore_eos": True}
        alone = await client.generate("ab", **polite)
        tasks = [
            asyncio.ensure_future(client.generate("a", max_tokens=40, **one)) for one in hostile
        ]
        together = await client.generate("ab", **polite)
        await asyncio.gather(*tasks, return_exceptions=True)
        refused = [isinstance(task.exception(), InvalidArgumentError) for task in tasks]
        assert refused == [False, True, False, False, True, True, False, True]
        assert together.text == alone.text
        assert (await client.generate("ab", **polite)).text == alone.text


def test_forced_calls_are_streamed_and_answered(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    asked: Any = {"model": "base", "tools": [tool], "seed": 4, "max_tokens": 150}
    asked["parallel_tool_calls"] = False
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    whole = client.chat.completions.create(messages=ASK, tool_choice=choice, **asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.tool_calls is not None
    (call,) = whole.message.tool_calls
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Oslo", "Rome")
    assert arguments["days"] in (1, 2)
    with client.chat.completions.stream(messages=ASK, tool_choice="required", **asked) as stream:
        deltas = [e for e in stream if e.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    assert len(deltas) > 5
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    assert final.finish_reason == "tool_calls"
    turns: Any = [
        *ASK,
        whole.message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    end = client.chat.completions.create(messages=turns, tool_choice="none", **asked).choices[0]
    assert end.message.tool_calls is None
    broken = {"name": "weather", "parameters": {**PARAMETERS, "not": {}}}
    asked["tools"] = [{"type": "function", "function": broken}]
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(messages=ASK, tool_choice="required", **asked)
    assert bad.value.param == "tools[0].function.parameters.not"


def test_responses_with_forced_calls(client: openai.OpenAI) -> None:
    tool = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    asked: Any = {"model": "base", "tools": [tool], "temperature": 0, "max_output_tokens": 200}
    asked |= {"parallel_tool_calls": False}
    chosen: Any = {"type": "function", "name": "weather"}
    whole = client.responses.create(input="hi", tool_choice=chosen, **asked)
    (call,) = whole.output
    assert call.type == "function_call"
    assert (call.name, whole.status) == ("weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    with client.responses.stream(input="hi", tool_choice="required", **asked) as stream:
        grown = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert "".join(grown) == streamed.arguments == call.arguments
    assert len(grown) > 5
    done = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    turns: Any = [{"role": "user", "content": "hi"}, call.to_dict(), done]
    end = client.responses.create(input=turns, tool_choice="none", **asked)
    assert [item.type for item in end.output] == ["message"]
