"""Interrupted streams continue by themselves, with the same bits, without gaps or repetitions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from builders.bases.tiny_models import save_tiny_model
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from servers.breaking_proxy import breaking_proxy
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients import channel
from turret.clients.aio import AsyncTurretClient
from turret.clients.calls import ROUTING_KEY
from turret.clients.client import TurretClient
from turret.clients.errors import (
    CallCancelledError,
    NotFoundError,
    ServerError,
    TurretRpcError,
    UnavailableError,
)
from turret.clients.messages.requests import GenerateOptions
from turret.clients.messages.results import Chunk
from turret.v1 import inference_pb2, inference_pb2_grpc

ADAPTERS = ("json", "sql")
# After the connection's handshake, and before the last of several answers.
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
        breaking_proxy(server.address, AFTER_BYTES) as proxy,
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
        breaking_proxy(server.address, (700, 900)) as proxy,
        TurretClient(proxy.address, resume=False) as client,
        pytest.raises(UnavailableError),
    ):
        list(client.generate_stream("a b", max_tokens=200, ignore_eos=True))


def test_an_answer_resumes_only_with_the_same_weights(server: ServerUnderTest) -> None:
    model = server.adapter_root.parent / "model"
    write_adapter(server.adapter_root, arch_of(model), AdapterSpec("moving", rank=4), 5)
    write_adapter(server.adapter_root, arch_of(model), AdapterSpec("moved", rank=4), 6)
    with (
        TurretClient(server.address) as direct,
        breaking_proxy(server.address, (1200, 1200)) as proxy,
        TurretClient(proxy.address) as client,
    ):
        direct.adapters.load("moving", "moving")
        stream = client.generate_stream("a", adapters="moving", max_tokens=400, ignore_eos=True)
        next(stream)
        direct.adapters.replace("moving", "moved")
        with pytest.raises(NotFoundError):
            list(stream)


def test_an_answer_of_an_alias_resumes_with_the_same_target(
    server: ServerUnderTest,
) -> None:
    options: GenerateOptions = {"max_tokens": 300, "ignore_eos": True, "temperature": 0.0}
    by_alias: GenerateOptions = {**options, "adapters": "prod"}
    by_name: GenerateOptions = {**options, "adapters": "json"}
    with (
        TurretClient(server.address) as direct,
        breaking_proxy(server.address, (1200, 1200)) as proxy,
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
        breaking_proxy(server.address, (1200, 1200), is_silent=True) as proxy,
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
        # HAProxy, Envoy, gRPC itself.
        (grpc.StatusCode.CANCELLED, "RST_STREAM", UnavailableError),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", UnavailableError),
        (grpc.StatusCode.UNKNOWN, "Stream removed", UnavailableError),
        (
            grpc.StatusCode.UNKNOWN,
            "Received http2 header with status: 500",
            UnavailableError,
        ),
        (grpc.StatusCode.UNKNOWN, "Received http2 header with status: 400", ServerError),
        (grpc.StatusCode.CANCELLED, "Locally cancelled by application!", CallCancelledError),
        (grpc.StatusCode.CANCELLED, "Channel closed!", CallCancelledError),
        (grpc.StatusCode.INTERNAL, "a division by zero", ServerError),
    ],
)
def test_a_proxy_without_its_server_is_reported_as_unavailable(
    code: grpc.StatusCode, details: str, kind: type[TurretRpcError]
) -> None:
    error = TurretRpcError.from_grpc(_Failure(code, details))
    assert type(error) is kind
    assert details in error.message
    if kind is UnavailableError:
        assert error.reason == "CONNECTION_LOST"


class _Recorder(inference_pb2_grpc.InferenceServicer):
    def __init__(self) -> None:
        self.keys: list[str | bytes | None] = []

    def _note(self, context: grpc.ServicerContext) -> None:
        self.keys.append(dict(context.invocation_metadata()).get(ROUTING_KEY))

    def Generate(self, request: Any, context: Any) -> inference_pb2.GenerateResponse:
        self._note(context)
        return inference_pb2.GenerateResponse()

    def GenerateStream(self, request: Any, context: Any) -> Iterator[inference_pb2.GenerateChunk]:
        self._note(context)
        yield inference_pb2.GenerateChunk()

    def Score(self, request: Any, context: Any) -> inference_pb2.ScoreResponse:
        self._note(context)
        return inference_pb2.ScoreResponse()


def test_calls_carry_their_adapters_in_a_header_for_load_balancers() -> None:
    recorder = _Recorder()
    serving = grpc.server(futures.ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServicer_to_server(recorder, serving)
    address = f"127.0.0.1:{serving.add_insecure_port('127.0.0.1:0')}"
    serving.start()
    mix = [("sql", 1.0), ("json", -0.5)]

    async def call_async() -> None:
        async with AsyncTurretClient(address) as client:
            await client.generate("a", adapters=mix)
            await client.score("a", adapters=mix)
            assert [chunk async for chunk in client.generate_stream("a", adapters=mix)]

    with TurretClient(address) as client:
        client.generate("a")
        client.generate("a", adapters="no\nheader")
        assert recorder.keys == [None, None]
        client.generate("a", adapters=mix)
        client.score("a", adapters=mix)
        list(client.generate_stream("a", adapters=mix))
    asyncio.run(call_async())
    serving.stop(None).wait()
    assert recorder.keys[2:] == ["json,sql"] * 6
