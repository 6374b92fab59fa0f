"""Connections over HTTP: slow heads, TLS, certificates that change, shares of one party."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import httpx2
import pytest
from servers.fakes import endless
from servers.http_harness import Refused, http_harness

from turret.server.api.access.shares import Shares
from turret.server.api.access.tokens import TokenTable
from turret.server.config import ListenConfig, SecurityConfig
from turret.server.http.exchange import connection
from turret.server.http.exchange.connection import MAX_HEAD_BYTES
from turret.server.http.server import HttpServer

PROMPT = {"model": "base", "prompt": "a"}
COMPLETIONS = "/v1/completions"


async def opened(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\n", b"\x00"])
async def test_a_head_that_does_not_come_closes_the_connection(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    async with http_harness() as server:
        reader, writer = await opened(server.server.address)
        writer.write(sent)
        await asyncio.wait_for(reader.read(), 10)
        writer.close()


async def test_a_small_write_waits_for_nothing() -> None:
    async with http_harness() as server:
        reader, writer = await opened(server.server.address)
        writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"}"), 10)
        (accepted,) = server.server._server.server_state.connections
        found = accepted.transport.get_extra_info("socket")
        assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        writer.close()


async def test_a_head_has_a_limit_of_bytes() -> None:
    async with http_harness() as server:
        assert (await server.client.get("/health", headers={"x": "y" * 8000})).status_code == 200
        answer = await server.client.get("/health", headers={"x": "y" * MAX_HEAD_BYTES})
        assert (answer.status_code, Refused.of(answer).code) == (431, "head_too_large")
        reader, writer = await opened(server.server.address)
        writer.write(b"GET /health HTTP/1.1\r\nx: " + b"y" * 300_000)
        assert b" 400 " in await asyncio.wait_for(reader.readline(), 10)
        writer.close()


async def test_only_heads_are_hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an answer that takes long, nor a connection that waits for its next request."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    ask = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    async with http_harness() as server:
        reader, writer = await opened(server.server.address)
        for _ in range(2):
            writer.write(ask)
            await asyncio.wait_for(reader.readuntil(b"}"), 10)
            await asyncio.sleep(0.5)
        # Half a head on a connection that has had answers.
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
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("pem")
    for name in ("first", "second", "client"):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
        command += ["-keyout", f"{name}.key", "-out", f"{name}.crt"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def use(pem: Path, folder: Path, name: str) -> None:
    """Put a pair in the server's place, as a renewal does."""
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


async def test_a_client_certificate_is_asked_for(pem: Path, tmp_path: Path) -> None:
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
        # Another authority: whom it signed may come in, and no one else.
        shutil.copy(pem / "second.crt", tmp_path / "new")
        os.replace(tmp_path / "new", roots)
        assert await status_of(address, pem / "first.crt", pem / "second.crt") == 200
        with pytest.raises(httpx2.TransportError):
            await status_of(address, pem / "first.crt", own)


async def test_files_that_do_not_fit_stop_the_start(pem: Path) -> None:
    security = SecurityConfig(tls_cert=pem / "first.crt", tls_key=pem / "second.key")
    with pytest.raises(OSError, match=r"(?i)mismatch"):
        async with http_harness(security=security):
            pass


async def test_an_address_in_use_stops_the_start() -> None:
    async with http_harness() as server:
        taken = ListenConfig(http_address=server.server.address)
        with pytest.raises(OSError, match="cannot listen on"):
            async with http_harness(listen=taken):
                pass
        assert isinstance(server.server, HttpServer)


async def test_a_party_has_its_share_of_answers() -> None:
    async with http_harness(shares=Shares(per_token=2)) as server:
        mine, other = {"authorization": "Bearer a"}, {"authorization": "Bearer b"}
        # More than the share in one request are answered one after the other.
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
async def test_a_host_of_an_odd_form_is_none_of_this_server(host: str, status: int) -> None:
    async with http_harness() as server:
        answer = await server.client.get("/health", headers={"host": host})
        assert answer.status_code == status


async def test_a_second_authorization_header_is_refused() -> None:
    """A proxy in front may have looked at the other one."""
    tokens = TokenTable([("a", frozenset({"inference"})), ("b", frozenset())])
    async with http_harness(tokens=tokens) as server:
        one, other = ("authorization", "Bearer a"), ("authorization", "Bearer b")
        for headers, status in (([one], 200), ([one, other], 400), ([one, one], 400)):
            answer = await server.client.get("/v1/models", headers=headers)
            assert answer.status_code == status
