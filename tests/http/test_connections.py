"""HTTP connections: slow heads, TLS, changing certificates, limits of one party."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import ssl
import struct
import time
import tracemalloc
import weakref
from pathlib import Path

import httpx2
import pytest
from servers.certificates import LOCAL, certify
from servers.fakes import endless
from servers.http_harness import HttpHarness, Refused, http_harness, posted
from servers.rpc_harness import tokens_of

from turret.server.api.access import MessageMemory, Shares, TokenTable
from turret.server.config import SecurityConfig
from turret.server.http import connection, endpoint, models
from turret.server.http import server as http_server
from turret.server.http.connection import MAX_HEAD_BYTES, MAX_HEADERS, MAX_SENT_AHEAD, Connection

PROMPT = {"model": "base", "prompt": "a"}
COMPLETIONS = "/v1/completions"


CHUNKED = b"transfer-encoding: chunked\r\n"
ASK = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\n", b"\x00"])
async def test_a_connection_without_request_headers_is_closed(
    sent: bytes, monkeypatch: pytest.MonkeyPatch, http: HttpHarness
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    await http.answered(sent)


async def test_small_writes_are_sent_without_delay(http: HttpHarness) -> None:
    reader, writer = await http.opened()
    writer.write(ASK)
    await asyncio.wait_for(reader.readuntil(b"}"), 10)
    assert http.server._server is not None
    (accepted,) = http.server._server.server_state.connections
    found = accepted.transport.get_extra_info("socket")
    assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    writer.close()


@pytest.mark.parametrize("is_reset", [False, True])
async def test_an_ended_connection_leaves_nothing_for_timers_or_the_garbage_collector(
    is_reset: bool, http: HttpHarness
) -> None:
    """Otherwise, a TLS connection would keep 70 KB until a timer or the collector frees them."""
    reader, writer = await http.opened()
    writer.write(ASK)
    await asyncio.wait_for(reader.readuntil(b"}"), 10)
    assert http.server._server is not None
    connections = http.server._server.server_state.connections
    (accepted,) = connections
    assert isinstance(accepted, Connection)
    kept = [weakref.ref(accepted), weakref.ref(accepted.cycle)]
    gc.disable()
    try:
        del accepted
        if is_reset:
            linger = struct.pack("ii", 1, 0)
            plain = writer.get_extra_info("socket")
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        for _ in range(1000):
            if all(each() is None for each in kept):
                break
            await asyncio.sleep(0.01)
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


async def test_request_headers_have_a_size_limit(http: HttpHarness) -> None:
    assert (await http.client.get("/health", headers={"x": "y" * 8000})).status_code == 200
    answer = await http.client.get("/health", headers={"x": "y" * MAX_HEAD_BYTES})
    assert (answer.status_code, Refused.of(answer).code) == (431, "head_too_large")
    reader, writer = await http.opened()
    writer.write(b"GET /health HTTP/1.1\r\nx: " + b"y" * 300_000)
    assert b" 400 " in await asyncio.wait_for(reader.readline(), 10)
    writer.close()


async def test_only_request_headers_have_a_time_limit(
    monkeypatch: pytest.MonkeyPatch, http: HttpHarness
) -> None:
    """A long answer, or a connection that waits for its next request, has no such limit."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    reader, writer = await http.opened()
    for _ in range(2):
        writer.write(ASK)
        await asyncio.wait_for(reader.readuntil(b"}"), 10)
        await asyncio.sleep(0.5)
    # Send half a head on a connection that has had answers.
    writer.write(ASK[:9])
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    http.engine.script = endless
    asking = asyncio.ensure_future(http.post(COMPLETIONS, PROMPT))
    await asyncio.wait_for(http.engine.submitted.wait(), 10)
    await asyncio.sleep(0.5)
    assert not asking.done()
    asking.cancel()


async def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "KEEP_ALIVE_SECONDS", 0.2)
    async with http_harness() as server:
        reader, writer = await server.opened()
        writer.write(ASK)
        await asyncio.wait_for(reader.readuntil(b"}"), 10)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_a_body_that_never_ends_is_timed_out(
    monkeypatch: pytest.MonkeyPatch, http: HttpHarness
) -> None:
    monkeypatch.setattr(endpoint, "BODY_SECONDS", 0.2)
    reader, writer = await http.opened()
    writer.write(posted(COMPLETIONS, PROMPT)[:-1])
    assert b" 408 " in await asyncio.wait_for(reader.readline(), 10)
    writer.close()


async def status_of(address: str, roots: Path) -> int:
    context = ssl.create_default_context(cafile=str(roots))
    async with httpx2.AsyncClient(verify=context) as client:
        return (await client.get(f"https://{address}/health")).status_code


async def test_a_handshake_takes_little_memory(tmp_path: Path) -> None:
    certify(tmp_path, "own", LOCAL)
    roots = tmp_path / "own.crt"
    security = SecurityConfig(tls_cert=roots, tls_key=tmp_path / "own.key")
    async with http_harness(security=security) as server:
        assert await status_of(server.server.address, roots) == 200
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            opening = [await server.opened() for _ in range(50)]
            # The server has accepted all of them once it answers one that came later.
            assert await status_of(server.server.address, roots) == 200
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 50 * (100 << 10)
        for _, writer in opening:
            writer.close()


async def test_a_handshake_that_never_ends_is_timed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is accepted, but the handshake never completes."""
    monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 0.1)
    # The server sets this for the whole process: restore it after the test.
    monkeypatch.setattr(connection.constants, "SSL_HANDSHAKE_TIMEOUT", 60.0)
    certify(tmp_path, "own", LOCAL)
    security = SecurityConfig(tls_cert=tmp_path / "own.crt", tls_key=tmp_path / "own.key")
    async with http_harness(security=security) as server:
        reader, writer = await server.opened()
        assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()


async def test_each_party_has_its_share_of_answers() -> None:
    async with http_harness(shares=Shares(per_token=2)) as server:
        mine, other = {"authorization": "Bearer a"}, {"authorization": "Bearer b"}
        # Answers beyond the limit in one request are computed one after the other.
        answer = await server.post(COMPLETIONS, {**PROMPT, "prompt": ["a"] * 6, "n": 2}, mine)
        assert len(answer.json()["choices"]) == 12
        server.engine.script = endless
        asking = asyncio.ensure_future(server.post(COMPLETIONS, {**PROMPT, "n": 1}, mine))
        second = asyncio.ensure_future(
            server.post(COMPLETIONS, {**PROMPT, "prompt": ["a", "b"]}, mine)
        )
        refused = Refused.of(await asyncio.wait_for(second, 10))
        assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "1"
        asking.cancel()
        await asyncio.wait({asking})
        await server.settle()
        third = asyncio.ensure_future(server.post(COMPLETIONS, PROMPT, other))
        await asyncio.sleep(0.1)
        assert not third.done()
        third.cancel()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "LOCALHOST.:80", "127.0.0.1:1", "[::1]:8000", "")),
        *((host, 421) for host in ("evil.example", "localhost:80@evil.example", ":80")),
        *((host, 421) for host in ("[::1].evil.example", "[::1", "localhost:80:90", "a/localhost")),
    ],
)
async def test_a_malformed_host_is_rejected(host: str, status: int, http: HttpHarness) -> None:
    answer = await http.client.get("/health", headers={"host": host})
    assert answer.status_code == status


async def test_a_second_authorization_header_is_refused() -> None:
    """A proxy in front may have checked the other one."""
    tokens = TokenTable([("a", frozenset({"inference"})), ("b", frozenset())])
    async with http_harness(tokens=tokens) as server:
        one, other = ("authorization", "Bearer a"), ("authorization", "Bearer b")
        key = ("x-api-key", "a")
        for headers, status in (
            *(([one], 200), ([one, other], 400), ([one, one], 400)),
            *(([key], 200), ([key, one], 200), ([key, other], 400), ([key, key], 400)),
        ):
            answer = await server.client.get("/v1/models", headers=headers)
            assert answer.status_code == status


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"1.1\r\n", 400),
        (b"1.1\r\nhost: localhost\r\nhost: localhost\r\n", 400),
        (b"1.1\r\nhost: localhost\r\nHOST: evil.example\r\n", 400),
        (b"1.1\r\nhost:\r\n", 200),
        (b"1.0\r\n", 200),
    ],
)
async def test_a_request_must_have_exactly_one_host(
    head: bytes, status: int, http: HttpHarness
) -> None:
    sent = b"GET /health HTTP/" + head + b"connection: close\r\n\r\n"
    assert (await http.answered(sent)).split()[1] == str(status).encode()


@pytest.mark.parametrize(
    "head",
    [
        CHUNKED + b"content-length: 5\r\n",
        b"content-length: 5\r\n" + CHUNKED,
        b"content-length: 5\r\ncontent-length: 6\r\n",
        b"transfer-encoding: gzip\r\n",
    ],
)
async def test_a_body_with_two_lengths_is_rejected(head: bytes, http: HttpHarness) -> None:
    """A proxy in front may use the other length, and treat the rest as a request."""
    answer = await http.answered(POST + head + b"\r\n0\r\n\r\n" + b"GET /health HTTP/1.1")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert http.engine.requests == []


async def test_trailers_do_not_count_as_headers() -> None:
    async with http_harness(tokens=tokens_of("a")) as server:
        body = b"2\r\n{}\r\n0\r\nauthorization: Bearer a\r\n\r\n"
        answer = await server.answered(POST + CHUNKED + b"connection: close\r\n\r\n" + body)
        assert answer.startswith(b"HTTP/1.1 401 ")


def sizes_of(patch: pytest.MonkeyPatch, name: str) -> list[int]:
    """The sizes of the data that a method of ``Connection`` receives from now on."""
    sizes: list[int] = []
    method = getattr(Connection, name)

    def counted(self: Connection, data: bytes) -> None:
        sizes.append(len(data))
        method(self, data)

    patch.setattr(Connection, name, counted)
    return sizes


async def test_nothing_is_parsed_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client can read the answer, and the rest of its body is dropped."""
    monkeypatch.setattr(connection, "LINGER_SECONDS", 1.0)
    parsed = sizes_of(monkeypatch, "on_body")
    async with http_harness(tokens=tokens_of("a")) as server:
        reader, writer = await server.opened()
        writer.write(POST + CHUNKED + b"\r\n" + b"1\r\n \r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert head.startswith(b"HTTP/1.1 401 ")
        assert b"connection: close" in head
        for _ in range(10):
            writer.write(b"1\r\n \r\n" * 20_000)
            await writer.drain()
        assert await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert sum(parsed) < 10


async def test_a_client_that_keeps_sending_after_a_rejection_is_disconnected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "LINGER_BYTES", 1 << 20)
    async with http_harness(tokens=tokens_of("a")) as server:
        reader, writer = await server.opened()
        writer.write(POST + CHUNKED + b"\r\n")
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        await _drained(writer, b"x" * (64 << 20))
        with pytest.raises(ConnectionError):
            await reader.readexactly(1 << 20)
        writer.close()


async def test_a_body_in_tiny_chunks_is_limited_and_does_not_delay_others(
    monkeypatch: pytest.MonkeyPatch,
    http: HttpHarness,
) -> None:
    _, writer = await http.opened()
    delays: list[float] = []
    with monkeypatch.context() as patch:
        received = sizes_of(patch, "data_received")
        writer.write(POST + CHUNKED + b"\r\n")
        sending = asyncio.ensure_future(_drained(writer, b"1\r\n \r\n" * 4_000_000))
        while not sending.done():
            start = time.monotonic()
            assert (await http.client.get("/health")).status_code == 200
            delays.append(time.monotonic() - start)
    # The client tried to send 24 MB, and the server parses what it has received before it goes on.
    assert sum(received) < 6_000_000
    assert max(received) <= 64 << 10
    assert max(delays) < 2
    writer.close()
    # Only the bytes count, not the chunks.
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in json.dumps(PROMPT).encode())
    answer = await http.answered(
        POST + CHUNKED + b"connection: close\r\n\r\n" + body + b"0\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 200 ")


async def _drained(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        for at in range(0, len(data), 1 << 18):
            writer.write(data[at : at + (1 << 18)])
            await writer.drain()


async def test_requests_sent_ahead_are_answered_in_order(http: HttpHarness) -> None:
    asked = posted(COMPLETIONS, {**PROMPT, "stream": True})
    last = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    answer = await http.answered(asked * 3 + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    assert answer.count(b"data: [DONE]") == 3
    assert answer.endswith(b'{"status":"ok"}')


async def test_few_requests_may_be_sent_ahead(http: HttpHarness) -> None:
    first = posted(COMPLETIONS, {**PROMPT, "stream": True})
    answer = await http.answered(first + ASK * 5000)
    # The connection is closed after the answers to the first request and those sent ahead.
    assert answer.count(b"HTTP/1.1 200 OK") == 1 + MAX_SENT_AHEAD
    assert answer.count(b"connection: close") == 1
    assert b"data: [DONE]" in answer
    # A connection may have any number of requests that are sent one after the other.
    reader, writer = await http.opened()
    for _ in range(2 * MAX_SENT_AHEAD):
        writer.write(ASK)
        await asyncio.wait_for(reader.readuntil(b"}"), 10)
    writer.close()


async def test_a_client_that_leaves_ends_its_request_before_one_sent_ahead(
    http: HttpHarness,
) -> None:
    http.engine.script = endless
    _, writer = await http.opened()
    writer.write(posted(COMPLETIONS, {**PROMPT, "stream": True}) + ASK)
    await asyncio.wait_for(http.engine.submitted.wait(), 10)
    writer.transport.abort()
    await asyncio.wait_for(http.settle(), 10)


async def test_a_request_may_have_few_headers(http: HttpHarness) -> None:
    for count, status in ((MAX_HEADERS - 2, b" 200 "), (MAX_HEADERS - 1, b" 400 ")):
        headers = b"host: localhost\r\nconnection: close\r\n" + b"x: y\r\n" * count
        answer = await http.answered(b"GET /health HTTP/1.1\r\n" + headers + b"\r\n")
        assert status in answer


async def test_bodies_that_never_end_take_a_bounded_amount_of_memory() -> None:
    """A bearer token may use half of the memory; short bodies are accepted even when it is full."""
    tokens = tokens_of("alice", "bob")
    messages = MessageMemory(2 << 20)
    shares = Shares(separates_tokens=True, messages=messages)
    async with http_harness(tokens=tokens, shares=shares) as server:

        async def begun(name: str, size: int) -> bytes | None:
            """The status of a request that lacks its last byte; None if the server waits for it."""
            reader, writer = await server.opened()
            bearer = f"authorization: Bearer {name}\r\n"
            writer.write(posted(COMPLETIONS, b" " * (size + 1), more=bearer)[:-1])
            writers.append(writer)
            try:
                return (await asyncio.wait_for(reader.readline(), 0.5)).split()[1]
            except TimeoutError:
                return None

        async def post(name: str, size: int) -> int:
            body = {**PROMPT, "user": "x" * size}
            headers = {"authorization": f"Bearer {name}"}
            return (await server.post(COMPLETIONS, body, headers)).status_code

        writers: list[asyncio.StreamWriter] = []
        for expected in (None, None, b"429"):
            assert await begun("alice", 500_000) == expected
        assert messages._all_held <= 1 << 20
        assert await post("alice", 500_000) == 429
        assert await post("alice", 1000) == 200
        assert await post("bob", 500_000) == 200
        for expected in (None, None, b"429"):
            assert await begun("bob", 500_000) == expected
        assert await post("bob", 1000) == 200
        for writer in writers:
            writer.close()
        await server.settle()
        assert (messages._all_held, messages._held) == (0, {})
        assert await post("alice", 500_000) == 200


async def test_answers_that_nobody_reads_take_a_bounded_amount_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "_base", lambda info: {"id": "x" * (8 << 20)})
    tokens = tokens_of("alice", "bob")
    messages = MessageMemory(40 << 20)
    shares = Shares(separates_tokens=True, messages=messages)
    async with http_harness(tokens=tokens, shares=shares) as server:
        writers: list[asyncio.StreamWriter] = []

        async def unread(name: str) -> bytes:
            """The status of an answer whose rest nobody reads."""
            reader, writer = await server.opened()
            head = f"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {name}\r\n"
            writer.write(f"{head}\r\n".encode())
            writers.append(writer)
            return (await reader.read(12))[-3:]

        assert [await unread("alice") for _ in range(4)] == [b"200", b"200", b"429", b"429"]
        assert await unread("bob") == b"200"
        for writer in writers:
            writer.transport.abort()
        await server.settle()
        assert (messages._all_held, messages._held) == (0, {})
        assert await unread("alice") == b"200"
        writers[-1].transport.abort()


async def test_the_body_of_a_get_is_not_waited_for(http: HttpHarness) -> None:
    reader, writer = await http.opened()
    head = b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n"
    writer.write(head + b"x" * 500_000)
    assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)
    writer.close()
