"""Bodies of any shape get an answer or a refusal, and never make a bug visible."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import httpx2
import pytest
from servers.http_harness import HttpHarness, Refused, http_harness

from turret.server.http.bodies.unsupported import refused_fields

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TURNS = [{"role": "user", "content": "a"}]
ADAPTER = {"lora_name": "a", "lora_path": "a"}
# Path → bodies that are right.
PATHS: dict[str, tuple[dict[str, Any], ...]] = {
    CHAT: ({"model": "base", "messages": TURNS},),
    COMPLETIONS: ({"model": "base", "prompt": "a"},),
    RESPONSES: (
        {"model": "base", "input": "a"},
        {"model": "base", "input": TURNS, "text": {"format": {"type": "json_object"}}},
    ),
    "/tokenize": ({"prompt": "a"}, {"messages": TURNS}),
    "/detokenize": ({"tokens": [1]},),
    "/v1/load_lora_adapter": (ADAPTER,),
    "/v1/unload_lora_adapter": (ADAPTER,),
    "/classify": ({"model": "sql", "input": "a"},),
    "/v1/embeddings": (
        {"model": "base", "input": "a"},
        {"model": "base", "input": [[1], [2]], "encoding_format": "base64"},
        {"model": "base", "messages": TURNS},
    ),
}
FIELDS = (
    *("model", "adapters", "messages", "prompt", "tokens", "n", "best_of", "stream"),
    *("stream_options", "timeout", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("max_tokens", "max_completion_tokens", "min_tokens", "stop", "stop_token_ids"),
    *("ignore_eos", "include_stop_str_in_output", "logprobs", "top_logprobs", "echo"),
    *("lora_name", "lora_path", "load_inplace", "pinned", "return_token_strs"),
    *("response_format", "structured_outputs", "guided_json", "guided_choice", "regex"),
    *("tools", "tool_choice", "parallel_tool_calls"),
    *("input", "encoding_format", "dimensions", "pooling", "normalize"),
    *("metadata", "user", "safety_identifier", "prompt_cache_key", "text", "reasoning", "store"),
    *("instructions", "max_output_tokens", "include", "truncation"),
    *itertools.chain.from_iterable(refused_fields().values()),
)
SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 16, 255, 256, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1e308, 1e308, 5e-324, math.inf, -math.inf),
    *("", "a", "base", "sql", "sql+json*-0.5", "\ud800", "\x00", "é" * 300, "x" * 5000, "../a"),
)
_KEYS = (
    *("role", "content", "type", "text", "name", "weight", "generation"),
    *(
        "json",
        "choice",
        "schema",
        "json_schema",
        "function",
        "parameters",
        "tool_calls",
        "arguments",
    ),
    *("1", "-1", "a"),
)


def any_name(source: random.Random) -> str:
    """A field's name; one in four has a letter that is another."""
    name = source.choice(FIELDS)
    if source.random() < 0.75:
        return name
    at = source.randrange(len(name))
    return name[:at] + source.choice(("x", "\ud800", "\udc00", "\x00", "é", "")) + name[at + 1 :]


def any_value(source: random.Random, depth: int = 0) -> Any:
    kind = source.random()
    if depth > 3 or kind < 0.6:
        return source.choice(SCALARS)
    if kind < 0.8:
        return [any_value(source, depth + 1) for _ in range(source.randint(0, 3))]
    if kind < 0.85:
        function = {source.choice(_KEYS): any_value(source, depth + 1), "name": "f"}
        return [{"type": "function", "id": any_value(source, depth + 1), "function": function}]
    if kind < 0.9:
        roles = ("user", "system", "tool", "developer", "")
        return [{"role": source.choice(roles), "content": any_value(source, depth + 1)}]
    return {source.choice(_KEYS): any_value(source, depth + 1) for _ in range(source.randint(0, 3))}


async def post(server: HttpHarness, path: str, body: Any) -> httpx2.Response:
    """Send a body; infinity as a number that no float can hold."""
    text = json.dumps(body).replace("Infinity", "1e999")
    return await server.client.post(
        path, content=text, headers={"content-type": "application/json"}
    )


async def test_any_body_is_answered_or_refused() -> None:
    source = random.Random(11)
    statuses: dict[str, set[int]] = {path: set() for path in PATHS}
    async with http_harness() as server:
        for _ in range(1500):
            path = source.choice(list(PATHS))
            body = dict(source.choice(PATHS[path]))
            for _ in range(source.choice((1, 1, 1, 2, 4))):
                body[any_name(source)] = any_value(source)
            answer = await post(server, path, body)
            statuses[path].add(answer.status_code)
            assert answer.status_code in (200, 400, 404, 409), (path, body, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]
    for path, seen in statuses.items():
        assert {200, 400} <= seen, path


TOOL = {"type": "function", "name": "f"}


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("\ud800", "holds half of a surrogate pair"),
        (math.inf, "holds a number that is too large: at most 1.8e308"),
    ],
)
async def test_what_an_answer_repeats_and_cannot_say_is_told_by_its_place(
    value: Any, why: str
) -> None:
    form = {"type": "json_object"}
    async with http_harness() as server:
        for place, sent in (
            ("metadata.a", {"metadata": {"b": 1.5, "a": value}}),
            ("metadata.a.b[1]", {"metadata": {"a": {"b": ["", value]}}}),
            (f"metadata.{'x' * 40}", {"metadata": {"x" * 5000: value}}),
            ("user", {"user": value}),
            ("prompt_cache_key", {"prompt_cache_key": value}),
            ("safety_identifier", {"safety_identifier": value}),
            ("text.format.name", {"text": {"format": form | {"name": value}}}),
            ("text.format.description", {"text": {"format": form | {"description": value}}}),
            (
                "text.format.schema",
                {"text": {"format": {"type": "json_schema", "schema": {"a": value}}}},
            ),
            ("tools[0].a", {"tools": [TOOL | {"a": value}]}),
            ("tools[0].parameters", {"tools": [TOOL | {"parameters": {"a": value}}]}),
            ("tool_choice.a", {"tools": [TOOL], "tool_choice": TOOL | {"a": value}}),
        ):
            body = {"model": "base", "input": "a", **sent}
            refused = Refused.of(await post(server, RESPONSES, body))
            assert (refused.status, refused.param) == (400, place)
            assert refused.message == f"{place}: {why}"


async def test_a_schema_with_a_number_that_is_none_is_refused() -> None:
    schema = {"maximum": math.inf}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    async with http_harness() as server:
        for place, sent in (
            ("structured_outputs.json", {"structured_outputs": {"json": schema}}),
            ("tools[0].function.parameters", {"tools": [tool]}),
        ):
            body = {"model": "base", "messages": TURNS, **sent}
            refused = Refused.of(await post(server, CHAT, body))
            assert (refused.status, refused.param) == (400, place)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (RESPONSES, {"temperature": "hot"}, "temperature: must be a number"),
        (RESPONSES, {"input": [{"role": 3, "content": "a"}]}, "input[0].role: must be a string"),
        (
            RESPONSES,
            {"tools": [{"type": "function", "name": "\ud800"}]},
            "tools[0].name: holds half of a surrogate pair",
        ),
        (
            COMPLETIONS,
            {"prompt": "a", "response_format": {"type": 3}},
            "response_format.type: must be a string",
        ),
        (
            COMPLETIONS,
            {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": 3}},
            "response_format.json_schema: must be an object",
        ),
        ("/detokenize", {"tokens": "a"}, "tokens: must be a list of token ids"),
    ],
)
async def test_what_is_wrong_is_told_once(path: str, body: dict[str, Any], said: str) -> None:
    async with http_harness() as server:
        answer = await post(server, path, {"model": "base", "input": "a", **body})
        assert Refused.of(answer).message == said
