"""Bodies of any shape get an answer or a client error (4xx), never an internal error."""

from __future__ import annotations

import gzip
import json
import random
from typing import Any

import pytest
from servers.http_harness import TURNS, VALID, HttpHarness, Refused
from servers.limits_of_bodies import fields

from turret.server.http.endpoint import parse

RESPONSES = "/v1/responses"
# Path → valid bodies.
PATHS: dict[str, tuple[dict[str, Any], ...]] = {
    **{path: (body,) for path, body in VALID.items() if "pin_" not in path},
    RESPONSES: (
        VALID[RESPONSES],
        {"model": "base", "input": TURNS, "text": {"format": {"type": "json_object"}}},
    ),
    "/v1/messages": (VALID["/v1/messages"] | {"tools": []},),
    "/tokenize": ({"prompt": "a"}, {"messages": TURNS}),
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
    *("role", "content", "type", "text", "name", "weight", "generation", "json", "choice"),
    *("schema", "json_schema", "function", "parameters", "tool_calls", "arguments"),
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


async def test_any_body_is_answered_or_refused(http: HttpHarness) -> None:
    source = random.Random(11)
    statuses: dict[str, set[int]] = {path: set() for path in PATHS}
    for _ in range(1500):
        path = source.choice(list(PATHS))
        body = dict(source.choice(PATHS[path]))
        for _ in range(source.choice((1, 1, 1, 2, 4))):
            body[any_name(source)] = any_value(source)
        answer = await http.post(path, body)
        statuses[path].add(answer.status_code)
        assert answer.status_code in (200, 400, 404, 409), (path, body, answer.text)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]
    for path, seen in statuses.items():
        assert {200, 400} <= seen, path


PATH = "/v1/completions"
JSON = {"content-type": "application/json"}
TEXT = json.dumps({"model": "base", "prompt": "\u00e9"}, ensure_ascii=False)
# Compress with a fixed time, because the bytes are part of a test's name.
ZIPPED = gzip.compress(TEXT.encode(), mtime=0)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "body_not_json"),
        (TEXT[:-1].encode(), "body_not_json"),
        (TEXT.encode("utf-16"), "body_not_json"),
        (TEXT.encode("utf-32"), "body_not_json"),
        (TEXT.encode("latin-1"), "body_not_json"),
        (ZIPPED, "body_not_json"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "body_not_json"),
        (b'{"seed": NaN}', "body_not_json"),
        (b'{"a": [1,]}', "body_not_json"),
        (b'{"a": "\x00"}', "body_not_json"),
        (b'{"a": 1} x', "body_not_json"),
        # JSON can contain half of a surrogate pair, which is not a character.
        (rb'{"a": "\ud800"}', "body_not_json"),
        (rb'{"a": [{"\ude00\ud83d": 1}]}', "body_not_json"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "body_not_json"),
        (b"[1]", "body_not_object"),
    ],
)
async def test_a_body_that_is_not_json_is_rejected(
    body: bytes, code: str, http: HttpHarness
) -> None:
    refused = Refused.of(await http.client.post(PATH, content=body, headers=JSON))
    assert (refused.status, refused.code, refused.param) == (400, code, None)


def test_the_last_of_duplicate_keys_counts() -> None:
    assert parse(b'{"a": 1, "a": 2, "b": "\\ud83d\\ude00"}') == {"a": 2, "b": "😀"}


async def test_a_body_that_is_declared_to_be_compressed_is_not_read(http: HttpHarness) -> None:
    headers = JSON | {"content-encoding": "gzip"}
    answer = await http.client.post(PATH, content=TEXT.encode(), headers=headers)
    refused = Refused.of(answer)
    assert (refused.status, refused.code) == (415, "unsupported_media_type")
    same = JSON | {"content-encoding": "identity"}
    answer = await http.client.post(PATH, content=TEXT.encode(), headers=same)
    assert answer.status_code == 200


async def test_a_byte_order_mark_is_skipped(http: HttpHarness) -> None:
    answer = await http.client.post(PATH, content=TEXT.encode("utf-8-sig"), headers=JSON)
    assert answer.status_code == 200
