"""Answers that a stopping server ends: another server continues them, or an error is raised."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from servers.fake_turret import FOREVER, fake_turret

from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient
from turret.clients.errors import AnswerCutError, NotFoundError, UnavailableError
from turret.clients.words import say
from turret.v1 import inference_pb2, inference_pb2_grpc

CUT = say("ANSWER_CUT")
_CANCELLED, _STOP = inference_pb2.GenerateResponse.CANCELLED, inference_pb2.GenerateResponse.STOP


class Stopping(inference_pb2_grpc.InferenceServicer):
    """Cuts a number of answers, then fails with ``then`` or answers."""

    def __init__(self) -> None:
        self.cuts = 0
        self.then: grpc.StatusCode | None = None

    def _is_cut(self, context: grpc.ServicerContext) -> bool:
        self.cuts -= 1
        if self.cuts < 0 and self.then is not None:
            context.abort(self.then, "no")
        return self.cuts >= 0

    def Generate(self, request: Any, context: Any) -> inference_pb2.GenerateResponse:
        if self._is_cut(context):
            return inference_pb2.GenerateResponse(text="ab", finish_reason=_CANCELLED)
        return inference_pb2.GenerateResponse(text="abcd", finish_reason=_STOP)

    def GenerateStream(self, request: Any, context: Any) -> Iterator[inference_pb2.GenerateChunk]:
        texts = "abcd"[len(request.answer_so_far) :]
        is_cut = self._is_cut(context)
        for text in texts[:1] if is_cut else texts:
            yield inference_pb2.GenerateChunk(text=text, token_ids=[ord(text)])
        # Text that was held back for a stop string; the next server sends it again.
        yield inference_pb2.GenerateChunk(
            text=texts[1:2] if is_cut else "", finish_reason=_CANCELLED if is_cut else _STOP
        )


def _serve(stopping: Stopping, address: str) -> tuple[grpc.Server, str]:
    serving = grpc.server(futures.ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServicer_to_server(stopping, serving)
    port = serving.add_insecure_port(address)
    serving.start()
    return serving, f"127.0.0.1:{port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stopping, str]]:
    monkeypatch.setattr("turret.clients.calls._FIRST_DELAY_SECONDS", 0.02)
    monkeypatch.setattr("turret.clients.calls._RESTART_SECONDS", 0.3)
    stopping = Stopping()
    serving, address = _serve(stopping, "127.0.0.1:0")
    yield stopping, address
    serving.stop(None).wait()


def _streamed(address: str, is_async: bool, **options: Any) -> tuple[list[Any], Exception | None]:
    """The chunks of an answer, and the error that ended it, if any."""
    chunks: list[Any] = []

    async def read() -> None:
        async with AsyncTurretClient(address, **options) as client:
            async for chunk in client.generate_stream("a"):
                chunks.append(chunk)

    try:
        if is_async:
            asyncio.run(read())
        else:
            with TurretClient(address, **options) as client:
                for chunk in client.generate_stream("a"):
                    chunks.append(chunk)
    except UnavailableError as error:
        return chunks, error
    return chunks, None


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("options", "cuts", "then", "text"),
    [
        ({}, 1, None, "abcd"),
        ({}, 3, None, "abcd"),
        ({}, 1, grpc.StatusCode.UNAVAILABLE, "ab"),
        ({"max_retries": 0}, 1, None, "ab"),
        ({"resume": False}, 1, None, "ab"),
    ],
)
def test_a_stream_continues_or_raises_after_its_last_chunk(
    server, is_async: bool, options, cuts: int, then, text: str
) -> None:
    stopping, address = server
    stopping.cuts, stopping.then = cuts, then
    chunks, error = _streamed(address, is_async, **options)
    assert "".join(chunk.text for chunk in chunks) == text
    if text == "abcd":
        assert (error, chunks[-1].finish_reason) == (None, "STOP")
    else:
        assert isinstance(error, AnswerCutError)
        assert (error.message, chunks[-1].finish_reason) == (CUT, "CANCELLED")


def test_a_broken_stream_waits_for_a_server_that_starts_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("turret.clients.calls._FIRST_DELAY_SECONDS", 0.02)
    stopping = Stopping()
    stopping.cuts = 1
    serving, address = _serve(stopping, "127.0.0.1:0")
    # Two attempts alone would end after a twentieth of a second.
    with TurretClient(address) as client, futures.ThreadPoolExecutor(1) as pool:
        stream = client.generate_stream("a")
        chunks = [next(stream)]
        serving.stop(None).wait()
        rest = pool.submit(list, stream)
        time.sleep(1.0)
        assert not rest.done()
        serving, _ = _serve(stopping, address)
        chunks += rest.result(30)
        serving.stop(None).wait()
        assert "".join(chunk.text for chunk in chunks) == "abcd"


@pytest.mark.parametrize(
    ("seconds", "options", "timeout"),
    [(0.3, {}, None), (60, {}, 0.5), (60, {"max_retries": 0}, None)],
)
def test_waiting_for_a_lost_server_ends(
    monkeypatch: pytest.MonkeyPatch, seconds: float, options: dict[str, Any], timeout: float | None
) -> None:
    monkeypatch.setattr("turret.clients.calls._FIRST_DELAY_SECONDS", 0.02)
    monkeypatch.setattr("turret.clients.calls._RESTART_SECONDS", seconds)
    stopping = Stopping()
    stopping.cuts = 1
    serving, address = _serve(stopping, "127.0.0.1:0")
    with TurretClient(address, **options) as client:
        stream = client.generate_stream("a", timeout=timeout)
        next(stream)
        serving.stop(None).wait()
        started = time.monotonic()
        with pytest.raises(UnavailableError):
            list(stream)
        assert time.monotonic() - started < 10


def test_closing_a_stream_at_its_cut_raises_nothing(server) -> None:
    stopping, address = server
    stopping.cuts = 1
    with (
        TurretClient(address, max_retries=0) as client,
        client.generate_stream("a") as stream,
    ):
        assert [next(stream).text, next(stream).finish_reason] == ["a", "CANCELLED"]
        stream.close()
        assert list(stream) == []


@pytest.mark.parametrize("is_async", [False, True])
def test_a_unary_call_that_was_cut_is_retried_or_raises(server, is_async: bool) -> None:
    stopping, address = server

    def ask(**options: Any) -> Any:
        async def ask_async() -> Any:
            async with AsyncTurretClient(address, **options) as client:
                return await client.generate("a")

        if is_async:
            return asyncio.run(ask_async())
        with TurretClient(address, **options) as client:
            return client.generate("a")

    stopping.cuts = 2
    assert (ask().text, stopping.cuts) == ("abcd", -1)
    for cuts, then, retries in ((1, None, 0), (9, None, 2), (1, grpc.StatusCode.UNAVAILABLE, 2)):
        stopping.cuts, stopping.then = cuts, then
        with pytest.raises(AnswerCutError, match=CUT) as raised:
            ask(max_retries=retries)
        assert raised.value.completion is not None
        assert raised.value.completion.text == "ab"
    # A final error of a later attempt is the one that counts.
    stopping.cuts, stopping.then = 1, grpc.StatusCode.NOT_FOUND
    with pytest.raises(NotFoundError):
        ask()


@pytest.mark.parametrize("is_cut_by_close", [False, True])
def test_closing_an_asyncio_client_ends_a_cut_stream_in_its_own_loop(
    is_cut_by_close: bool,
) -> None:
    """Otherwise, gRPC prints a traceback when a call's last event finds its loop closed."""

    async def cut(address: str) -> list[str]:
        async with AsyncTurretClient(address) as client:
            stream = client.generate_stream(FOREVER)
            await anext(stream)
            if not is_cut_by_close:
                await stream.aclose()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        return [str(task) for task in left]

    with fake_turret() as server:
        assert asyncio.run(cut(server.address)) == []


async def test_closing_an_asyncio_client_does_not_wait_if_no_call_was_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("turret.clients.calls._CUT_SECONDS", 60.0)
    with fake_turret() as server:
        client = AsyncTurretClient(server.address)
        await client.generate("a")
        await asyncio.wait_for(client.close(), 10)
