"""HTTP connections: slow heads, TLS, changing certificates, limits of one party."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import ssl
import time
import tracemalloc
from pathlib import Path

import httpx2
import pytest
from said import says
from servers.certificates import LOCAL, certify
from servers.fakes import endless
from servers.http_harness import HttpHarness, Refused, http_harness

from turret.server.api.access import MessageMemory, Shares, TokenTable
from turret.server.config import ListenConfig, SecurityConfig
from turret.server.http import connection, models
from turret.server.http.connection import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_SENT_AHEAD,
    Connection,
)
from turret.server.http.server import HttpServer

PROMPT = {"model": "base", "prompt": "a"}
COMPLETIONS = "/v1/completions"


CHUNKED = b"transfer-encoding: chunked\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


async def opened(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\n", b"\x00"])
async def test_a_connection_without_request_headers_is_closed(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    async with http_harness() as server:
        reader, writer = await opened(server.server.address)
        writer.write(sent)
        await asyncio.wait_for(reader.read(), 10)
        writer.close()


async def test_small_writes_are_sent_without_delay() -> None:
    async with http_harness() as server:
        reader, writer = await opened(server.server.address)
        writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"}"), 10)
        assert server.server._server is not None
        (accepted,) = server.server._server.server_state.connections
        found = accepted.transport.get_extra_info("socket")
        assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        writer.close()


async def test_request_headers_have_a_size_limit() -> None:
    async with http_harness() as server:
        assert (await server.client.get("/health", headers={"x": "y" * 8000})).status_code == 200
        answer = await server.client.get("/health", headers={"x": "y" * MAX_HEAD_BYTES})
        assert (answer.status_code, Refused.of(answer).code) == (431, "head_too_large")
        reader, writer = await opened(server.server.address)
        writer.write(b"GET /health HTTP/1.1\r\nx: " + b"y" * 300_000)
        assert b" 400 " in await asyncio.wait_for(reader.readline(), 10)
        writer.close()


async def test_only_request_headers_have_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer, or a connection that waits for its next request, has no such limit."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    ask = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    async with http_harness() as server:
        reader, writer = await opened(server.server.address)
        for _ in range(2):
            writer.write(ask)
            await asyncio.wait_for(reader.readuntil(b"}"), 10)
            await asyncio.sleep(0.5)
        # Send half a head on a connection that has had answers.
        writer.write(ask[:9])
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
        server.engine.script = endless
        asking = asyncio.ensure_future(server.post(COMPLETIONS, PROMPT))
        await asyncio.wait_for(server.engine.submitted.wait(), 10)
        await asyncio.sleep(0.5)
        assert not asking.done()
        asking.cancel()


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``{first,second,client}.{crt,key}``, self-signed for localhost."""
    folder = tmp_path_factory.mktemp("pem")
    for name in ("first", "second", "client"):
        certify(folder, name, LOCAL)
    return folder


def use(pem: Path, folder: Path, name: str) -> None:
    """Replace the server's key pair, like a renewal."""
    for kind in ("crt", "key"):
        shutil.copy(pem / f"{name}.{kind}", folder / f"new.{kind}")
        os.replace(folder / f"new.{kind}", folder / f"server.{kind}")


async def status_of(address: str, roots: Path, certificate: Path | None = None) -> int:
    context = ssl.create_default_context(cafile=str(roots))
    if certificate is not None:
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    async with httpx2.AsyncClient(verify=context) as client:
        return (await client.get(f"https://{address}/health")).status_code


async def test_tls_and_certificates_that_change(pem: Path, tmp_path: Path) -> None:
    use(pem, tmp_path, "first")
    security = SecurityConfig(tls_cert=tmp_path / "server.crt", tls_key=tmp_path / "server.key")
    async with http_harness(security=security) as server:
        address = server.server.address
        assert await status_of(address, pem / "first.crt") == 200
        with pytest.raises(httpx2.ConnectError):
            await status_of(address, pem / "second.crt")
        use(pem, tmp_path, "second")
        assert await status_of(address, pem / "second.crt") == 200
        with pytest.raises(httpx2.ConnectError):
            await status_of(address, pem / "first.crt")
        (tmp_path / "server.crt").write_text("no certificate")
        assert await status_of(address, pem / "second.crt") == 200


async def test_a_handshake_takes_little_memory(pem: Path) -> None:
    security = SecurityConfig(tls_cert=pem / "first.crt", tls_key=pem / "first.key")
    async with http_harness(security=security) as server:
        assert await status_of(server.server.address, pem / "first.crt") == 200
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            opening = [await opened(server.server.address) for _ in range(50)]
            # The server has accepted all of them once it answers one that came later.
            assert await status_of(server.server.address, pem / "first.crt") == 200
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 50 * (100 << 10)
        for _, writer in opening:
            writer.close()


async def test_a_handshake_that_never_ends_is_timed_out(
    pem: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is accepted, but the handshake never completes."""
    monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 0.1)
    # The server sets this for the whole process: restore it after the test.
    monkeypatch.setattr(asyncio.constants, "SSL_HANDSHAKE_TIMEOUT", 60.0)
    security = SecurityConfig(tls_cert=pem / "first.crt", tls_key=pem / "first.key")
    async with http_harness(security=security) as server:
        reader, writer = await opened(server.server.address)
        assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()


async def test_a_client_certificate_is_required(pem: Path, tmp_path: Path) -> None:
    use(pem, tmp_path, "first")
    roots = tmp_path / "roots.crt"
    shutil.copy(pem / "client.crt", roots)
    security = SecurityConfig(
        tls_cert=tmp_path / "server.crt", tls_key=tmp_path / "server.key", tls_client_ca=roots
    )
    async with http_harness(security=security) as server:
        address = server.server.address
        own = pem / "client.crt"
        assert await status_of(address, pem / "first.crt", own) == 200
        for certificate in (None, pem / "second.crt"):
            with pytest.raises(httpx2.TransportError):
                await status_of(address, pem / "first.crt", certificate)
        # With another authority, only clients that it signed are accepted.
        shutil.copy(pem / "second.crt", tmp_path / "new")
        os.replace(tmp_path / "new", roots)
        assert await status_of(address, pem / "first.crt", pem / "second.crt") == 200
        with pytest.raises(httpx2.TransportError):
            await status_of(address, pem / "first.crt", own)


async def test_mismatched_tls_files_prevent_startup(pem: Path) -> None:
    security = SecurityConfig(tls_cert=pem / "first.crt", tls_key=pem / "second.key")
    with pytest.raises(OSError, match=r"(?i)mismatch"):
        async with http_harness(security=security):
            pass


async def test_an_address_in_use_prevents_startup() -> None:
    async with http_harness() as server:
        taken = ListenConfig(http_address=server.server.address)
        with pytest.raises(OSError, check=says("ADDRESS_UNUSABLE")):
            async with http_harness(listen=taken):
                pass
        assert isinstance(server.server, HttpServer)


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
async def test_a_malformed_host_is_rejected(host: str, status: int) -> None:
    async with http_harness() as server:
        answer = await server.client.get("/health", headers={"host": host})
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
async def test_a_request_must_have_exactly_one_host(head: bytes, status: int) -> None:
    async with http_harness() as server:
        sent = b"GET /health HTTP/" + head + b"connection: close\r\n\r\n"
        assert (await answered(server, sent)).split()[1] == str(status).encode()


async def answered(server: HttpHarness, sent: bytes) -> bytes:
    """All bytes that arrive until the server closes the connection."""
    reader, writer = await opened(server.server.address)
    writer.write(sent)
    try:
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


@pytest.mark.parametrize(
    "head",
    [
        CHUNKED + b"content-length: 5\r\n",
        b"content-length: 5\r\n" + CHUNKED,
        b"content-length: 5\r\ncontent-length: 6\r\n",
        b"transfer-encoding: gzip\r\n",
    ],
)
async def test_a_body_with_two_lengths_is_rejected(head: bytes) -> None:
    """A proxy in front may use the other length, and treat the rest as a request."""
    async with http_harness() as server:
        answer = await answered(server, POST + head + b"\r\n0\r\n\r\n" + b"GET /health HTTP/1.1")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"HTTP/1.1") == 1
        assert server.engine.requests == []


async def test_trailers_do_not_count_as_headers() -> None:
    tokens = TokenTable([("a", frozenset({"inference"}))])
    async with http_harness(tokens=tokens) as server:
        body = b"2\r\n{}\r\n0\r\nauthorization: Bearer a\r\n\r\n"
        answer = await answered(server, POST + CHUNKED + b"connection: close\r\n\r\n" + body)
        assert answer.startswith(b"HTTP/1.1 401 ")


async def test_nothing_is_parsed_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client can read the answer, and the rest of its body is dropped."""
    monkeypatch.setattr(connection, "LINGER_SECONDS", 1.0)
    num_parsed = 0
    parse = Connection.on_body

    def counted(self: Connection, body: bytes) -> None:
        nonlocal num_parsed
        num_parsed += len(body)
        parse(self, body)

    monkeypatch.setattr(Connection, "on_body", counted)
    tokens = TokenTable([("a", frozenset({"inference"}))])
    async with http_harness(tokens=tokens) as server:
        reader, writer = await opened(server.server.address)
        writer.write(POST + CHUNKED + b"\r\n" + b"1\r\n \r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert head.startswith(b"HTTP/1.1 401 ")
        assert b"connection: close" in head
        for _ in range(10):
            writer.write(b"1\r\n \r\n" * 20_000)
            await writer.drain()
        assert await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert num_parsed < 10


async def test_a_client_that_keeps_sending_after_a_rejection_is_disconnected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "LINGER_BYTES", 1 << 20)
    tokens = TokenTable([("a", frozenset({"inference"}))])
    async with http_harness(tokens=tokens) as server:
        reader, writer = await opened(server.server.address)
        writer.write(POST + CHUNKED + b"\r\n")
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        await _drained(writer, b"x" * (64 << 20))
        with pytest.raises(ConnectionError):
            await reader.readexactly(1 << 20)
        writer.close()


async def test_a_body_in_tiny_chunks_is_limited_and_does_not_delay_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_parsed = 0
    feed = Connection._feed

    def counted(self: Connection, data: bytes) -> None:
        nonlocal num_parsed
        num_parsed += len(data)
        feed(self, data)

    async with http_harness() as server:
        _, writer = await opened(server.server.address)
        delays: list[float] = []
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "_feed", counted)
            writer.write(POST + CHUNKED + b"\r\n")
            sending = asyncio.ensure_future(_drained(writer, b"1\r\n \r\n" * 4_000_000))
            while not sending.done():
                start = time.monotonic()
                assert (await server.client.get("/health")).status_code == 200
                delays.append(time.monotonic() - start)
        # The client sent 24 MB.
        assert num_parsed < 6_000_000
        assert max(delays) < 2
        writer.close()
        # Only the bytes count, not the chunks.
        body = b"".join(b"1\r\n%c\r\n" % byte for byte in json.dumps(PROMPT).encode())
        answer = await answered(
            server, POST + CHUNKED + b"connection: close\r\n\r\n" + body + b"0\r\n\r\n"
        )
        assert answer.startswith(b"HTTP/1.1 200 ")


async def _drained(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        for at in range(0, len(data), 1 << 18):
            writer.write(data[at : at + (1 << 18)])
            await writer.drain()


async def test_requests_sent_ahead_are_answered_in_order() -> None:
    body = json.dumps({**PROMPT, "stream": True}).encode()
    asked = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    last = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    async with http_harness() as server:
        answer = await answered(server, asked * 3 + last)
        assert answer.count(b"HTTP/1.1 200 OK") == 4
        assert answer.count(b"data: [DONE]") == 3
        assert answer.endswith(b'{"status":"ok"}')


async def test_few_requests_may_be_sent_ahead() -> None:
    ask = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    body = json.dumps({**PROMPT, "stream": True}).encode()
    first = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    async with http_harness() as server:
        answer = await answered(server, first + ask * 5000)
        # The connection is closed after the answers to the first request and those sent ahead.
        assert answer.count(b"HTTP/1.1 200 OK") == 1 + MAX_SENT_AHEAD
        assert answer.count(b"connection: close") == 1
        assert b"data: [DONE]" in answer
        # In turn, a connection may have any number of requests.
        reader, writer = await opened(server.server.address)
        for _ in range(2 * MAX_SENT_AHEAD):
            writer.write(ask)
            await asyncio.wait_for(reader.readuntil(b"}"), 10)
        writer.close()


async def test_a_client_that_leaves_ends_its_request_before_one_sent_ahead() -> None:
    body = json.dumps({**PROMPT, "stream": True}).encode()
    ask = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    async with http_harness() as server:
        server.engine.script = endless
        _, writer = await opened(server.server.address)
        writer.write(POST + b"content-length: %d\r\n\r\n" % len(body) + body + ask)
        await asyncio.wait_for(server.engine.submitted.wait(), 10)
        writer.transport.abort()
        await asyncio.wait_for(server.settle(), 10)


async def test_a_request_may_have_few_headers() -> None:
    async with http_harness() as server:
        for count, status in ((MAX_HEADERS - 2, b" 200 "), (MAX_HEADERS - 1, b" 400 ")):
            reader, writer = await opened(server.server.address)
            headers = b"host: localhost\r\nconnection: close\r\n" + b"x: y\r\n" * count
            writer.write(b"GET /health HTTP/1.1\r\n" + headers + b"\r\n")
            assert status in await asyncio.wait_for(reader.read(), 10)
            writer.close()


async def test_bodies_that_never_end_take_a_bounded_amount_of_memory() -> None:
    """One token has half of it; short bodies are accepted even when nothing is left."""
    tokens = TokenTable([(name, frozenset({"inference"})) for name in ("alice", "bob")])
    messages = MessageMemory(2 << 20)
    shares = Shares(separates_tokens=True, messages=messages)
    async with http_harness(tokens=tokens, shares=shares) as server:

        async def begun(name: str, size: int) -> bytes | None:
            """The status of a request that lacks its last byte; None if it waits for that."""
            reader, writer = await opened(server.server.address)
            head = (
                f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {name}"
                f"\r\ncontent-type: application/json\r\ncontent-length: {size + 1}\r\n\r\n"
            )
            writer.write(head.encode() + b" " * size)
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
    tokens = TokenTable([(name, frozenset({"inference"})) for name in ("alice", "bob")])
    messages = MessageMemory(40 << 20)
    shares = Shares(separates_tokens=True, messages=messages)
    async with http_harness(tokens=tokens, shares=shares) as server:
        writers: list[asyncio.StreamWriter] = []

        async def unread(name: str) -> bytes:
            """The status of an answer whose rest nobody reads."""
            reader, writer = await opened(server.server.address)
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


async def test_the_body_of_a_get_is_not_waited_for() -> None:
    async with http_harness() as server:
        reader, writer = await opened(server.server.address)
        head = b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n"
        writer.write(head + b"x" * 500_000)
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)
        writer.close()
