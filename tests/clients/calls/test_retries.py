"""Retries of the clients: which calls, the delays, and the final exceptions."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from servers.fake_turret import lose, refuse, serving

from turret.clients import errors
from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient
from turret.clients.errors import RateLimitedError, TurretRpcError, UnavailableError
from turret.server.errors import (
    AdapterUnloadedError,
    BudgetExceededError,
    InvalidRequestError,
    QueueFullError,
    TurretError,
)
from turret.server.errors import UnavailableError as Unavailable
from turret.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc


class Moody(inference_pb2_grpc.InferenceServicer, adapters_pb2_grpc.AdaptersServicer):
    """Fails a number of times before it answers.

    Attributes:
        failures: The number of further calls that fail.
        error: Their error; None for a connection that breaks.
        calls: The number of calls so far, including failed ones.
    """

    def __init__(self) -> None:
        self.failures = 0
        self.calls = 0
        self.error: TurretError | None = QueueFullError("no", retry_after_seconds=0.01)
        self.chunks_first = 0

    def _fail(self, context: grpc.ServicerContext) -> None:
        self.calls += 1
        if self.failures:
            self.failures -= 1
            if self.error is None:
                lose(context)
            refuse(context, self.error)

    def Generate(self, request: Any, context: Any) -> inference_pb2.GenerateResponse:
        self._fail(context)
        return inference_pb2.GenerateResponse(text="yes")

    def GenerateStream(self, request: Any, context: Any) -> Iterator[inference_pb2.GenerateChunk]:
        for _ in range(self.chunks_first):
            yield inference_pb2.GenerateChunk(text="a")
        self._fail(context)
        stop = inference_pb2.GenerateResponse.STOP
        yield inference_pb2.GenerateChunk(text="yes", finish_reason=stop)

    def MergeAdapters(self, request: Any, context: Any) -> adapters_pb2.MergeState:
        self._fail(context)
        return adapters_pb2.MergeState()

    def GetAdapter(self, request: Any, context: Any) -> adapters_pb2.Adapter:
        self._fail(context)
        return adapters_pb2.Adapter(name="a")


@pytest.fixture
def servicer() -> Moody:
    return Moody()


@pytest.fixture
def address(servicer: Moody) -> Iterator[str]:
    with serving(servicer) as found:
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turret.clients.calls._FIRST_DELAY_SECONDS", 0.02)


def test_a_call_is_retried_if_the_queue_is_full(servicer: Moody, address: str) -> None:
    with TurretClient(address) as client:
        servicer.failures = 2
        assert client.generate("x").text == "yes"
        assert servicer.calls == 3
        servicer.failures = 3
        with pytest.raises(RateLimitedError):
            client.generate("x")
        servicer.failures = 0
    with TurretClient(address, max_retries=0) as client:
        servicer.failures = 1
        with pytest.raises(RateLimitedError):
            client.generate("x")


async def test_the_asyncio_client_retries_too(servicer: Moody, address: str) -> None:
    async with AsyncTurretClient(address) as client:
        servicer.failures = 2
        assert (await client.generate("x")).text == "yes"
        servicer.failures = 2
        assert [chunk.text async for chunk in client.generate_stream("x")] == ["yes"]
        assert servicer.calls == 6
        servicer.failures, servicer.chunks_first = 1, 1
        with pytest.raises(RateLimitedError):
            async for _ in client.generate_stream("x"):
                pass
        servicer.failures = 3
        with pytest.raises(RateLimitedError):
            await client.adapters.get("a")


def test_the_server_determines_the_delay(servicer: Moody, address: str) -> None:
    servicer.failures, servicer.error = 1, QueueFullError("no", retry_after_seconds=0.4)
    with TurretClient(address) as client:
        before = time.monotonic()
        client.generate("x")
        assert time.monotonic() - before >= 0.4
        # The delay exceeds the deadline, so the error is raised at once.
        servicer.failures, servicer.error = 1, QueueFullError("no", retry_after_seconds=60.0)
        before = time.monotonic()
        with pytest.raises(RateLimitedError):
            client.generate("x", timeout=30.0)
        assert time.monotonic() - before < 30.0


def test_errors_that_waiting_cannot_fix_are_not_retried(servicer: Moody, address: str) -> None:
    for kind, delay in (
        (BudgetExceededError, None),
        (InvalidRequestError, 0.01),
        (TurretError, 0.01),
        (AdapterUnloadedError, 0.01),
    ):
        servicer.error = kind("no", retry_after_seconds=delay)
        servicer.failures, servicer.calls = 1, 0
        with TurretClient(address) as client, pytest.raises(TurretRpcError):
            client.generate("x")
        assert servicer.calls == 1, kind


def test_a_stream_is_retried_only_before_its_first_text(servicer: Moody, address: str) -> None:
    with TurretClient(address) as client:
        servicer.failures = 2
        assert [chunk.text for chunk in client.generate_stream("x")] == ["yes"]
        servicer.failures, servicer.chunks_first, servicer.calls = 1, 2, 0
        seen = []
        with pytest.raises(RateLimitedError):
            seen.extend(chunk.text for chunk in client.generate_stream("x"))
        assert servicer.calls == 1


def test_a_closed_stream_is_not_retried(servicer: Moody, address: str) -> None:
    servicer.failures, servicer.error = 5, QueueFullError("no", retry_after_seconds=30.0)
    with TurretClient(address) as client, futures.ThreadPoolExecutor(1) as pool:
        stream = client.generate_stream("x")
        answer = pool.submit(list, stream)
        time.sleep(0.2)
        before = time.monotonic()
        stream.close()
        assert answer.result(5) == []
        assert time.monotonic() - before < 2
        assert servicer.calls == 1


def test_a_change_is_retried_only_if_the_server_did_nothing(servicer: Moody, address: str) -> None:
    """A merge whose connection broke is not retried, because the server may have run it."""
    servicer.error = None
    with TurretClient(address) as client:
        servicer.failures = 1
        with pytest.raises(UnavailableError):
            client.adapters.merge("a")
        assert servicer.calls == 1
        servicer.failures, servicer.calls = 1, 0
        assert client.adapters.get("a").name == "a"
        assert servicer.calls == 2
        # The server itself reported that it did nothing.
        servicer.error = Unavailable("no", retry_after_seconds=0.01)
        servicer.failures, servicer.calls = 1, 0
        client.adapters.merge("a")
        assert servicer.calls == 2


def test_every_status_has_its_exception() -> None:
    kinds = errors._CLASSES
    assert len(set(kinds.values())) == len(kinds)
    assert all(issubclass(kind, TurretRpcError) for kind in kinds.values())
    moved = kinds[grpc.StatusCode.NOT_FOUND](grpc.StatusCode.NOT_FOUND, "no", reason="R").at("x")
    assert (type(moved), moved.place, moved.reason) == (errors.NotFoundError, "x", "R")
    assert str(moved) == "NOT_FOUND (R): x: no"


def test_the_client_is_imported_without_torch() -> None:
    code = (
        "import sys\n"
        "from turret import AdapterWeight, AsyncTurretClient, Tls, TurretClient, TurretRpcError\n"
        "import turret\n"
        "assert set(turret.__all__) <= set(dir(turret))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "try:\n    turret.nothing\nexcept AttributeError as e:\n    print(e)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "module 'turret' has no attribute 'nothing'\n", result.stderr
