"""The path of a stream's bytes to the connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from servers.fakes import endless, finish, saying
from servers.http_harness import HttpHarness, posted

from turret.server.engine.scheduling.request import Output, Request
from turret.server.http import endpoint

WORDS = ("one ", 'two "', "dréi\n", "four")


async def sent(http: HttpHarness, path: str, version: str = "1.1") -> bytes:
    """All bytes of a stream's response, including head and framing."""
    turns = [{"role": "user", "content": "hi"}]
    asked = {"prompt": "hi"} if path == "completions" else {"messages": turns}
    asked |= {"model": "base", "stream": True}
    return await http.answered(posted(f"/v1/{path}", asked, version, "connection: close\r\n"))


def chunks_of(answer: bytes) -> list[bytes]:
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    found = []
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        found.append(rest[:length])
        assert rest[length : length + 2] == b"\r\n"
        rest = rest[length + 2 :]
        if not length:
            assert rest == b""
            return found[:-1]


def said(events: bytes) -> str:
    parts = [part.removeprefix(b"data: ") for part in events.split(b"\n\n")]
    assert parts[-2:] == [b"[DONE]", b""]
    choices = [json.loads(part)["choices"][0] for part in parts[:-2]]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


async def test_output_that_is_available_together_is_sent_together(http: HttpHarness) -> None:
    http.engine.script = saying(*WORDS)
    for path in ("completions", "chat/completions"):
        chunks = chunks_of(await sent(http, path))
        assert said(b"".join(chunks)) == "".join(WORDS)
        # The last chunk ends the stream.
        assert len(chunks) == 2
        assert chunks[0].count(b"data: ") >= len(WORDS)


async def test_available_output_is_sent_without_waiting_for_more(http: HttpHarness) -> None:
    http.engine.script = endless
    asked = {"model": "base", "prompt": "hi", "stream": True}
    async with http.client.stream("POST", "/v1/completions", json=asked) as answer:
        first = await anext(answer.aiter_bytes())
    assert json.loads(first.removeprefix(b"data: "))["choices"][0]["text"] == "H"


async def test_an_old_client_gets_no_chunks(http: HttpHarness) -> None:
    http.engine.script = saying(*WORDS)
    answer = await sent(http, "completions", "1.0")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert said(body) == "".join(WORDS)


async def test_a_stream_waits_for_a_client_that_does_not_read_but_a_shutdown_does_not(
    http: HttpHarness,
) -> None:
    num_made = 0

    async def flood(request: Request) -> AsyncIterator[Output]:
        nonlocal num_made
        while True:
            num_made += 1
            yield Output(text="x" * (64 << 10), token_ids=(1,))
            await asyncio.sleep(0)

    http.engine.script = flood
    reader, writer = await http.opened()
    writer.write(posted("/v1/completions", {"model": "base", "prompt": "hi", "stream": True}))
    before = -1
    while num_made != before or not num_made:
        before = num_made
        await asyncio.sleep(0.2)
    # No more is computed than the sockets of both sides hold.
    assert num_made < 400
    await reader.readexactly(4 << 20)
    await asyncio.sleep(0.1)
    assert num_made > before
    await asyncio.wait_for(http.server.stop(0.1), 10)
    assert http.engine.streams[0].cancelled.is_set()
    writer.transport.abort()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
async def test_a_quiet_stream_sends_comments(
    monkeypatch: pytest.MonkeyPatch, path: str, http: HttpHarness
) -> None:
    monkeypatch.setattr(endpoint, "HEARTBEAT_SECONDS", 0.05)

    async def slow(request: Request) -> AsyncIterator[Output]:
        await asyncio.sleep(0.5)
        yield Output(text="a", token_ids=(1,), finish=finish(request))

    asked = {"model": "base", "prompt": "a", "max_tokens": 4, "stream": True}
    asked["messages"] = [{"role": "user", "content": "a"}]
    http.engine.script = slow
    answer = await http.post(path, asked)
    whole = await http.post(path, asked | {"stream": False})
    parts = answer.text.split("\n\n")
    assert parts[0] == ": still working"
    assert sum(part.startswith(":") for part in parts) >= 2
    assert any('"a"' in part for part in parts)
    assert isinstance(whole.json(), dict)
