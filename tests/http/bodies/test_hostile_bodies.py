"""Bodies of any shape get an answer or a client's error, never an internal one."""

from __future__ import annotations

import random
from typing import Any

import pytest
from servers.http_harness import http_harness
from servers.limits_of_bodies import fields

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TURNS = [{"role": "user", "content": "a"}]
ADAPTER = {"lora_name": "a", "lora_path": "a"}
# Path → valid bodies.
PATHS: dict[str, tuple[dict[str, Any], ...]] = {
    CHAT: ({"model": "base", "messages": TURNS},),
    COMPLETIONS: ({"model": "base", "prompt": "a"},),
    RESPONSES: (
        {"model": "base", "input": "a"},
        {"model": "base", "input": TURNS, "text": {"format": {"type": "json_object"}}},
    ),
    "/v1/messages": ({"model": "base", "max_tokens": 4, "messages": TURNS, "tools": []},),
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
FIELDS = sorted(set().union(*fields().values()) | {"x", "include_stop_str"})
SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 16, 255, 256, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1e308, 1e308, 5e-324),
    *("", "a", "base", "sql", "sql+json*-0.5", "\x00", "é" * 300, "x" * 5000, "../a"),
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
    """The name of a field; one in four has a wrong letter."""
    name = source.choice(FIELDS)
    if source.random() < 0.75:
        return name
    at = source.randrange(len(name))
    return name[:at] + source.choice(("x", "\x00", "é", "")) + name[at + 1 :]


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


async def test_any_body_is_answered_or_refused() -> None:
    source = random.Random(11)
    statuses: dict[str, set[int]] = {path: set() for path in PATHS}
    async with http_harness() as server:
        for _ in range(1500):
            path = source.choice(list(PATHS))
            body = dict(source.choice(PATHS[path]))
            for _ in range(source.choice((1, 1, 1, 2, 4))):
                body[any_name(source)] = any_value(source)
            answer = await server.post(path, body)
            statuses[path].add(answer.status_code)
            assert answer.status_code in (200, 400, 404, 409), (path, body, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]
    for path, seen in statuses.items():
        assert {200, 400} <= seen, path


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (RESPONSES, {"temperature": "hot"}, "temperature", "wrong_type"),
        (RESPONSES, {"input": [{"role": 3, "content": "a"}]}, "input[0].role", "wrong_type"),
        (
            COMPLETIONS,
            {"prompt": "a", "response_format": {"type": 3}},
            "response_format.type",
            "not_one_of",
        ),
        (
            COMPLETIONS,
            {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": 3}},
            "response_format.json_schema",
            "wrong_type",
        ),
        ("/detokenize", {"tokens": "a"}, "tokens", "wrong_type"),
    ],
)
async def test_each_error_is_reported_once(
    path: str, body: dict[str, Any], param: str, code: str
) -> None:
    async with http_harness() as server:
        refused = await server.refused(path, {"model": "base", "input": "a", **body})
        assert refused.violations == {param: code}
