"""Embed over both protocols, on a simulated engine."""

from __future__ import annotations

import asyncio
import base64
import struct
from array import array
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from servers.fakes import MODEL_INFO, finish, hello
from servers.http_harness import http_harness
from servers.rpc_harness import failure_of, harness

from turret.server.adapters.adapter import AdapterRef
from turret.server.api import access, inference
from turret.server.api.access import MAX_AT_A_TIME, Shares
from turret.server.api.limits import MAX_INPUTS
from turret.server.engine.scheduling.request import (
    Finish,
    FinishReason,
    Output,
    Pooling,
    PoolingKind,
    Request,
)
from turret.server.errors import AdapterNotFoundError, PromptTooLongError
from turret.v1 import adapters_pb2, inference_pb2

Embed, Input = inference_pb2.EmbedRequest, inference_pb2.Input
PATH = "/v1/embeddings"


def texts(*prompts: str, **fields: Any) -> Any:
    return Embed(inputs=[Input(prompt=prompt) for prompt in prompts], **fields)


async def test_every_input_becomes_a_vector_in_its_order() -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    message = Embed(
        inputs=[
            Input(prompt="abc"),
            Input(token_ids=inference_pb2.TokenIds(ids=[1, 2])),
            Input(chat=chat),
        ],
        adapters=[adapters_pb2.AdapterWeight(name="sql", weight=0.5)],
        request_id="mine",
    )
    async with harness() as server:
        answer = await server.inference.Embed(message)
        requests = server.engine.requests
        await server.inference.GetModel(inference_pb2.GetModelRequest())
        assert server.sample("turret_calls_total", protocol="grpc", code="OK") == 1
        # The registry of this test has no adapters.
        assert server.sample("turret_requests_total", adapter="other", code="OK") == 1
        assert server.sample("turret_prompt_tokens_total", adapter="other") == 13
    vectors = [list(each.values) for each in answer.embeddings]
    assert [vector[0] for vector in vectors] == [3, 2, 8]
    assert {len(vector) for vector in vectors} == {MODEL_INFO.hidden_size}
    assert answer.usage == inference_pb2.Usage(prompt_tokens=13, cached_tokens=3)
    assert [(use.name, use.weight) for use in answer.adapters_used] == [("sql", 0.5)]
    assert answer.timing.ttft == answer.timing.total
    assert answer.request_id == "mine"
    assert {request.pooling for request in requests} == {Pooling()}
    assert {(r.request_id, r.deadline, r.generates) for r in requests} == {("mine", None, False)}


async def test_options_reach_the_engine() -> None:
    message = texts("a", pooling=Embed.MEAN, normalize=False, dimensions=3)
    async with harness() as server:
        answer = await server.inference.Embed(message, timeout=30)
        (request,) = server.engine.requests
    assert request.pooling == Pooling(kind=PoolingKind.MEAN, dimensions=3, normalize=False)
    assert request.deadline is not None
    assert len(answer.embeddings[0].values) == 3


async def test_every_offending_field_is_listed_with_its_input() -> None:
    wrong = Embed(
        inputs=[
            Input(prompt="a"),
            Input(),
            Input(token_ids=inference_pb2.TokenIds()),
            Input(chat=inference_pb2.Chat()),
        ],
        adapters=[adapters_pb2.AdapterWeight(name="Bad Name")],
        dimensions=MODEL_INFO.hidden_size + 1,
        request_id="line\nbreak",
    )
    wrong.pooling = 9  # type: ignore[assignment]
    async with harness() as server:
        failure = await failure_of(server.inference.Embed(wrong))
        nothing = await failure_of(server.inference.Embed(Embed()))
        many = texts(*["a"] * (MAX_INPUTS + 1))
        too_many = await failure_of(server.inference.Embed(many))
        assert not server.engine.requests
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(failure.violations) == {
        *("inputs[1]", "inputs[2].token_ids.ids", "inputs[3].chat.messages"),
        *("adapters[0].name", "dimensions", "pooling", "request_id"),
    }
    assert set(nothing.violations) == set(too_many.violations) == {"inputs"}


async def test_the_vectors_of_a_call_share_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "MAX_EMBEDDING_NUMBERS", 3 * MODEL_INFO.hidden_size)
    async with harness() as server:
        assert len((await server.inference.Embed(texts(*"abc"))).embeddings) == 3
        failure = await failure_of(server.inference.Embed(texts(*"abcd")))
        assert failure.reasons == {"inputs": "TOO_MANY_NUMBERS"}
        assert failure.metadata["most"] == "3"
        assert len((await server.inference.Embed(texts(*"abcd", dimensions=6))).embeddings) == 4


async def test_a_client_with_the_default_limit_of_messages_gets_every_vector() -> None:
    async def wide(request: Request) -> AsyncIterator[Output]:
        values = array("f", [len(request.prompt_token_ids)]) * 4096
        yield Output(pooled=values, finish=finish(request))

    message = texts(*("a" * (1 + each % 9) for each in range(300)), request_id="mine")
    async with harness() as server:
        server.engine.script = wide
        parts = [part async for part in server.inference.EmbedStream(message)]
        assert server.sample("turret_requests_total", adapter="base", code="OK") == 1
    assert max(part.ByteSize() for part in parts) <= (2 << 20) + (1 << 12)
    assert [part.request_id for part in parts] == ["", "", "mine"]
    vectors = [each.values for part in parts for each in part.embeddings]
    assert [values[0] for values in vectors] == [1 + each % 9 for each in range(300)]
    assert parts[-1].usage.prompt_tokens == sum(values[0] for values in vectors)


async def test_an_input_that_is_too_long_is_named() -> None:
    async with harness() as server:
        ids = inference_pb2.TokenIds(ids=[1] * (MODEL_INFO.max_model_len + 1))
        message = Embed(inputs=[Input(prompt="a"), Input(token_ids=ids)])
        early = await failure_of(server.inference.Embed(message))
        assert not server.engine.requests
        server.engine.refuse = PromptTooLongError("prompt of 99 tokens", violations=[("input", "")])
        late = await failure_of(server.inference.Embed(texts("a", "b")))
        server.engine.refuse = AdapterNotFoundError("no adapter 'x'")
        missing = await failure_of(server.inference.Embed(texts("a", "b")))
    assert (early.reason, set(early.violations)) == ("PROMPT_TOO_LONG", {"inputs[1]"})
    assert late.reason == "PROMPT_TOO_LONG"
    assert set(late.violations) <= {"inputs[0]", "inputs[1]"}
    assert missing.code is grpc.StatusCode.NOT_FOUND


async def test_timing_covers_the_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's times leave out an input's wait for other inputs of its call."""

    async def slow(request: Request) -> AsyncIterator[Output]:
        await asyncio.sleep(0.5)
        async for output in hello(request):
            yield output

    monkeypatch.setattr(access, "MAX_AT_A_TIME", 1)
    async with harness() as server:
        server.engine.script = slow
        timing = (await server.inference.Embed(texts(*"abc"))).timing
    # For each input, the engine reports 0.25 s in the queue and 1.75 s in total. The last input
    # begins 1 s after the first.
    assert 0.25 <= timing.queue.ToTimedelta().total_seconds() < 1.25
    assert timing.total.ToTimedelta().total_seconds() >= 1.0 + 1.75


async def test_a_call_takes_and_releases_a_part_of_the_queue() -> None:
    most = running = 0
    is_full = asyncio.Event()

    async def slow(request: Request) -> AsyncIterator[Output]:
        nonlocal most, running
        running += 1
        most = max(most, running)
        # The answers begin one after the other.
        if running == MAX_AT_A_TIME:
            is_full.set()
        await is_full.wait()
        running -= 1
        async for output in hello(request):
            yield output

    async def never(request: Request) -> AsyncIterator[Output]:
        await asyncio.Event().wait()
        yield Output()

    count = 3 * MAX_AT_A_TIME
    async with harness() as server:
        server.engine.script = slow
        answer = await server.inference.Embed(texts(*["a"] * count))
        assert (len(answer.embeddings), most) == (count, MAX_AT_A_TIME)
        server.engine.script = never
        server.engine.submitted.clear()
        call = server.inference.Embed(texts("a", "b"))
        waiting = asyncio.ensure_future(asyncio.wait_for(call, 30))
        await server.engine.submitted.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        for stream in server.engine.streams[-2:]:
            await asyncio.wait_for(stream.cancelled.wait(), 10)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (FinishReason.DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED),
        (FinishReason.CANCELLED, grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_a_request_that_ends_early_fails_the_call(reason: Any, code: Any) -> None:
    async def cut(request: Request) -> AsyncIterator[Output]:
        yield Output(finish=finish(request, reason))

    async with harness() as server:
        server.engine.script = cut
        assert (await failure_of(server.inference.Embed(texts("a", "b")))).code is code


async def test_inputs_count_as_requests_of_their_party() -> None:
    async def waits(request: Request) -> AsyncIterator[Output]:
        await asyncio.sleep(0.05)
        async for output in hello(request):
            yield output

    async with http_harness(shares=Shares(per_peer=2)) as server:
        server.engine.script = waits
        body = {"model": "base", "input": ["a", "b", "c"]}
        one, other = await asyncio.gather(server.post(PATH, body), server.post(PATH, body))
        assert sorted((one.status_code, other.status_code)) == [200, 429]


async def test_vectors_in_openais_format() -> None:
    async with http_harness() as server:
        body = {"model": "sql*0.5", "input": ["abc", "d"], "pooling": "mean", "user": "u"}
        plain = (await server.post(PATH, body)).json()
        coded = (await server.post(PATH, {**body, "encoding_format": "base64"})).json()
        ids = (await server.post(PATH, {"model": "base", "input": [1, 2]})).json()
        lists = (await server.post(PATH, {"model": "base", "input": [[1], [2, 3]]})).json()
        turns = [{"role": "user", "content": "hi"}]
        chat = (await server.post(PATH, {"model": "base", "messages": turns})).json()
        requests = server.engine.requests
        assert await server.sample("turret_requests_total", adapter="base", code="OK") == 3
    assert plain["object"] == "list"
    assert plain["model"] == "sql*0.5"
    assert plain["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert [use["name"] for use in plain["adapters_used"]] == ["sql"]
    assert [(each["index"], each["object"]) for each in plain["data"]] == [
        (0, "embedding"),
        (1, "embedding"),
    ]
    assert plain["data"][0]["embedding"] == [3, *[0.125] * (MODEL_INFO.hidden_size - 1)]
    for one, other in zip(plain["data"], coded["data"], strict=True):
        raw = base64.b64decode(other["embedding"])
        values = struct.unpack(f"<{len(raw) // 4}f", raw)
        assert [float(f"{value:.9g}") for value in values] == one["embedding"]
    sizes = [[each["embedding"][0] for each in found["data"]] for found in (ids, lists, chat)]
    assert sizes == [[2], [1, 2], [8]]
    assert requests[0].pooling == Pooling(kind=PoolingKind.MEAN)
    assert requests[-1].pooling == Pooling()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a", 1]}, "input[1]"),
        ({"input": ["a", [1] * 99]}, "input[1]"),
        ({"input": [[1], [300]]}, "input[1][0]"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 9}, "dimensions"),
        ({"pooling": "max"}, "pooling"),
        ({"normalize": 1}, "normalize"),
        ({"messages": [{"role": "user", "content": "a"}]}, "input"),
        ({"input": None, "messages": []}, "messages"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"model": None}, "model"),
    ],
)
async def test_errors_use_the_clients_field_names(change: dict[str, Any], param: str) -> None:
    async with http_harness() as server:
        refused = await server.refused(PATH, {"model": "base", "input": "a", **change})
        assert (refused.status, refused.param) == (400, param), refused.message
        assert not server.engine.requests


def test_each_generation_is_reported_once() -> None:
    def ended(generation: int, cold: bool) -> Finish:
        request = Request(request_id="r", prompt_token_ids=(1,), adapters=(AdapterRef(name="a"),))
        done = finish(request)
        use = replace(done.adapters_used[0], generation=generation, cold_start=cold)
        return replace(done, adapters_used=(use,))

    found = inference.summed_fields([ended(1, False), ended(1, True), ended(2, False)])
    told = [(use.generation, use.cold_start) for use in found["adapters_used"]]
    assert told == [(1, True), (2, False)]
