"""Memory of answers that are collected before they are sent counts towards a limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from builders.bases.tiny_models import save_tiny_model
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from servers import raw_grpc
from servers.fakes import FakeEngine, FakeFuser, FakeMerger, FakeRegistry, fake_backend
from servers.rpc_harness import failure_of, harness

from turret.server.api import access
from turret.server.api.call import Call
from turret.server.api.inference_answers import keep
from turret.server.app import App
from turret.server.basics.codes import Code
from turret.server.config import (
    MIB,
    AdapterConfig,
    Config,
    ListenConfig,
    ModelConfig,
    SchedulerConfig,
)
from turret.server.engine.answer import AnswerMemory
from turret.server.errors import BudgetExceededError
from turret.server.metrics import Metrics
from turret.v1 import inference_pb2, inference_pb2_grpc

PROMPT = [60 + place % 20 for place in range(100)]
# Together they take about 2.5 MiB, each a third of a MiB.
LARGE = {"prompt": [PROMPT] * 8, "max_tokens": 0, "echo": True, "logprobs": 20}
SAMPLED = {"prompt": PROMPT[:2], "n": 16, "max_tokens": 40, "logprobs": 20, "ignore_eos": True}


@pytest.fixture
async def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[App]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    app = App(
        Config(
            model=ModelConfig(
                model=save_tiny_model("llama", tmp_path / "model"), device="cpu", dtype="float32"
            ),
            scheduler=SchedulerConfig(max_queued_bytes=MIB),
            adapters=AdapterConfig(adapter_root=tmp_path),
            listen=ListenConfig(
                address="127.0.0.1:0", http_address="127.0.0.1:0", metrics_address=None
            ),
        )
    )
    try:
        await app.startup()
        yield app
    finally:
        app.stop()
        await app.shutdown()


async def test_the_results_that_a_call_collects_are_bounded(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert app.rpc is not None
    assert app.http is not None
    backend = app.gate.enter()
    async with (
        grpc.aio.insecure_channel(app.rpc.address) as channel,
        httpx2.AsyncClient(base_url=f"http://{app.http.address}", timeout=60) as client,
    ):

        async def post(**body: Any) -> int:
            answer = await client.post("/v1/completions", json={"model": "base", **body})
            if answer.status_code != 200:
                assert answer.headers.get("retry-after") or "error" in answer.json()
            return answer.status_code

        stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[arg-type]
        echoed = LARGE | {"max_tokens": 1}
        for each in (LARGE, echoed, SAMPLED):
            assert await post(**each) == 429
            assert backend.engine.memory.held == 0
        # Some of them fit, and a streamed answer is not collected.
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
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(message)
            assert reason_of(caught.value) == "BUDGET_EXCEEDED"
        assert backend.engine.memory.held == 0


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
    for call, num_bytes in zip(calls, (20, 30, 25), strict=True):
        keep(backend, call, num_bytes)
    assert (memory.held, memory.held_of(b"alice"), memory.held_of(b"bob")) == (100, 75, 25)
    with pytest.raises(BudgetExceededError):
        keep(backend, calls[0], 1)
    for call in calls:
        call.finish(Code.OK)
    assert (memory.held, memory.held_of(b"alice"), memory.held_of(b"bob")) == (25, 25, 0)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason
    return ""
