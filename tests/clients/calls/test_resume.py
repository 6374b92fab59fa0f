"""Interrupted and cut answers continue by themselves, without gaps or repetitions, or raise."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from builders.bases.tiny_models import save_tiny_model
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from servers.breaking_proxy import BreakingProxy
from servers.fake_turret import FOREVER, fake_turret, serving, start
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients import channel, errors
from turret.clients.aio import AsyncTurretClient
from turret.clients.calls import ROUTING_KEY
from turret.clients.client import TurretClient
from turret.clients.requests import GenerateOptions
from turret.clients.results import Chunk
from turret.clients.words import say
from turret.v1 import inference_pb2, inference_pb2_grpc

ADAPTERS = ("json", "sql")
# The range of bytes after which a connection breaks: after its handshake, and before the last of
# several answers.
AFTER_BYTES = (800, 6000)
NUM_CLIENTS, NUM_EACH = 10, 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    folder = tmp_path_factory.mktemp("resume")
    model = save_tiny_model("llama", folder / "model")
    with start_server(folder, "--model", str(model)) as running:
        for number, name in enumerate(ADAPTERS):
            write_adapter(running.adapter_root, arch_of(model), AdapterSpec(name, rank=4), number)
        with TurretClient(running.address) as client:
            for name in ADAPTERS:
                client.adapters.load(name, name)
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turret.clients.calls._FIRST_DELAY_SECONDS", 0.05)


def _options(number: int) -> GenerateOptions:
    """Options in turn: greedy, seeded, adapters, penalties, logprobs, echo, stop strings."""
    options: GenerateOptions = {"max_tokens": 24, "ignore_eos": True, "seed": number}
    options["adapters"] = ((), "json", ("json", ("sql", -0.5)))[number % 3]
    options["temperature"] = (0.0, 1.5)[number % 2]
    if number % 5 == 1:
        options["frequency_penalty"] = 0.5
    if number % 4 == 1:
        options["logprobs"] = True
    if number % 4 == 2:
        options["echo"] = options["token_ids"] = True
    if number % 7 == 3:
        options["stop"] = ["e", "ab"]
    return options


def _joined(chunks: list[Chunk]) -> tuple[Any, ...]:
    last = chunks[-1]
    assert last.usage is not None
    return (
        "".join(chunk.text for chunk in chunks),
        [token for chunk in chunks for token in chunk.token_ids],
        [logprob for chunk in chunks for logprob in chunk.logprobs],
        last.finish_reason,
        last.stop,
        last.usage.completion_tokens,
        [(use.name, use.generation, use.weight) for use in last.adapters_used],
    )


def test_broken_streams_give_the_same_answer_as_whole_ones(server: ServerUnderTest) -> None:
    numbers = range(NUM_CLIENTS * NUM_EACH)

    def ask(client: TurretClient, number: int) -> tuple[Any, ...]:
        return _joined(list(client.generate_stream(f"a b {number}", **_options(number))))

    with TurretClient(server.address) as client:
        expected = [ask(client, number) for number in numbers]

    def ask_several(address: str, own: range) -> list[tuple[Any, ...]]:
        with TurretClient(address, max_retries=12) as client:
            return [ask(client, number) for number in own]

    async def ask_several_async(address: str, own: range) -> list[tuple[Any, ...]]:
        async with AsyncTurretClient(address, max_retries=12) as client:
            answers = []
            for number in own:
                stream = client.generate_stream(f"a b {number}", **_options(number))
                answers.append(_joined([chunk async for chunk in stream]))
            return answers

    with (
        BreakingProxy(server.address, AFTER_BYTES) as proxy,
        futures.ThreadPoolExecutor(NUM_CLIENTS) as pool,
    ):
        parts = [range(start, start + NUM_EACH) for start in numbers[::NUM_EACH]]
        half = len(parts) // 2
        threads = [pool.submit(ask_several, proxy.address, part) for part in parts[:half]]

        async def rest() -> list[list[tuple[Any, ...]]]:
            return await asyncio.gather(
                *(ask_several_async(proxy.address, part) for part in parts[half:])
            )

        # Run the kinds in sequence, because channels of one process share a connection and its end.
        broken = [thread.result(120) for thread in threads]
        broken += asyncio.run(rest())
        assert proxy.num_broken > len(numbers) / 10
    assert [answer for part in broken for answer in part] == expected


def test_without_resume_a_broken_stream_is_unavailable(server: ServerUnderTest) -> None:
    with (
        BreakingProxy(server.address, (700, 900)) as proxy,
        TurretClient(proxy.address, resume=False) as client,
        pytest.raises(errors.UnavailableError),
    ):
        list(client.generate_stream("a b", max_tokens=200, ignore_eos=True))


def test_an_answer_resumes_only_with_the_same_weights(server: ServerUnderTest) -> None:
    model = server.adapter_root.parent / "model"
    write_adapter(server.adapter_root, arch_of(model), AdapterSpec("moving", rank=4), 5)
    write_adapter(server.adapter_root, arch_of(model), AdapterSpec("moved", rank=4), 6)
    with (
        TurretClient(server.address) as direct,
        BreakingProxy(server.address, (1200, 1200)) as proxy,
        TurretClient(proxy.address) as client,
    ):
        direct.adapters.load("moving", "moving")
        stream = client.generate_stream("a", adapters="moving", max_tokens=400, ignore_eos=True)
        next(stream)
        direct.adapters.replace("moving", "moved")
        with pytest.raises(errors.NotFoundError):
            list(stream)


def test_an_answer_of_an_alias_resumes_with_the_same_target(
    server: ServerUnderTest,
) -> None:
    options: GenerateOptions = {"max_tokens": 300, "ignore_eos": True, "temperature": 0.0}
    by_alias: GenerateOptions = {**options, "adapters": "prod"}
    by_name: GenerateOptions = {**options, "adapters": "json"}
    with (
        TurretClient(server.address) as direct,
        BreakingProxy(server.address, (1200, 1200)) as proxy,
        TurretClient(proxy.address) as client,
    ):
        direct.adapters.set_alias("prod", "json")
        stream = client.generate_stream("a", **by_alias)
        begin = next(stream)
        direct.adapters.set_alias("prod", "sql")
        found = _joined([begin, *stream])
        assert proxy.num_broken > 0
        direct.adapters.delete_alias("prod")
        assert found == _joined(list(direct.generate_stream("a", **by_name)))


def test_a_silent_proxy_is_abandoned(
    server: ServerUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: GenerateOptions = {"max_tokens": 200, "ignore_eos": True, "temperature": 0.0}
    with TurretClient(server.address) as direct:
        whole = list(direct.generate_stream("a", **options))
    # Divide all times by ten.
    sooner = [(n, v // 10 if n.endswith("_ms") else v) for n, v in channel._OPTIONS]
    monkeypatch.setattr(channel, "_OPTIONS", tuple(sooner))
    with (
        BreakingProxy(server.address, (1200, 1200), is_silent=True) as proxy,
        TurretClient(proxy.address) as client,
    ):
        stream = client.generate_stream("a", **options)
        chunks = [next(stream)]
        proxy.after_bytes = None
        chunks += stream
        assert proxy.num_broken == 1
    assert _joined(chunks) == _joined(whole)


class _Failure(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code, self.details = lambda: code, lambda: details
        self.trailing_metadata = lambda: ()


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        # Errors caused by HAProxy, Envoy and gRPC itself, in this order.
        (grpc.StatusCode.CANCELLED, "RST_STREAM", errors.UnavailableError),
        (
            grpc.StatusCode.INTERNAL,
            "Received RST_STREAM with error code 2",
            errors.UnavailableError,
        ),
        (grpc.StatusCode.UNKNOWN, "Stream removed", errors.UnavailableError),
        (
            grpc.StatusCode.UNKNOWN,
            "Received http2 header with status: 500",
            errors.UnavailableError,
        ),
        (grpc.StatusCode.UNKNOWN, "Received http2 header with status: 400", errors.ServerError),
        (grpc.StatusCode.CANCELLED, "Locally cancelled by application!", errors.CallCancelledError),
        (grpc.StatusCode.CANCELLED, "Channel closed!", errors.CallCancelledError),
        (grpc.StatusCode.INTERNAL, "a division by zero", errors.ServerError),
    ],
)
def test_a_proxy_without_its_server_is_reported_as_unavailable(
    code: grpc.StatusCode, details: str, kind: type[errors.TurretRpcError]
) -> None:
    error = errors.TurretRpcError.from_grpc(_Failure(code, details))
    assert type(error) is kind
    assert details in error.message
    if kind is errors.UnavailableError:
        assert error.reason == "CONNECTION_LOST"


def test_calls_carry_their_adapters_in_a_header_for_load_balancers() -> None:
    mix = [("sql", 1.0), ("json", -0.5)]
    with fake_turret() as server:

        def key() -> object:
            """The header of the last call."""
            return server.inference.metadata.pop(ROUTING_KEY, None)

        async def call_async() -> None:
            async with AsyncTurretClient(server.address) as client:
                await client.generate("a", adapters=mix)
                assert key() == "json,sql"
                await client.score("a", adapters=mix)
                assert key() == "json,sql"
                assert [chunk async for chunk in client.generate_stream("a", adapters=mix)]
                assert key() == "json,sql"

        with TurretClient(server.address) as client:
            client.generate("a")
            assert key() is None
            with pytest.raises(errors.NotFoundError):
                client.generate("a", adapters="no\nheader")
            assert key() is None
            for ask in (client.generate, client.score):
                ask("a", adapters=mix)
                assert key() == "json,sql"
            list(client.generate_stream("a", adapters=mix))
            assert key() == "json,sql"
        asyncio.run(call_async())


# Answers that a stopping server cuts: another server continues them, or an error is raised.


CUT = say("ANSWER_CUT")
_CANCELLED, _STOP = inference_pb2.GenerateResponse.CANCELLED, inference_pb2.GenerateResponse.STOP


class Stopping(inference_pb2_grpc.InferenceServicer):
    """Cuts a number of answers, then fails with ``then`` or answers.

    Attributes:
        reports: Whether the last chunk reports a cut, which a proxy may lose.
    """

    def __init__(self) -> None:
        self.cuts = 0
        self.reports = True
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
        if is_cut and not self.reports:
            return
        # Text that was held back for a stop string; the next server sends it again.
        yield inference_pb2.GenerateChunk(
            text=texts[1:2] if is_cut else "", finish_reason=_CANCELLED if is_cut else _STOP
        )


@pytest.fixture
def cutting(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stopping, str]]:
    monkeypatch.setattr("turret.clients.calls._FIRST_DELAY_SECONDS", 0.02)
    monkeypatch.setattr("turret.clients.calls._RESTART_SECONDS", 0.3)
    stopping = Stopping()
    with serving(stopping) as address:
        yield stopping, address


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
    except errors.UnavailableError as error:
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
    cutting, is_async: bool, options, cuts: int, then, text: str
) -> None:
    stopping, address = cutting
    stopping.cuts, stopping.then = cuts, then
    chunks, error = _streamed(address, is_async, **options)
    assert "".join(chunk.text for chunk in chunks) == text
    if text == "abcd":
        assert (error, chunks[-1].finish_reason) == (None, "STOP")
    else:
        assert isinstance(error, errors.AnswerCutError)
        assert (error.message, chunks[-1].finish_reason) == (CUT, "CANCELLED")


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_a_stream_without_its_last_chunk_continues_or_raises(
    cutting, is_async: bool, resume: bool
) -> None:
    """A fleet's proxy ends a stream like this if no replica is ready."""
    stopping, address = cutting
    stopping.cuts, stopping.reports = 2, False
    chunks, error = _streamed(address, is_async, resume=resume)
    assert "".join(chunk.text for chunk in chunks) == ("abcd" if resume else "a")
    assert (error is None) == resume
    if error is not None:
        assert isinstance(error, errors.AnswerCutError)


def test_a_broken_stream_waits_for_a_server_that_starts_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("turret.clients.calls._FIRST_DELAY_SECONDS", 0.02)
    stopping = Stopping()
    stopping.cuts = 1
    running, address = start(stopping)
    # Two attempts alone would end after a twentieth of a second.
    with TurretClient(address) as client, futures.ThreadPoolExecutor(1) as pool:
        stream = client.generate_stream("a")
        chunks = [next(stream)]
        running.stop(None).wait()
        rest = pool.submit(list, stream)
        time.sleep(1.0)
        assert not rest.done()
        running, _ = start(stopping, address=address)
        chunks += rest.result(30)
        running.stop(None).wait()
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
    running, address = start(stopping)
    with TurretClient(address, **options) as client:
        stream = client.generate_stream("a", timeout=timeout)
        next(stream)
        running.stop(None).wait()
        started = time.monotonic()
        with pytest.raises(errors.UnavailableError):
            list(stream)
        assert time.monotonic() - started < 10


def test_closing_a_stream_at_its_cut_raises_nothing(cutting) -> None:
    stopping, address = cutting
    stopping.cuts = 1
    with (
        TurretClient(address, max_retries=0) as client,
        client.generate_stream("a") as stream,
    ):
        assert [next(stream).text, next(stream).finish_reason] == ["a", "CANCELLED"]
        stream.close()
        assert list(stream) == []


@pytest.mark.parametrize("is_async", [False, True])
def test_a_unary_call_that_was_cut_is_retried_or_raises(cutting, is_async: bool) -> None:
    stopping, address = cutting

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
        with pytest.raises(errors.AnswerCutError, match=CUT) as raised:
            ask(max_retries=retries)
        assert raised.value.completion is not None
        assert raised.value.completion.text == "ab"
    # A final error of a later attempt is the one that counts.
    stopping.cuts, stopping.then = 1, grpc.StatusCode.NOT_FOUND
    with pytest.raises(errors.NotFoundError):
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

    with fake_turret() as cutting:
        assert asyncio.run(cut(cutting.address)) == []


async def test_closing_an_asyncio_client_does_not_wait_if_no_call_was_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("turret.clients.calls._CUT_SECONDS", 60.0)
    with fake_turret() as cutting:
        client = AsyncTurretClient(cutting.address)
        await client.generate("a")
        await asyncio.wait_for(client.close(), 10)
