"""Tokens, roles, TLS, mTLS, the admin address, health and reflection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from said import says
from servers.certificates import LOCAL, certify
from servers.http_harness import http_harness
from servers.probe import is_serving
from servers.rpc_harness import bearer, failure_of, harness

from turret.clients.channel import Tls
from turret.server.api.access import TokenTable
from turret.server.config import ListenConfig, SecurityConfig
from turret.server.words import say
from turret.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

TOKENS = """
# who calls
alpha-secret inference
beta-secret admin

gamma-secret inference,admin
"""


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(TOKENS)
    path.chmod(0o600)
    return path


async def test_a_role_gives_access_only_to_its_service(token_file: Path) -> None:
    expected = {
        "alpha-secret": ("OK", "PERMISSION_DENIED"),
        "beta-secret": ("PERMISSION_DENIED", "OK"),
        "gamma-secret": ("OK", "OK"),
        "delta": ("UNAUTHENTICATED", "UNAUTHENTICATED"),
        "alpha-secre": ("UNAUTHENTICATED", "UNAUTHENTICATED"),
        "": ("UNAUTHENTICATED", "UNAUTHENTICATED"),
    }

    async def code_of(call: Any) -> str:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    async with harness(tokens=TokenTable.read(token_file)) as server:
        for token, codes in expected.items():
            metadata = bearer(token)
            model = server.inference.GetModel(inference_pb2.GetModelRequest(), metadata=metadata)
            listing = server.adapters.ListAdapters(
                adapters_pb2.ListAdaptersRequest(), metadata=metadata
            )
            assert (await code_of(model), await code_of(listing)) == codes
        # With two tokens, a proxy in front may have checked the other one.
        both = bearer("alpha-secret") + bearer("gamma-secret")
        model = server.inference.GetModel(inference_pb2.GetModelRequest(), metadata=both)
        assert await code_of(model) == "UNAUTHENTICATED"


async def test_errors_have_details_for_unary_calls_and_streams(
    token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    message = inference_pb2.GenerateRequest(prompt="a")
    with caplog.at_level(logging.DEBUG):
        async with harness(tokens=TokenTable.read(token_file)) as server:
            missing = await failure_of(server.inference.GenerateStream(message))
            scheme = await failure_of(
                server.inference.Generate(message, metadata=(("authorization", "alpha-secret"),))
            )
            role = await failure_of(
                server.inference.GenerateStream(message, metadata=bearer("beta-secret"))
            )
            upload = await failure_of(
                server.adapters.UploadAdapter(iter(()), metadata=bearer("alpha-secret"))
            )
            await server.inference.Generate(message, metadata=bearer("alpha-secret"))
            assert len(server.engine.requests) == 1
    assert (missing.code, missing.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert scheme.code is grpc.StatusCode.UNAUTHENTICATED
    assert role.code is upload.code is grpc.StatusCode.PERMISSION_DENIED
    assert role.metadata == {"service": "turret.v1.Inference", "role": "inference"}
    assert "call finished" in caplog.text
    told = [r.__dict__["fields"] for r in caplog.records if r.message == "call finished"]
    assert [line.get("reason") for line in told] == [
        *("UNAUTHENTICATED", "UNAUTHENTICATED", "PERMISSION_DENIED", "PERMISSION_DENIED", None)
    ]
    assert (told[2]["role"], told[2]["service"]) == ("inference", "turret.v1.Inference")
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("text", "reason", "params"),
    [
        ("", "TOKEN_FILE_EMPTY", {}),
        ("# only a comment", "TOKEN_FILE_EMPTY", {}),
        ("hunter2", "TOKEN_LINE_MALFORMED", {"line": 1}),
        ("hunter2 inference admin", "TOKEN_LINE_MALFORMED", {"line": 1}),
        (
            "\nhunter2 root",
            "ROLE_UNKNOWN",
            {"line": 2, "choices": "inference, admin, metrics, training"},
        ),
        ("admin hunter2", "ROLE_UNKNOWN", {"line": 1}),
        ("x hunter2", "ROLE_UNKNOWN", {"line": 1}),
        ("hunter2 inference,", "ROLE_UNKNOWN", {"line": 1}),
        ("hunter2 admin\nhunter2 inference", "TOKEN_DUPLICATE", {"line": 2}),
        ("hünter2 admin", "TOKEN_NOT_ASCII", {"line": 1}),
    ],
)
def test_an_invalid_token_file_is_refused_without_quoting_it(
    tmp_path: Path, text: str, reason: str, params: dict[str, Any]
) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ValueError, check=says(reason, **params)) as raised:
        TokenTable.read(path)
    assert "nter2" not in str(raised.value)


async def test_health_and_reflection_need_no_token_and_health_follows_the_server(
    token_file: Path,
) -> None:
    async with harness(tokens=TokenTable.read(token_file), serving=False) as server:
        stub: Any = health_pb2_grpc.HealthStub(server.channel)  # type: ignore[arg-type]

        async def check(service: str) -> str:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

        services = ("", "turret.v1.Inference", "turret.v1.Adapters")
        first, second = (
            stub.Watch(health_pb2.HealthCheckRequest(service=services[1])) for _ in range(2)
        )
        for watch in (first, second):
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert [await check(s) for s in services] == ["NOT_SERVING"] * 3
        server.rpc.health.set_serving(True)
        assert [await check(s) for s in services] == ["SERVING"] * 3
        assert (await first.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert (await second.read()).status == health_pb2.HealthCheckResponse.SERVING
        # The end of one watcher does not affect the other.
        first.cancel()
        server.rpc.health.close()
        assert (await second.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not await second.read()
        assert await second.code() is grpc.StatusCode.OK
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await check("turret.v1.Nothing")
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND

        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        for version in ("v1alpha", "v1"):
            info: Any = server.channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                reflection_pb2.ServerReflectionRequest.SerializeToString,
                reflection_pb2.ServerReflectionResponse.FromString,
            )
            answers = [answer async for answer in info(iter([asked]))]
            listed = {s.name for s in answers[0].list_services_response.service}
            assert {*services[1:], "grpc.health.v1.Health"} <= listed


async def test_calls_before_the_model_is_loaded_are_unavailable() -> None:
    async with harness(serving=False) as server:
        calls = [
            lambda: server.inference.GetModel(inference_pb2.GetModelRequest()),
            lambda: server.inference.GenerateStream(inference_pb2.GenerateRequest(prompt="a")),
            lambda: server.adapters.LoadAdapter(
                adapters_pb2.LoadAdapterRequest(name="a", path="a")
            ),
            lambda: server.adapters.UnpinAdapter(adapters_pb2.UnpinAdapterRequest(name="a")),
        ]
        for call in calls:
            failure = await failure_of(call())
            assert failure.code is grpc.StatusCode.UNAVAILABLE
            assert failure.reason == "SERVER_STARTING"
            assert failure.retry_seconds == 1.0
        server.gate.open(server.backend)
        await calls[0]()
        server.gate.close(say("SHUTTING_DOWN"))
        assert (await failure_of(calls[1]())).reason == "UNAVAILABLE"


async def test_an_admin_address_moves_the_adapters_service() -> None:
    listen = ListenConfig(address="127.0.0.1:0", admin_address="127.0.0.1:0")
    async with harness(listen=listen) as server:
        assert server.rpc.address != server.rpc.admin_address
        request = adapters_pb2.ListAdaptersRequest()
        failure = await failure_of(server.adapters.ListAdapters(request))
        assert failure.code is grpc.StatusCode.UNIMPLEMENTED
        assert failure.reason == "SERVICE_ELSEWHERE"
        assert failure.metadata["flag"] == "--admin-address"
        assert str(server.rpc.admin_address) not in failure.message
        await server.inference.GetModel(inference_pb2.GetModelRequest())
        async with grpc.aio.insecure_channel(server.rpc.admin_address) as channel:
            stub: Any = adapters_pb2_grpc.AdaptersStub(channel)  # type: ignore[arg-type]
            await stub.ListAdapters(request)
            wrong: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[arg-type]
            failure = await failure_of(wrong.GetModel(inference_pb2.GetModelRequest()))
            assert failure.code is grpc.StatusCode.UNIMPLEMENTED
            assert failure.metadata["flag"] == "--address"
            unknown: Any = channel.unary_unary("/turret.v1.Adapters/Unheard")
            failure = await failure_of(unknown(b""))
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNIMPLEMENTED, "")


async def test_only_authorised_callers_learn_that_a_service_is_elsewhere(token_file: Path) -> None:
    listen = ListenConfig(address="127.0.0.1:0", admin_address="127.0.0.1:0")
    codes = {"alpha-secret": "PERMISSION_DENIED", "beta-secret": "UNIMPLEMENTED"}
    async with harness(listen=listen, tokens=TokenTable.read(token_file)) as server:
        for token, code in {**codes, "delta": "UNAUTHENTICATED"}.items():
            request = adapters_pb2.ListAdaptersRequest()
            listing = server.adapters.ListAdapters(request, metadata=bearer(token))
            assert (await failure_of(listing)).code is grpc.StatusCode[code]


@contextlib.asynccontextmanager
async def served(
    door: str, address: str = "127.0.0.1:0", security: SecurityConfig | None = None
) -> AsyncIterator[list[str]]:
    """The addresses of a server of one protocol."""
    if door == "http":
        async with http_harness(
            listen=ListenConfig(http_address=address), security=security
        ) as http:
            yield [http.server.address]
    else:
        listen = ListenConfig(address=address, admin_address="127.0.0.1:0")
        async with harness(listen=listen, security=security) as rpc:
            yield [rpc.rpc.address, rpc.rpc.admin_address]


both_doors = pytest.mark.parametrize("door", ["rpc", "http"])


@both_doors
async def test_an_address_in_use_is_an_error(door: str) -> None:
    async with served(door) as (address, *_):
        with pytest.raises(OSError, check=says("ADDRESS_UNUSABLE")):
            async with served(door, address):
                raise AssertionError("two servers share a port")


async def test_a_unix_socket_is_served(tmp_path: Path) -> None:
    listen = ListenConfig(address=f"unix:{tmp_path}/turret.sock")
    async with harness(listen=listen) as server:
        await server.inference.GetModel(inference_pb2.GetModelRequest())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca``, ``server`` and ``client`` (signed by ca), and the self-signed ``stranger``."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("ca", "stranger"):
        certify(folder, name)
    for name in ("server", "client"):
        certify(folder, name, LOCAL, authority="ca")
    return folder


def security_of(folder: Path, **more: Any) -> SecurityConfig:
    files = {"tls_cert": folder / "server.crt", "tls_key": folder / "server.key"}
    return SecurityConfig(**{**files, **more})


async def test_tls(certificates: Path) -> None:
    async with harness(security=security_of(certificates)) as server:
        tls = Tls.from_files(ca=certificates / "ca.crt")
        probed = await asyncio.to_thread(is_serving, server.rpc.address, tls=tls, token="t")
        assert probed == (True, "SERVING")
        # The harness' own channel uses plain text.
        plain = server.inference.GetModel(inference_pb2.GetModelRequest(), timeout=10)
        assert (await failure_of(plain)).code is grpc.StatusCode.UNAVAILABLE


def shown(address: str, own: Path | None = None) -> str:
    """The server's certificate on a new connection that it answers, as PEM.

    Raises:
        OSError: The server rejects the client's certificate, or requires one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    if own is not None:
        context.load_cert_chain(own, own.with_suffix(".key"))
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain) as secured,
    ):
        found = secured.getpeercert(binary_form=True)
        secured.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        if not secured.recv(1):
            raise ConnectionError("no answer")
    assert found is not None
    return ssl.DER_cert_to_PEM_cert(found)


def put(source: Path, target: Path) -> None:
    """Replace a file atomically, as a renewal does."""
    shutil.copy(source, f"{target}.new")
    os.replace(f"{target}.new", target)


@both_doors
async def test_certificates_change_without_a_restart(
    door: str, certificates: Path, tmp_path: Path
) -> None:
    def install(name: str) -> None:
        for end in ("crt", "key"):
            put(certificates / f"{name}.{end}", tmp_path / f"server.{end}")

    install("server")
    async with served(door, security=security_of(tmp_path)) as addresses:
        now = ""
        for name in ("server", "client"):
            install(name)
            for address in addresses:
                now = await asyncio.to_thread(shown, address)
                assert now.split() == (certificates / f"{name}.crt").read_text().split()
        # An incomplete change has no effect, and neither has a file that keeps its reader waiting.
        install("server")
        (tmp_path / "server.crt").write_text("no certificate")
        assert await asyncio.to_thread(shown, addresses[0]) == now
        for end in ("key", "crt"):
            (tmp_path / f"server.{end}").unlink()
            assert await asyncio.to_thread(shown, addresses[0]) == now
            os.mkfifo(tmp_path / f"server.{end}")
            assert await asyncio.to_thread(shown, addresses[0]) == now
        install("server")
        assert await asyncio.to_thread(shown, addresses[0]) != now


@both_doors
async def test_mtls(door: str, certificates: Path, tmp_path: Path) -> None:
    roots = tmp_path / "roots.crt"
    put(certificates / "ca.crt", roots)
    own, stranger = certificates / "client.crt", certificates / "stranger.crt"
    secure = security_of(certificates, tls_client_ca=roots)
    async with served(door, security=secure) as (address, *_):
        for refused in (None, stranger):
            with pytest.raises((ConnectionError, ssl.SSLError)):
                await asyncio.to_thread(shown, address, refused)
        assert await asyncio.to_thread(shown, address, own)
        # With another authority, only clients whose certificates it signed are accepted.
        put(stranger, roots)
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await asyncio.to_thread(shown, address, own)
        assert await asyncio.to_thread(shown, address, stranger)


@both_doors
async def test_mismatched_tls_files_prevent_startup(door: str, certificates: Path) -> None:
    crossed = security_of(certificates, tls_key=certificates / "client.key")
    reason = {"rpc": "ADDRESS_UNUSABLE", "http": "KEY_VALUES_MISMATCH"}[door]
    is_expected = says(reason) if door == "rpc" else lambda e: getattr(e, "reason", "") == reason
    with pytest.raises(OSError, check=is_expected):
        async with served(door, security=crossed):
            raise AssertionError("it started")
