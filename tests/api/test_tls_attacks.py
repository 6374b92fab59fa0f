"""Attacks on TLS over both protocols: old versions, weak ciphers, wrong certificates."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pickle
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from grpc import StatusCode as Code
from grpc import aio, ssl_channel_credentials
from servers.certificates import LOCAL, certify
from servers.http_harness import http_harness
from servers.rpc_harness import failure_of, harness

from turret.server.api.access import TokenTable, WatchedFiles
from turret.server.config import SecurityConfig
from turret.v1 import inference_pb2, inference_pb2_grpc

_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
_GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
SECONDS = 10.0


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca`` and ``other`` are authorities.

    The remaining certificates are signed by one of them or self-signed.
    """
    folder = tmp_path_factory.mktemp("attacks")
    for name in ("ca", "other", "alone"):
        certify(folder, name)
    for name, authority, days, usage in (
        ("server", "ca", 2, "serverAuth"),
        ("client", "ca", 2, "clientAuth"),
        ("stranger", "other", 2, "clientAuth"),
        # A certificate that expires at once.
        ("expired", "ca", 0, "clientAuth"),
        # A server's certificate: another server of the same owner must not act as a client.
        ("purpose", "ca", 2, "serverAuth"),
    ):
        certify(folder, name, LOCAL, f"extendedKeyUsage={usage}", authority=authority, days=days)
    return folder


@contextlib.asynccontextmanager
async def grpc_server(security: SecurityConfig) -> AsyncIterator[str]:
    async with harness(security=security) as server:
        yield server.rpc.address


@contextlib.asynccontextmanager
async def http_server(security: SecurityConfig) -> AsyncIterator[str]:
    async with http_harness(security=security) as server:
        yield server.server.address


SERVERS = pytest.mark.parametrize("start", [grpc_server, http_server])


def secured(pem: Path, *, mutual: bool) -> SecurityConfig:
    authority = pem / "ca.crt" if mutual else None
    return SecurityConfig(
        tls_cert=pem / "server.crt", tls_key=pem / "server.key", tls_client_ca=authority
    )


def context_of(pem: Path, start: Any, certificate: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pem / "ca.crt"))
    context.set_alpn_protocols(["h2"] if start is grpc_server else ["http/1.1"])
    if certificate is not None:
        context.load_cert_chain(pem / f"{certificate}.crt", pem / f"{certificate}.key")
    return context


async def is_served(address: str, start: Any, context: ssl.SSLContext | None) -> bool:
    """Whether the server answers in its protocol after such a handshake."""
    host, _, port = address.rpartition(":")
    name = host if context is not None else None
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection(
                host, int(port), ssl=context, server_hostname=name
            )
            try:
                writer.write(_GREETING if start is grpc_server else _GET)
                await writer.drain()
                found = await reader.readexactly(9)
            finally:
                writer.transport.abort()
    except (OSError, EOFError):
        return False
    # A SETTINGS frame, or the beginning of an answer; anything else may be an alert.
    return found[3] == 4 if start is grpc_server else found == b"HTTP/1.1 "


@SERVERS
async def test_only_new_versions_and_strong_ciphers_are_accepted(pem: Path, start: Any) -> None:
    async with start(secured(pem, mutual=False)) as address:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = context_of(pem, start)
            context.minimum_version = context.maximum_version = version
            assert await is_served(address, start, context), version
        for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            context = context_of(pem, start)
            context.set_ciphers("ALL:@SECLEVEL=0")
            with pytest.warns(DeprecationWarning, match="TLSVersion"):
                context.minimum_version = context.maximum_version = version
            assert not await is_served(address, start, context), version
        for ciphers in ("aNULL", "eNULL"):
            context = context_of(pem, start)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
            assert not await is_served(address, start, context), ciphers


@SERVERS
async def test_plain_text_on_a_tls_port_is_not_answered(pem: Path, start: Any) -> None:
    async with start(secured(pem, mutual=False)) as address:
        assert not await is_served(address, start, None)
        # Later clients are not affected.
        assert await is_served(address, start, context_of(pem, start))


@SERVERS
async def test_only_client_certificates_of_the_authority_are_accepted(
    pem: Path, start: Any
) -> None:
    async with start(secured(pem, mutual=True)) as address:
        assert await is_served(address, start, context_of(pem, start, "client"))
        for refused in (None, "stranger", "alone", "expired", "purpose"):
            context = context_of(pem, start, refused)
            assert not await is_served(address, start, context), refused
        assert await is_served(address, start, context_of(pem, start, "client"))


def _resumed(
    address: str, start: Any, context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> tuple[bool, ssl.SSLSession] | None:
    """Whether the server resumed the session, and the next session; None for a rejected client."""
    host, _, port = address.rpartition(":")
    try:
        with (
            socket.create_connection((host, int(port)), SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host, session=session) as secure,
        ):
            # The tickets of TLS 1.3 arrive with the answer.
            secure.sendall(_GREETING if start is grpc_server else _GET)
            if not secure.recv(9) or secure.session is None:
                return None
            return bool(secure.session_reused), secure.session
    except OSError:
        return None


@SERVERS
async def test_no_session_outlives_the_authority_that_admitted_its_client(
    pem: Path, start: Any, tmp_path: Path
) -> None:
    authorities = tmp_path / "authorities.crt"
    authorities.write_bytes((pem / "ca.crt").read_bytes())
    security = dataclasses.replace(secured(pem, mutual=True), tls_client_ca=authorities)
    versions = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
    async with start(security) as address:
        kept = []
        for version in versions:
            context = context_of(pem, start, "client")
            context.minimum_version = context.maximum_version = version
            begun = await asyncio.to_thread(_resumed, address, start, context)
            assert begun is not None
            again = await asyncio.to_thread(_resumed, address, start, context, begun[1])
            assert again is not None
            assert again[0], version
            kept.append((context, again[1]))
        authorities.unlink()
        authorities.write_bytes((pem / "other.crt").read_bytes())
        for context, session in kept:
            found = await asyncio.to_thread(_resumed, address, start, context, session)
            assert found is None, context.maximum_version
        assert await is_served(address, start, context_of(pem, start, "stranger"))


async def test_a_certificate_gives_no_role(pem: Path, tmp_path: Path) -> None:
    """A client with a certificate, but without a token of the right role, is rejected."""
    path = tmp_path / "tokens"
    path.write_text("operator admin\n")
    path.chmod(0o600)
    tokens, security = TokenTable.read(path), secured(pem, mutual=True)
    own = [(pem / f"client.{kind}").read_bytes() for kind in ("key", "crt")]
    credentials = ssl_channel_credentials((pem / "ca.crt").read_bytes(), *own)
    expected = {None: Code.UNAUTHENTICATED, "guess": Code.UNAUTHENTICATED}
    expected |= {"operator": Code.PERMISSION_DENIED}
    async with (
        harness(security=security, tokens=tokens) as server,
        aio.secure_channel(server.rpc.address, credentials) as channel,
    ):
        stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[arg-type]
        for token, code in expected.items():
            metadata = () if token is None else (("authorization", f"Bearer {token}"),)
            call = stub.GetModel(inference_pb2.GetModelRequest(), metadata=metadata)
            assert (await failure_of(call)).code is code
    async with http_harness(security=security, tokens=tokens) as server:
        context = context_of(pem, http_server, "client")
        async with httpx2.AsyncClient(verify=context) as client:
            for token, status in ((None, 401), ("guess", 401), ("operator", 403)):
                headers = {} if token is None else {"authorization": f"Bearer {token}"}
                answer = await client.get(
                    f"https://{server.server.address}/v1/models", headers=headers
                )
                assert answer.status_code == status


# The stored content of a token file, and its replacement while the server runs.


def test_a_table_holds_no_token() -> None:
    table = TokenTable([("alpha-secret", frozenset({"inference"}))])
    assert table.roles_of("alpha-secret") == {"inference"}
    assert b"alpha" not in pickle.dumps(table)


def test_a_fifo_in_place_of_the_token_file_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token_file = tmp_path / "tokens"
    token_file.write_text("alpha-secret inference")
    files = WatchedFiles((token_file,), lambda: TokenTable.read(token_file), "tokens")
    token_file.unlink()
    os.mkfifo(token_file)
    for _ in range(2):
        assert not files.look()
        assert "cannot read the tokens again" in caplog.text
        assert files.newest.roles_of("alpha-secret") == {"inference"}
        # SIGHUP has the same effect.
        files.forget()
        caplog.clear()
    token_file.unlink()
    token_file.write_text("delta-secret admin")
    assert files.look()
    assert files.newest.roles_of("delta-secret") == {"admin"}
    assert files.newest.roles_of("alpha-secret") is None


def test_files_that_could_not_be_read_are_read_later(tmp_path: Path) -> None:
    """Otherwise, a token that was deleted during a shortage would stay valid."""
    token_file = tmp_path / "tokens"
    token_file.write_text("alpha-secret inference\n")
    shortages = list[MemoryError]()

    def read() -> TokenTable:
        if shortages:
            raise shortages.pop()
        return TokenTable.read(token_file)

    files = WatchedFiles((token_file,), read, "tokens")
    token_file.write_text("beta-secret inference\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert not files.look()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert files.look()
    assert files.newest.roles_of("alpha-secret") is None
    shortages.append(MemoryError())
    token_file.write_text("gamma-secret inference\n")
    assert not files.look()
    assert files.look()
    assert files.newest.roles_of("gamma-secret") == {"inference"}


def test_a_file_with_the_size_and_time_of_its_predecessor_is_read(tmp_path: Path) -> None:
    token_file = tmp_path / "tokens"
    token_file.write_text("alpha-secret inference")
    os.utime(token_file, (1, 1))
    files = WatchedFiles((token_file,), lambda: TokenTable.read(token_file), "tokens")
    changed = token_file.stat().st_ctime_ns
    # The kernel's time advances every few milliseconds.
    while token_file.stat().st_ctime_ns == changed:
        token_file.write_text("gamma-secret inference")
        os.utime(token_file, (1, 1))
    assert files.look()
    assert files.newest.roles_of("alpha-secret") is None
