"""Large bodies are refused by the size of their lists, before anything in them is read."""

from __future__ import annotations

import gc
import json
import re
import time
import weakref
from typing import Any

import pytest
from servers.http_harness import HttpHarness, Refused, http_harness
from servers.limits_of_bodies import body_of, places

from turret.server import errors
from turret.server.http.bodies.fields import Fields, is_longer
from turret.server.http.exchange import endpoint
from turret.server.http.exchange.body import MAX_BODY_BYTES, parse
from turret.server.http.exchange.shape import MAX_CONTAINERS, MAX_ENTRIES

JSON = {"content-type": "application/json"}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TURN = {"role": "user", "content": "a"}


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
def test_parsing_takes_time_that_grows_with_the_bytes(data: bytes) -> None:
    """4 MiB take milliseconds; of what grew with the square of the size they took hours."""
    start = time.thread_time()
    with pytest.raises(errors.InvalidRequestError):
        parse(data)
    assert time.thread_time() - start < 3


async def test_no_list_is_read_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is told by its field, and not one object was made of the request's fields."""
    made = []
    original = Fields.__init__

    def counted(self: Fields, *args: Any) -> None:
        made.append(self)
        original(self, *args)

    monkeypatch.setattr(Fields, "__init__", counted)
    async with http_harness() as server:
        for place in places():
            content = body_of(place, place.most + 1, most_bytes=MAX_BODY_BYTES)
            answer = await server.client.post(place.path, content=content, headers=JSON)
            refused = Refused.of(answer)
            assert (refused.status, refused.param) == (400, place.blamed), place
            said = f"at most {place.most} entries, not {place.most + 1}"
            assert refused.message == f"{place.blamed}: {said}"
    assert made == []


async def test_what_has_no_limit_of_its_own_has_the_common_one() -> None:
    async with http_harness() as server:
        for name in ("x", "user"):
            body = {"model": "base", "prompt": "a", name: [0] * (MAX_ENTRIES + 1)}
            refused = await server.refused(COMPLETIONS, body)
            assert (refused.status, refused.param) == (400, name)
        body = {f"x{number}": 0 for number in range(MAX_ENTRIES + 1)}
        assert (await server.refused(COMPLETIONS, body)).status == 400
        for many in (b"[],", b"{},", b"[[[]]],"):
            content = b'{"model": "base", "x": [%b0]}' % (many * 500_000)
            answer = await server.client.post(COMPLETIONS, content=content, headers=JSON)
            assert answer.status_code == 400
        calls = [{"role": "assistant", "tool_calls": [{}] * 128}] * (MAX_CONTAINERS // 128)
        refused = await server.refused(CHAT, {"model": "base", "messages": calls})
        said = f"the body holds more than {MAX_CONTAINERS} lists and objects"
        assert (refused.status, refused.message) == (400, said)


def test_a_text_may_hold_any_number_of_brackets() -> None:
    """Which parser reads it makes no difference but in time."""
    text = '[{"a": [1, -2.5e3, true, null, "\\u00e9"]}]' * 20_000
    body = {"prompt": text, "n": [1, 2.5, -1e3, True, None, {"a": {}, "b": []}], "é": "😀"}
    for is_ascii in (True, False):
        data = json.dumps(body, ensure_ascii=is_ascii).encode()
        assert parse(data) == body
    for bad in (b'{"a": [1,]}', b'{"a" 1}', b'{"a": NaN}', b'{"a": "\x00"}', b'{"a": 1} x'):
        with pytest.raises(errors.InvalidRequestError) as quick:
            parse(bad)
        with pytest.raises(errors.InvalidRequestError) as careful:
            parse(bad[:1] + b'"x": "' + b"[" * 40_000 + b'", ' + bad[1:])
        said = [re.sub(r"[0-9]+", "", str(each.value)) for each in (quick, careful)]
        assert said[0] == said[1]


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


@pytest.mark.parametrize(
    ("path", "sent", "param"),
    [
        (COMPLETIONS, {"model": "+".join(f"m{n}" for n in range(65))}, "model"),
        (COMPLETIONS, {"model": "sql" + " " * 100_000}, "model"),
        (COMPLETIONS, {"model": "sql*0." + "0" * 100_000 + "1"}, "model"),
        (COMPLETIONS, {"guided_json": {"enum": ["x" * 100] * 700}}, "guided_json"),
        (RESPONSES, {"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        (RESPONSES, {"metadata": {"a": "x" * 20_000}}, "metadata"),
        (RESPONSES, {"user": "x" * 600}, "user"),
        (
            RESPONSES,
            {"text": {"format": {"type": "json_object", "x": "x" * 70_000}}},
            "text.format",
        ),
    ],
)
async def test_what_is_repeated_or_compiled_is_bounded(
    path: str, sent: dict[str, Any], param: str
) -> None:
    async with http_harness() as server:
        name = "prompt" if path == COMPLETIONS else "input"
        refused = await server.refused(path, {"model": "base", name: "a", **sent})
        assert (refused.status, refused.param) == (400, param)
        assert len(refused.message) < 500


def test_a_value_is_measured_without_writing_it() -> None:
    for value in ("abc", ["a", "b"], {"a": [1]}, [], 1, [[[[]]]], {"ab": {"c": "d"}}):
        size = len(json.dumps(value, separators=(",", ":")))
        assert not is_longer(value, size)
        assert is_longer(value, 0)
    assert is_longer([0] * 101, 100)
    assert is_longer({"x" * 101: 0}, 100)


class _Body(dict[str, Any]):
    """A body whose end can be seen."""


async def _post_and_watch(
    server: HttpHarness, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, bool]:
    """The status of the answer, and whether the body was freed without the garbage collector."""
    found: list[weakref.ref[_Body]] = []
    read = endpoint.read_json

    async def watched(*args: Any) -> tuple[dict[str, Any], int]:
        parsed, size = await read(*args)
        kept = _Body(parsed)
        found.append(weakref.ref(kept))
        return kept, size

    gc.collect()
    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(endpoint, "read_json", watched)
            answer = await server.post(path, body)
            await server.settle()
        return answer.status_code, found[0]() is None
    finally:
        gc.enable()


async def test_nothing_of_a_body_is_held_after_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with http_harness() as server:
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
            got = await _post_and_watch(server, path, body, monkeypatch)
            assert got == (status, True), (path, body)
        server.engine.refuse = errors.QueueFullError("full")
        body = {"model": "base", "prompt": "a"}
        assert await _post_and_watch(server, COMPLETIONS, body, monkeypatch) == (429, True)
        server.engine.refuse = RuntimeError("a bug")
        status, _ = await _post_and_watch(server, COMPLETIONS, body, monkeypatch)
        assert status == 500
