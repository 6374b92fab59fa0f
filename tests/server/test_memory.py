"""Memory held by answers counts towards a limit, and cycles that requests leave are collected."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from servers import raw_grpc
from servers.app_parts import served
from servers.fakes import FakeEngine, FakeFuser, FakeMerger, FakeRegistry, fake_backend
from servers.http_harness import http_harness
from servers.rpc_harness import failure_of, harness, tokens_of

from turret.server import cli
from turret.server.api import access
from turret.server.api.call import Call
from turret.server.api.inference import keep
from turret.server.basics.codes import Code
from turret.server.config import MIB, SchedulerConfig
from turret.server.engine.answer import AnswerMemory
from turret.server.errors import BudgetExceededError
from turret.server.metrics import Metrics
from turret.v1 import inference_pb2

PROMPT = [60 + place % 20 for place in range(100)]
# The results of the eight prompts take about 2.5 MiB, a third of a MiB each.
LARGE = {"prompt": [PROMPT] * 8, "max_tokens": 0, "echo": True, "logprobs": 20}
SAMPLED = {"prompt": PROMPT[:2], "n": 16, "max_tokens": 40, "logprobs": 20, "ignore_eos": True}


async def test_the_results_that_a_call_collects_are_bounded(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = SchedulerConfig(max_queued_bytes=MIB)
    async with served(tiny_llama, scheduler=scheduler) as server:
        memory, client, stub = server.app.gate.enter().engine.memory, server.client, server.stub

        async def post(**body: Any) -> int:
            answer = await client.post("/v1/completions", json={"model": "base", **body})
            if answer.status_code != 200:
                assert answer.headers.get("retry-after") or "error" in answer.json()
            return answer.status_code

        echoed = LARGE | {"max_tokens": 1}
        for each in (LARGE, echoed, SAMPLED):
            assert await post(**each) == 429
            assert memory.held == 0
        # Smaller results fit, and a streamed answer is not collected.
        assert await post(**LARGE | {"prompt": PROMPT}) == 200
        assert await post(**LARGE | {"logprobs": 0}) == 200
        assert await post(**SAMPLED, stream=True) == 200
        # Prompts' log probabilities are large pieces, which accumulate for a slow client.
        monkeypatch.setattr(access, "MAX_AT_A_TIME", 1)
        answer = await client.post(
            "/v1/completions", json={"model": "base", **echoed, "stream": True}
        )
        assert '"code":"rate_limit_exceeded"' in answer.text
        for message, call in (
            (inference_pb2.ScoreRequest(top_n=20), stub.Score),
            (inference_pb2.GenerateRequest(), stub.Generate),
        ):
            message.token_ids.ids.extend(PROMPT * 4)
            if isinstance(message, inference_pb2.GenerateRequest):
                message.options.echo = message.options.logprobs = True
                message.options.top_n = 20
                message.stop.max_tokens = 1
            assert (await failure_of(call(message))).reason == "BUDGET_EXCEEDED"
        assert memory.held == 0


async def test_every_call_that_collects_its_answer_counts_its_bytes() -> None:
    inputs = [inference_pb2.Input(prompt="a")] * 2
    async with harness() as server:
        server.engine.memory.most = 10
        stub = server.inference
        for call in (
            stub.Generate(inference_pb2.GenerateRequest(prompt="a")),
            stub.Score(inference_pb2.ScoreRequest(prompt="a")),
            stub.Embed(inference_pb2.EmbedRequest(inputs=inputs)),
            stub.Classify(inference_pb2.ClassifyRequest(inputs=inputs)),
        ):
            assert (await failure_of(call)).reason == "BUDGET_EXCEEDED"
        assert server.engine.memory.held == 0
        stream = stub.GenerateStream(inference_pb2.GenerateRequest(prompt="a"))
        assert [chunk.text async for chunk in stream] == ["H", "i"]


async def test_an_answer_counts_until_its_client_has_read_it() -> None:
    inputs = [inference_pb2.Input(prompt="a")] * 16
    message = inference_pb2.EmbedRequest(inputs=inputs).SerializeToString()
    async with harness() as server:
        connection = await asyncio.to_thread(
            raw_grpc.unread, server.rpc.address, "/turret.v1.Inference/Embed", message
        )
        with connection:
            await server.engine.submitted.wait()
            # Without the answer's memory, a call is over as soon as its results are there.
            for _ in range(50):
                await asyncio.sleep(0.01)
            held = server.engine.memory.held
            assert held > 0
            await server.inference.Embed(inference_pb2.EmbedRequest(inputs=inputs))
            assert server.engine.memory.held == held
        for _ in range(500):
            if not server.engine.memory.held:
                break
            await asyncio.sleep(0.01)
        assert server.engine.memory.held == 0


def test_growing_answers_of_several_tenants_share_the_limit() -> None:
    memory = AnswerMemory(100)
    assert memory.hold(50, b"a")
    assert memory.hold(50, b"b")
    assert not memory.hold(1, b"a")
    assert memory.hold(1, b"c")
    memory.hold(-50, b"b")
    assert memory.hold(20, b"a")


def test_answers_for_one_token_leave_a_quarter_of_the_memory_for_others() -> None:
    engine = FakeEngine()
    engine.memory = memory = AnswerMemory(100)
    backend = fake_backend(engine, FakeRegistry(), FakeMerger(), FakeFuser())

    def call_of(tenant: bytes) -> Call:
        call = Call.begin("x", [], Metrics())
        call.tenant = tenant
        return call

    calls = [call_of(b"alice"), call_of(b"alice"), call_of(b"bob")]
    # Alice's requests and her answers share one limit.
    memory.hold(25, b"alice")
    keep(backend, calls[0], 20)
    keep(backend, calls[1], 30)
    # A quarter is free, but not for her.
    late = call_of(b"alice")
    with pytest.raises(BudgetExceededError):
        keep(backend, late, 1)
    late.finish(Code.OK)
    keep(backend, calls[2], 25)
    assert (memory.held, memory.held_of(b"alice"), memory.held_of(b"bob")) == (100, 75, 25)
    with pytest.raises(BudgetExceededError):
        keep(backend, calls[0], 1)
    for call in calls:
        call.finish(Code.OK)
    assert (memory.held, memory.held_of(b"alice"), memory.held_of(b"bob")) == (25, 25, 0)


GENERATE = "/turret.v1.Inference/Generate"
ROUNDS = 40
# The collector's first threshold is divided by this, so that few requests reach it.
DIVISOR = 200


@pytest.fixture
def frozen_heap() -> Iterator[int]:
    """The collector with a server's settings at a small scale; returns its first threshold."""
    thresholds = gc.get_threshold()
    cli._collect_rarely()
    cli._freeze_heap()
    first, *others = gc.get_threshold()
    gc.set_threshold(first // DIVISOR, *others)
    yield first // DIVISOR
    gc.set_threshold(*thresholds)
    gc.unfreeze()


async def most_gathered(ask: Callable[[], Awaitable[None]]) -> int:
    """The maximum growth of the number of objects during ``ROUNDS`` of requests."""
    for _ in range(4):
        await ask()
    gc.collect()
    before, most = len(gc.get_objects()), 0
    for _ in range(ROUNDS):
        await ask()
        most = max(most, len(gc.get_objects()) - before)
    return most


BODIES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("/v1/completions", {"model": "base", "prompt": "a"}, 200),
    ("/v1/completions", {"model": "base", "prompt": "a", "temperature": "x"}, 400),
    ("/v1/chat/completions", {"model": "base", "messages": [{}]}, 400),
    ("/v1/completions", {"model": "Nothing!", "prompt": "a"}, 404),
    ("/v1/nothing", {}, 404),
)


async def test_objects_of_http_requests_do_not_accumulate(frozen_heap: int) -> None:
    async with http_harness() as server:

        async def ask() -> None:
            for path, body, status in BODIES:
                assert (await server.post(path, body)).status_code == status
            await server.settle()

        assert await most_gathered(ask) < 4 * frozen_heap


async def test_objects_of_grpc_calls_do_not_accumulate(frozen_heap: int) -> None:
    async with harness() as server:

        async def ask() -> None:
            for _ in range(2):
                await server.inference.Generate(inference_pb2.GenerateRequest(prompt="a"))
                bad = inference_pb2.GenerateRequest(prompt="a", request_id="x" * 200)
                failure = await failure_of(server.inference.Generate(bad))
                assert failure.code is grpc.StatusCode.INVALID_ARGUMENT

        assert await most_gathered(ask) < 4 * frozen_heap


async def test_calls_without_a_token_leave_few_objects_for_the_collector() -> None:
    """A client without a token can send thousands of calls per second."""
    count, message = 50, inference_pb2.GenerateRequest(prompt="a").SerializeToString()
    async with harness(tokens=tokens_of("alice")) as server:

        def ask() -> None:
            for _ in range(count):
                assert raw_grpc.unary(server.rpc.address, GENERATE, message, [], 10.0) is None

        await asyncio.to_thread(ask)
        gc.collect()
        gc.disable()
        try:
            before = len(gc.get_objects())
            await asyncio.to_thread(ask)
            assert len(gc.get_objects()) - before < 15 * count
        finally:
            gc.enable()
