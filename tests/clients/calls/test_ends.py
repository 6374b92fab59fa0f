"""Calls that end early: closed clients, cancelled tasks, deadlines, and early statuses."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from servers.fake_turret import (
    FOREVER,
    FakeAdapters,
    FakeInference,
    FakeTurret,
    fake_turret,
    refuse,
)

from turret.clients import errors
from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient
from turret.clients.words import say
from turret.server.errors import DeadlineExceededError as Late
from turret.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2

SAID = f"CANCELLED: {say('CLOSED_DURING_CALL')}"
SLOW = "slow"


class Slow(FakeInference):
    """Answers SLOW only after its client has gone."""

    def Generate(self, request, context):
        if request.prompt == SLOW:
            gone = threading.Event()
            context.add_callback(gone.set)
            gone.wait(20)
        return super().Generate(request, context)


@pytest.fixture
def server() -> Iterator[FakeTurret]:
    with fake_turret(Slow) as running:
        yield running


# A call that is answered late, one that is retried, and streams of both kinds.
CALLS: dict[str, Callable[[Any], Any]] = {
    "call": lambda client: client.generate(SLOW),
    "tries": lambda client: client.generate("busy"),
    "stream": lambda client: client.generate_stream(FOREVER),
    "stream tries": lambda client: client.generate_stream("busy"),
}


@pytest.mark.parametrize("ask", CALLS.values(), ids=CALLS)
def test_a_running_call_reports_that_its_client_was_closed(server: FakeTurret, ask):
    client = TurretClient(server.address)
    closes = threading.Timer(0.2, client.close)
    closes.start()
    started = time.monotonic()
    with pytest.raises(errors.CallCancelledError, match=f"^{SAID}"):
        list(ask(client))
    assert time.monotonic() - started < 5
    closes.join()


async def _to_the_end(ask: Any, client: AsyncTurretClient) -> None:
    asked = ask(client)
    if hasattr(asked, "__aiter__"):
        async for _ in asked:
            pass
    else:
        await asked


@pytest.mark.parametrize("ask", CALLS.values(), ids=CALLS)
async def test_a_running_asyncio_call_reports_that_its_client_was_closed(server: FakeTurret, ask):
    client = AsyncTurretClient(server.address)
    task = asyncio.create_task(_to_the_end(ask, client))
    await asyncio.sleep(0.2)
    await client.close()
    with pytest.raises(errors.CallCancelledError, match=f"^{SAID}"):
        await task


@pytest.mark.parametrize("ask", CALLS.values(), ids=CALLS)
async def test_a_task_cancelled_by_its_program_is_cancelled(server: FakeTurret, ask):
    async with AsyncTurretClient(server.address) as client:
        task = asyncio.create_task(_to_the_end(ask, client))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await _to_the_end(ask, client)
    # The client closes and the task is cancelled at the same time.
    client = AsyncTurretClient(server.address)
    task = asyncio.create_task(_to_the_end(ask, client))
    await asyncio.sleep(0.2)
    task.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_stream_that_another_task_closes_ends(server: FakeTurret):
    async with AsyncTurretClient(server.address) as client:
        stream = client.generate_stream(FOREVER)
        task = asyncio.create_task(_to_the_end(lambda _: stream, client))
        await asyncio.sleep(0.2)
        await stream.aclose()
        await task


async def test_an_export_reports_that_its_client_was_closed(
    server: FakeTurret, tmp_path: Path, monkeypatch
):
    export = FakeAdapters.ExportAdapter

    def slow(self, request, context):
        gone = threading.Event()
        context.add_callback(gone.set)
        yield next(export(self, request, context))
        gone.wait(20)

    monkeypatch.setattr(FakeAdapters, "ExportAdapter", slow)
    with fake_turret() as other:
        client = AsyncTurretClient(other.address)
        task = asyncio.create_task(client.adapters.export("sql", tmp_path / "a"))
        await asyncio.sleep(0.2)
        await client.close()
        with pytest.raises(errors.CallCancelledError, match=f"^{SAID}"):
            await task
        own = TurretClient(other.address)
        closes = threading.Timer(0.2, own.close)
        closes.start()
        with pytest.raises(errors.CallCancelledError, match=f"^{SAID}"):
            own.adapters.export("sql", tmp_path / "a")
        closes.join()
    assert not (tmp_path / "a").exists()


# Deadlines of calls, and the errors after them.


LONG = [1e9, 3e9, 9.2e9, 1e10, sys.maxsize, pytest.param(10**400, id="10**400"), math.inf]


@pytest.mark.parametrize("seconds", LONG)
async def test_an_enormous_timeout_sets_no_deadline(server: FakeTurret, seconds: Any):
    def has_no_deadline() -> bool:
        left, server.inference.time_remaining = server.inference.time_remaining, 0.0
        return left is None

    with TurretClient(server.address, timeout=seconds) as client:
        assert client.generate("a").text == "a"
        assert has_no_deadline()
        assert client.adapters.get("sql", timeout=seconds).name == "sql"
        assert [chunk.text for chunk in client.generate_stream("a", timeout=seconds)] == ["a", ""]
        assert has_no_deadline()
    async with AsyncTurretClient(server.address) as client:
        assert (await client.generate("a", timeout=seconds)).text == "a"
        assert has_no_deadline()
        async with client.generate_stream("a", timeout=seconds) as stream:
            assert [chunk.text async for chunk in stream] == ["a", ""]
        assert has_no_deadline()


def test_any_real_number_is_a_timeout(client: TurretClient, server: FakeTurret):
    client.generate("a", timeout=Fraction(5))  # type: ignore[arg-type]
    assert 4 < (server.inference.time_remaining or 0) < 5.1


async def test_a_missed_deadline_reports_the_timeout(server: FakeTurret):
    with (
        TurretClient(server.address) as client,
        pytest.raises(errors.DeadlineExceededError) as raised,
    ):
        list(client.generate_stream(FOREVER, timeout=0.2))
    assert raised.value.metadata == {"timeout": "0.2"}
    assert "0.2" in str(raised.value)
    async with AsyncTurretClient(server.address) as client:
        stream = client.generate_stream(FOREVER, timeout=0.2)
        with pytest.raises(errors.DeadlineExceededError) as raised:
            [chunk async for chunk in stream]
    assert raised.value.metadata == {"timeout": "0.2"}


class Punctual(FakeInference):
    """A server that reports the deadline itself, before the client notices it."""

    def GenerateStream(self, request, context):
        reason = inference_pb2.GenerateResponse.DEADLINE
        yield inference_pb2.GenerateChunk(text="a", finish_reason=reason)
        refuse(context, Late("the deadline passed before the request finished"))


def test_a_server_that_reaches_the_deadline_first_returns_the_partial_answer():
    with fake_turret(Punctual) as server, TurretClient(server.address) as client:
        stream = client.generate_stream("a", timeout=5)
        assert next(stream).finish_reason == "DEADLINE"
        with pytest.raises(errors.DeadlineExceededError) as raised:
            next(stream)
    assert (raised.value.reason, raised.value.metadata["timeout"]) == ("DEADLINE_EXCEEDED", "5")


def test_a_deadline_that_the_client_enforces_reports_the_timeout():
    over = threading.Event()

    class Unpunctual(FakeInference):
        def Generate(self, request, context):
            over.wait(20)
            return super().Generate(request, context)

    with fake_turret(Unpunctual) as server, TurretClient(server.address, timeout=0.1) as client:
        with pytest.raises(errors.DeadlineExceededError) as raised:
            client.generate("a")
        over.set()
    assert raised.value.metadata["timeout"] == "0.1"


# With this number and size, gRPC's own client lost the status of about every second upload.
UPLOADS = 25
FILE_BYTES = 8 << 20


class Refusing(adapters_pb2_grpc.AdaptersServicer):
    """A server that rejects the name after the first message."""

    async def UploadAdapter(
        self,
        request_iterator: AsyncIterator[adapters_pb2.UploadAdapterRequest],
        context: grpc.aio.ServicerContext[adapters_pb2.UploadAdapterRequest, adapters_pb2.Adapter],
    ) -> adapters_pb2.Adapter:
        async for _ in request_iterator:
            break
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, "taken", (("x-request-id", "the-id"),))
        raise AssertionError


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = grpc.aio.server()
    adapters_pb2_grpc.add_AdaptersServicer_to_server(Refusing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that are sent in chunks of a megabyte, as by other clients."""
    monkeypatch.setattr("turret.clients.adapter_files._CHUNK_BYTES", 1 << 20)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(FILE_BYTES))
    return tmp_path


async def test_an_early_status_from_the_server_is_raised(address: str, adapter: Path) -> None:
    async with AsyncTurretClient(address) as client:
        for _ in range(UPLOADS):
            with pytest.raises(errors.AlreadyExistsError, match="taken") as caught:
                await client.adapters.upload("a", adapter)
            assert caught.value.request_id == "the-id"


async def test_a_synchronous_client_raises_an_early_status(address: str, adapter: Path) -> None:
    def upload() -> None:
        with (
            TurretClient(address) as client,
            pytest.raises(errors.AlreadyExistsError, match="taken"),
        ):
            client.adapters.upload("a", adapter)

    await asyncio.to_thread(upload)


async def test_an_upload_without_a_server_raises_the_usual_error(adapter: Path) -> None:
    async with AsyncTurretClient("127.0.0.1:1", max_retries=0) as client:
        with pytest.raises(errors.UnavailableError) as raised:
            await client.adapters.upload("a", adapter)
    assert raised.value.reason == "NOT_REACHED"
