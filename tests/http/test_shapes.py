"""Large bodies are rejected for the size of their lists, before their entries are read."""

from __future__ import annotations

import gc
import json
import time
import weakref
from typing import Any

import pytest
from servers.http_harness import HttpHarness, Refused
from servers.limits_of_bodies import body_of, places, with_others

from turret.server import errors
from turret.server.http import endpoint
from turret.server.http.endpoint import MAX_BODY_BYTES, MAX_CONTAINERS, parse
from turret.server.http.fields import MAX_PROMPTS, is_longer, read
from turret.server.http.request_models import CompletionRequest

JSON = {"content-type": "application/json"}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
LIMITED = ("too_many_entries", "too_long")


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":"' + b'\\"' * (MAX_BODY_BYTES // 2),
        b'{"a":"' + b'\\"' * 100 + b"[" * MAX_BODY_BYTES,
        b'{"a":' + b"[" * MAX_BODY_BYTES,
        b'{"a":' + b'{"a":' * (MAX_BODY_BYTES // 5),
        b'{"a":"' + b"\\" * MAX_BODY_BYTES,
        b'{"a":[' + b'"",' * (MAX_BODY_BYTES // 3),
        b'{"a":' + b"9" * MAX_BODY_BYTES + b"}",
        b'{"a":' + b" " * MAX_BODY_BYTES,
    ],
    ids=("quotes", "brackets in a string", "lists", "objects", "escapes", "texts", "digits", "_"),
)
def test_parsing_takes_linear_time(data: bytes) -> None:
    """4 MiB take milliseconds; quadratic time would take hours."""
    start = time.thread_time()
    with pytest.raises(errors.InvalidRequestError):
        parse(data)
    assert time.thread_time() - start < 3


async def test_each_list_has_its_limit(http: HttpHarness) -> None:
    large = set()
    for place in places():
        # A million token ids take a while, and the same type reads them everywhere.
        if place.most > 10_000 and place.most in large:
            continue
        large.add(place.most)
        entry = b'"a"' if place.most == MAX_PROMPTS else b"0"
        content = body_of(place, place.most + 1, most_bytes=MAX_BODY_BYTES, entry=entry)
        content = with_others(place, content) if len(content) < MAX_BODY_BYTES // 2 else content
        answer = await http.client.post(place.path, content=content, headers=JSON)
        refused = Refused.of(answer)
        assert refused.status == 400, place
        # The first invalid entry may be found before the end of the list.
        assert any(
            path.startswith(f"{place.blamed}[") or (path == place.blamed and code in LIMITED)
            for path, code in refused.violations.items()
        ), place


async def test_the_number_of_lists_and_objects_has_a_limit(http: HttpHarness) -> None:
    for many in (b"[],", b"{},", b"[[[]]],"):
        content = b'{"model": "base", "x": [%b0]}' % (many * 500_000)
        answer = await http.client.post(COMPLETIONS, content=content, headers=JSON)
        assert Refused.of(answer).code == "body_too_nested"
    calls = [{"role": "assistant", "tool_calls": [{}] * 128}] * (MAX_CONTAINERS // 128)
    refused = await http.refused(CHAT, {"model": "base", "messages": calls})
    assert (refused.status, refused.code) == (400, "body_too_nested")


async def test_any_number_of_unknown_fields_is_ignored() -> None:
    for name, value in (("x", [0] * 1_000_000), ("user", ["a"] * 100_000)):
        assert read(CompletionRequest, {"model": "base", "prompt": "a", name: value}).body
    body = {f"x{number}": 0 for number in range(300_000)}
    assert read(CompletionRequest, {"model": "base", "prompt": "a", **body}).body


def test_a_text_may_hold_any_number_of_brackets() -> None:
    """The limit is on lists and objects; brackets in strings do not count."""
    text = '[{"a": [1, -2.5e3, true, null, "\\u00e9"]}]' * 20_000
    body = {"prompt": text, "n": [1, 2.5, -1e3, True, None, {"a": {}, "b": []}], "é": "😀"}
    for is_ascii in (True, False):
        data = json.dumps(body, ensure_ascii=is_ascii).encode()
        assert parse(data) == body


async def test_the_longest_conversation_is_within_the_limits() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts = [{"type": "text", "text": "a"}]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": parts, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": parts},
    ]
    body = {"messages": (turns * 1366)[:4096], "model": "base"}
    assert parse(json.dumps(body).encode())["messages"] == body["messages"]


def test_a_value_is_measured_as_json_without_blanks() -> None:
    for value in ("abc", ["a", "b"], {"a": [1]}, [], 1, [[[[]]]], {"ab": {"c": "d"}}):
        size = len(json.dumps(value, separators=(",", ":")))
        assert not is_longer(value, size)
        assert is_longer(value, size - 1)
    assert is_longer([0] * 101, 100)
    assert is_longer({"x" * 101: 0}, 100)


class _Body(dict[str, Any]):
    """A body whose deallocation can be observed."""


async def _post_and_watch(
    server: HttpHarness, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, bool]:
    """The status of the answer, and whether the body was freed without the garbage collector."""
    found: list[weakref.ref[_Body]] = []
    read_json = endpoint.Exchange.read_json

    async def watched(exchange: endpoint.Exchange, model: Any) -> None:
        await read_json(exchange, model)
        sent = exchange._sent
        sent.raw = _Body(sent.raw)
        found.append(weakref.ref(sent.raw))

    gc.collect()
    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(endpoint.Exchange, "read_json", watched)
            answer = await server.post(path, body)
            await server.settle()
        return answer.status_code, found[0]() is None
    finally:
        gc.enable()


async def test_a_body_is_freed_after_its_answer(
    monkeypatch: pytest.MonkeyPatch, http: HttpHarness
) -> None:
    for path, body, status in (
        (COMPLETIONS, {"model": "base", "prompt": "a"}, 200),
        (COMPLETIONS, {"model": "base", "prompt": "a", "temperature": "x"}, 400),
        (COMPLETIONS, {"model": "Nothing!", "prompt": "a"}, 404),
        (CHAT, {"model": "base", "messages": [{}]}, 400),
        (CHAT, {"model": "base", "messages": [{"role": "", "content": "a"}]}, 400),
        (RESPONSES, {"model": "base", "input": [3]}, 400),
        ("/v1/embeddings", {"model": "base", "input": [[-1]]}, 400),
        ("/detokenize", {"tokens": ["a"]}, 400),
    ):
        got = await _post_and_watch(http, path, body, monkeypatch)
        assert got == (status, True), (path, body)
    http.engine.refuse = errors.QueueFullError("full")
    body = {"model": "base", "prompt": "a"}
    assert await _post_and_watch(http, COMPLETIONS, body, monkeypatch) == (429, True)
    http.engine.refuse = RuntimeError("a bug")
    status, _ = await _post_and_watch(http, COMPLETIONS, body, monkeypatch)
    assert status == 500
