"""Connections and calls that are only held open are limited in number and time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode as Code
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import raw_grpc
from servers.certificates import LOCAL, certify
from servers.http_harness import http_harness
from servers.rpc_harness import Harness, bearer, eventually, failure_of, harness, silent, tokens_of

from turret.server import rpc
from turret.server.api import access
from turret.server.api.access import MOST_CONNECTIONS, Shares, most_connections
from turret.server.api.admin import SlowCalls
from turret.server.config import SecurityConfig
from turret.server.errors import QueueFullError
from turret.server.http import connection
from turret.v1 import inference_pb2

MOST = 4


def guarded() -> AbstractAsyncContextManager[Harness]:
    return harness(tokens=tokens_of("alice", "bob"), shares=Shares(separates_tokens=True))


def begun_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Awaitable[None]]:
    """Returns a function that waits until servers have begun this many calls from now on."""
    begun, limits = list[str](), rpc._limits

    def noted(method: str, tenant: bytes) -> Any:
        begun.append(method)
        return limits(method, tenant)

    monkeypatch.setattr(rpc, "_limits", noted)

    async def wait(count: int) -> None:
        async def is_so() -> bool:
            return len(begun) >= count

        await eventually(is_so)

    return wait


async def get_model(server: Harness, token: str) -> None:
    await server.inference.GetModel(inference_pb2.GetModelRequest(), metadata=bearer(token))


async def is_answered(call: Awaitable[object]) -> bool:
    try:
        await call
    except grpc.aio.AioRpcError:
        return False
    return True


async def is_idle(slow: SlowCalls) -> bool:
    return slow._num_running == 0


@contextlib.asynccontextmanager
async def grpc_server() -> AsyncIterator[str]:
    async with harness(most_connections=MOST) as server:
        yield server.rpc.address


@contextlib.asynccontextmanager
async def http_server() -> AsyncIterator[str]:
    async with http_harness(most_connections=MOST) as server:
        yield server.server.address


async def is_kept(reader: asyncio.StreamReader) -> bool:
    """Whether a connection stays open; skips what the server sends, such as gRPC's settings."""
    try:
        async with asyncio.timeout(0.5):
            while await reader.read(1000):
                pass
    except TimeoutError:
        return True
    except ConnectionError:
        return False
    return False


@pytest.mark.parametrize("start", [grpc_server, http_server])
async def test_connections_beyond_the_bound_are_closed(start: Any) -> None:
    async with start() as address:
        host, _, port = address.rpartition(":")
        opened = [await asyncio.open_connection(host, int(port)) for _ in range(MOST + 3)]
        kept = await asyncio.gather(*(is_kept(reader) for reader, _ in opened))
        assert sorted(kept) == [False] * 3 + [True] * MOST
        for _, writer in opened:
            writer.close()

        # Places are freed: more connections than the limit succeed one after the other.
        async def is_accepted() -> bool:
            reader, writer = await asyncio.open_connection(host, int(port))
            found = await is_kept(reader)
            writer.close()
            return found

        for _ in range(MOST + 1):
            await eventually(is_accepted)


def test_all_protocols_together_leave_descriptors_for_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = [0, 0]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits[0], limits[1]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.__setitem__(0, pair[0]))
    reserved = access.RESERVED_DESCRIPTORS
    for soft, hard in ((1024, 4096), (1024, 1 << 20), (64, 64), (-1, -1), (20_000, 20_000)):
        limits[:] = soft, hard
        most = most_connections(3)
        assert 16 <= most <= MOST_CONNECTIONS
        if hard > reserved + 48:
            assert 3 * most + reserved <= limits[0] <= hard
    assert most_connections(3) == MOST_CONNECTIONS


async def test_a_listener_counts_its_open_connections() -> None:
    bound = connection.socket.create_server(("127.0.0.1", 0))
    with connection.Listener(bound, 1) as accepting:
        address = accepting.getsockname()
        writers = [(await asyncio.open_connection(*address))[1] for _ in range(3)]
        accepted, _ = accepting.accept()
        assert accepting.num_open == 1
        with pytest.raises(ConnectionAbortedError):
            accepting.accept()
        assert accepting.num_open == 1
        accepted.close()
        accepted.close()
        assert accepting.num_open == 0
        another, _ = accepting.accept()
        another.close()
        for writer in writers:
            writer.close()


@pytest.mark.parametrize(
    "method", ["/grpc.health.v1.Health/Check", "/turret.v1.Inference/Generate"]
)
async def test_a_call_without_its_message_is_timed_out(
    monkeypatch: pytest.MonkeyPatch, method: str, server: Harness
) -> None:
    monkeypatch.setattr(rpc, "MESSAGE_SECONDS", 0.2)

    failure = await failure_of(server.channel.stream_unary(method)(silent()))
    assert failure.code is Code.DEADLINE_EXCEEDED
    assert failure.metadata == {"seconds": "0.2"}

    async def nothing() -> AsyncIterator[bytes]:
        return
        yield b""

    failure = await failure_of(server.channel.stream_unary(method)(nothing()))
    assert failure.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("method", "token"),
    [
        ("/grpc.health.v1.Health/Check", None),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", None),
        ("/turret.v1.Inference/Generate", "alice"),
    ],
)
async def test_messages_that_never_end_take_a_bounded_amount_of_memory(
    monkeypatch: pytest.MonkeyPatch, method: str, token: str | None
) -> None:
    """The parts of 100 messages of 1 MiB, of which at most four arrive at the same time."""
    monkeypatch.setattr(rpc, "MOST_ARRIVING", 5)
    monkeypatch.setattr(rpc, "MOST_ARRIVING_OPEN", 5)
    headers = () if token is None else bearer(token)
    async with guarded() as server:
        address = server.rpc.address
        accepted = await asyncio.to_thread(
            raw_grpc.accepted_bytes, address, method, headers, 100, 1 << 20, 0.5
        )
        # gRPC itself lets each call send 64 KiB before anything reads it.
        assert accepted < (4 << 20) + 101 * (64 << 10)


async def test_messages_wait_only_for_those_of_the_same_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc, "MOST_ARRIVING", 4)

    async with guarded() as server:
        method = server.channel.stream_unary("/turret.v1.Inference/Tokenize")
        open_calls = [method(silent(), metadata=bearer("alice")) for _ in range(8)]
        # The server begins these calls in order, so another one comes after them.
        await get_model(server, "bob")
        waiting = asyncio.ensure_future(get_model(server, "alice"))
        health: Any = health_pb2_grpc.HealthStub(server.channel)  # type: ignore[arg-type]
        for _ in range(5):
            await get_model(server, "bob")
            await health.Check(health_pb2.HealthCheckRequest())
        assert not waiting.done()
        for call in open_calls:
            call.cancel()
        await asyncio.wait_for(waiting, 10)


async def test_a_message_waits_for_those_of_all_tokens_to_its_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two tokens have taken all places of a service, and each has fewer than it may have."""
    monkeypatch.setattr(rpc, "MOST_ARRIVING", 4)
    have_begun = begun_calls(monkeypatch)
    async with guarded() as server:
        method = server.channel.stream_unary("/turret.v1.Inference/Tokenize")
        tokens = ("alice", "alice", "bob", "bob")
        open_calls = [method(silent(), metadata=bearer(token)) for token in tokens]
        await have_begun(len(tokens))
        waiting = asyncio.ensure_future(get_model(server, "bob"))
        await have_begun(len(tokens) + 1)
        health: Any = health_pb2_grpc.HealthStub(server.channel)  # type: ignore[arg-type]
        for _ in range(5):
            await health.Check(health_pb2.HealthCheckRequest())
        assert not waiting.done()
        open_calls[0].cancel()
        await asyncio.wait_for(waiting, 10)
        for call in open_calls:
            call.cancel()


async def test_calls_that_need_no_token_are_limited(
    monkeypatch: pytest.MonkeyPatch, server: Harness
) -> None:
    monkeypatch.setattr(rpc, "MOST_OPEN_CALLS", 2)
    stub: Any = health_pb2_grpc.HealthStub(server.channel)  # type: ignore[arg-type]
    watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
    for watch in watches:
        assert isinstance(await watch.read(), health_pb2.HealthCheckResponse)
    failure = await failure_of(stub.Check(health_pb2.HealthCheckRequest()))
    assert failure.code is Code.RESOURCE_EXHAUSTED
    assert failure.retry_seconds is not None
    # Other services have separate limits.
    await server.inference.GetModel(inference_pb2.GetModelRequest())
    watches[0].cancel()
    await eventually(lambda: is_answered(stub.Check(health_pb2.HealthCheckRequest())))
    watches[1].cancel()


@pytest.mark.parametrize(
    ("most", "held", "refused", "accepted"),
    [
        # Two calls of each token, and more of all together.
        ((100, 2), ("alice", "alice"), ("alice",), ("bob",)),
        ((3, 2), ("alice", "alice", "bob"), ("alice", "bob"), ()),
    ],
)
async def test_calls_of_one_token_do_not_block_other_tokens(
    monkeypatch: pytest.MonkeyPatch,
    most: tuple[int, int],
    held: tuple[str, ...],
    refused: tuple[str, ...],
    accepted: tuple[str, ...],
) -> None:
    monkeypatch.setattr(rpc, "MOST_CALLS", most[0])
    monkeypatch.setattr(rpc, "MOST_CALLS_PER_TOKEN", most[1])
    monkeypatch.setattr(rpc, "MOST_OPEN_CALLS", 2)
    have_begun = begun_calls(monkeypatch)
    async with guarded() as server:
        method = server.channel.stream_unary("/turret.v1.Inference/Tokenize")
        open_calls = [method(silent(), metadata=bearer(token)) for token in held]
        await have_begun(len(held))
        for token in refused:
            failure = await failure_of(get_model(server, token))
            assert failure.code is Code.RESOURCE_EXHAUSTED
        for token in accepted:
            await get_model(server, token)
        health: Any = health_pb2_grpc.HealthStub(server.channel)  # type: ignore[arg-type]
        await health.Check(health_pb2.HealthCheckRequest())
        for call in open_calls:
            call.cancel()
        await eventually(lambda: is_answered(get_model(server, "alice")))


async def test_calls_reset_at_once_delay_others_by_a_bounded_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls of other connections wait until the server has taken those that came before."""
    most, sent, taken = rpc.MOST_CALLS_PER_CONNECTION, 8192, list[str]()
    authorize = rpc.authorize

    def noted(tokens: Any, service: str, authorization: Any) -> None:
        taken.append(authorization)
        authorize(tokens, service, authorization)

    monkeypatch.setattr(rpc, "authorize", noted)
    async with guarded() as server:
        # gRPC reads the frames on threads of its own while this call blocks the event loop, so the
        # server takes no call meanwhile.
        raw_grpc.reset_calls(
            server.rpc.address,
            "/turret.v1.Inference/GetModel",
            bearer("alice"),
            sent,
            60.0,
        )
        assert not taken
        await get_model(server, "bob")
        assert taken[-1] == "Bearer bob"
        assert len(taken) <= most + 2


def shorten(monkeypatch: pytest.MonkeyPatch, option: str, factor: int) -> None:
    """Divide a time limit among gRPC's options for servers that start later."""
    options: dict[str, Any] = dict(rpc._OPTIONS)
    # Fails if the server does not set the limit.
    options[option] //= factor
    monkeypatch.setattr(rpc, "_OPTIONS", tuple(options.items()))


async def test_a_connection_without_calls_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, "grpc.max_connection_idle_ms", 3000)
    async with harness() as server:
        # Well before the server notices by its own pings that nobody answers.
        await asyncio.to_thread(raw_grpc.wait_until_closed, server.rpc.address, 30.0)


async def test_a_handshake_that_never_ends_is_timed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, "grpc.server_handshake_timeout_ms", 100)
    certify(tmp_path, "own", LOCAL)
    security = SecurityConfig(tls_cert=tmp_path / "own.crt", tls_key=tmp_path / "own.key")
    async with harness(security=security) as server:
        host, _, port = server.rpc.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        # gRPC's own limit is two minutes.
        assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()


async def test_nothing_is_logged_if_a_call_fails_after_its_caller_has_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow, go = SlowCalls(1), threading.Event()

    def fail() -> None:
        go.wait()
        raise QueueFullError("no")

    waiting = asyncio.ensure_future(slow.run_now(fail))
    await asyncio.sleep(0)
    assert slow._num_running == 1
    waiting.cancel()
    await asyncio.wait([waiting])
    del waiting
    go.set()
    await eventually(lambda: is_idle(slow))
    # asyncio logs a failure that nobody has seen when its task is freed.
    gc.collect()
    assert not caplog.records
    slow.close()


async def test_metadata_has_a_size_limit(server: Harness) -> None:
    for size, code in ((4 << 10, None), (17 << 10, Code.RESOURCE_EXHAUSTED)):
        call = server.inference.GetModel(
            inference_pb2.GetModelRequest(), metadata=(("x", "y" * size),)
        )
        if code is None:
            await call
        else:
            assert (await failure_of(call)).code is code


async def test_a_call_is_refused_if_it_cannot_wait_for_its_turn() -> None:
    slow, go = SlowCalls(2), threading.Event()
    waiting = [asyncio.ensure_future(slow.run_now(go.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await slow.run_now(go.wait)
    # The thread of a call whose caller has gone is still in use.
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    with pytest.raises(QueueFullError):
        await slow.run_now(go.wait)
    go.set()
    assert await waiting[1]
    await eventually(lambda: is_idle(slow))
    assert await slow.run_now(lambda: 5) == 5
    slow.close()
