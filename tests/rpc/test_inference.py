"""The data plane in process: answers, validation, cancellation, deadlines, bad bytes."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import grpc
import pytest
from servers.fakes import VOCAB_SIZE, endless, saying
from servers.rpc_harness import Harness, failure_of, soon

from turret.server.engine.scheduling.request import FinishReason
from turret.v1 import adapters_pb2, inference_pb2

Generate = inference_pb2.GenerateRequest
MIX = [
    adapters_pb2.AdapterWeight(name="sql"),
    adapters_pb2.AdapterWeight(name="json", weight=-0.5, generation=3),
    adapters_pb2.AdapterWeight(name="off", weight=0),
]


async def test_generate_returns_the_joined_chunks_of_generate_stream(server: Harness) -> None:
    message = Generate(
        prompt="ab",
        adapters=MIX,
        options=inference_pb2.ResponseOptions(logprobs=True, token_ids=True, echo=True),
        request_id="mine",
    )
    chunks = [chunk async for chunk in server.inference.GenerateStream(message)]
    whole = await server.inference.Generate(message)
    assert [chunk.text for chunk in chunks] == ["ab", "H", "i"]
    assert [chunk.finish_reason for chunk in chunks] == [0, 0, inference_pb2.GenerateResponse.STOP]
    assert {chunk.request_id for chunk in chunks} == {"mine"}
    assert whole.text == "abHi"
    assert list(whole.token_ids) == [97, 98, 72, 105]
    assert [t.token_id for t in whole.logprobs] == [97, 98, 72, 105]
    assert not whole.logprobs[0].HasField("logprob")
    assert whole.logprobs[2].logprob == -0.5
    assert whole.finish_reason == inference_pb2.GenerateResponse.STOP
    assert whole.usage == inference_pb2.Usage(prompt_tokens=2, cached_tokens=1, completion_tokens=2)
    assert [(u.name, u.generation, u.weight) for u in whole.adapters_used] == [
        ("sql", 1, 1.0),
        ("json", 3, -0.5),
        ("off", 1, 0.0),
    ]
    assert whole.timing.total.ToTimedelta().total_seconds() == 1.75
    assert whole.timing.queue.ToTimedelta().total_seconds() == 0.25
    assert whole.request_id == "mine"


def test_a_chunk_is_wire_compatible_with_a_response() -> None:
    chunk = inference_pb2.GenerateChunk.DESCRIPTOR.fields
    response = inference_pb2.GenerateResponse.DESCRIPTOR.fields
    assert [(f.name, f.number, f.type) for f in chunk] == [
        (f.name, f.number, f.type) for f in response
    ]


async def test_unset_scalars_are_defaults_and_set_zeros_are_zeros(server: Harness) -> None:
    await server.inference.Generate(Generate(prompt="a"))
    await server.inference.Generate(
        Generate(
            prompt="a",
            sampling=inference_pb2.SamplingParams(
                temperature=0, top_k=0, seed=0, logit_bias={5: -2.0}
            ),
            stop=inference_pb2.StopConditions(
                max_tokens=3, stop_strings=["x"], stop_token_ids=[7], ignore_eos=True
            ),
        )
    )
    plain, explicit = server.engine.requests
    assert (plain.sampling.temperature, plain.sampling.seed) == (1.0, None)
    assert (plain.stop.max_tokens, plain.deadline, plain.adapters) == (None, None, ())
    assert (explicit.sampling.temperature, explicit.sampling.seed) == (0.0, 0)
    assert explicit.sampling.logit_bias == {5: -2.0}
    assert (explicit.stop.max_tokens, explicit.stop.stop_strings) == (3, ("x",))
    assert (explicit.stop.stop_token_ids, explicit.stop.ignore_eos) == ({7}, True)


async def test_text_chats_and_token_ids_become_tokens(server: Harness) -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    long_text = "word " * 5000
    await server.inference.Generate(Generate(chat=chat))
    await server.inference.Generate(Generate(token_ids=inference_pb2.TokenIds(ids=[1, 2])))
    await server.inference.Generate(Generate(prompt=long_text))
    prompts = [request.prompt_token_ids for request in server.engine.requests]
    assert prompts == [tuple(b"user:hi;"), (1, 2), tuple(long_text.encode())]


@pytest.mark.parametrize("listed", [True, False])
async def test_a_stop_token_is_reported_only_if_the_request_named_it(
    listed: bool, server: Harness
) -> None:
    stop = inference_pb2.StopConditions(stop_token_ids=[7] if listed else [8])
    server.engine.script = saying("H", stop=7)
    answer = await server.inference.Generate(Generate(prompt="a", stop=stop))
    assert answer.WhichOneof("stop") == ("stop_token_id" if listed else None)
    server.engine.script = saying("H", stop="END")
    assert (await server.inference.Generate(Generate(prompt="a"))).stop_string == "END"


async def test_every_offending_field_is_listed_at_once(server: Harness) -> None:
    message = Generate(
        adapters=[
            adapters_pb2.AdapterWeight(name="Bad Name"),
            adapters_pb2.AdapterWeight(name="a", weight=math.nan),
            adapters_pb2.AdapterWeight(name="a"),
        ],
        sampling=inference_pb2.SamplingParams(
            temperature=-1, top_p=0, min_p=math.nan, logit_bias={VOCAB_SIZE: 1.0, 3: math.inf}
        ),
        stop=inference_pb2.StopConditions(
            max_tokens=0, stop_strings=[""], stop_token_ids=[1, VOCAB_SIZE]
        ),
        options=inference_pb2.ResponseOptions(top_n=21),
        request_id="line\nbreak",
    )
    failure = await failure_of(server.inference.Generate(message))
    assert not server.engine.requests
    # A call is counted after its client has the answer, but before the next call is answered.
    await server.inference.GetModel(inference_pb2.GetModelRequest())
    # The rejected call named only unregistered adapters.
    assert server.sample("turret_requests_total", adapter="other", code="INVALID_ARGUMENT") == 1
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.reason == "INVALID_REQUEST"
    assert set(failure.violations) == {
        "input",
        "adapters[0].name",
        "adapters[1].weight",
        "adapters[2].name",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.min_p",
        "sampling.logit_bias",
        "stop.max_tokens",
        "stop.stop_strings",
        "stop.stop_token_ids[1]",
        "options.top_n",
        "request_id",
    }


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"prompt": ""}, "input"),
        ({"chat": {}}, "chat.messages"),
        ({"chat": {"messages": [{"content": "x"}]}}, "chat.messages[0].role"),
        ({"token_ids": {}}, "token_ids.ids"),
        ({"token_ids": {"ids": [1, VOCAB_SIZE]}}, "token_ids.ids[1]"),
        ({"prompt": "a", "stop": {"min_tokens": 3, "max_tokens": 2}}, "stop.min_tokens"),
        ({"prompt": "a", "options": {"top_n": 2}}, "options.top_n"),
        ({"prompt": "a", "adapters": [{"name": f"a{n}"} for n in range(65)]}, "adapters"),
    ],
)
async def test_an_invalid_field_is_reported(
    fields: dict[str, Any], path: str, server: Harness
) -> None:
    failure = await failure_of(server.inference.GenerateStream(Generate(**fields)))
    await server.inference.Generate(Generate(prompt="still serving"))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(failure.violations) == [path]


async def test_score_and_tokenize_and_get_model(server: Harness) -> None:
    score = await server.inference.Score(
        inference_pb2.ScoreRequest(prompt="abc", adapters=MIX[:1], top_n=2)
    )
    bad = await failure_of(server.inference.Score(inference_pb2.ScoreRequest(prompt="a", top_n=21)))
    (request,) = server.engine.requests
    tokens = await server.inference.Tokenize(inference_pb2.TokenizeRequest(prompt="hé"))
    text = await server.inference.Tokenize(
        inference_pb2.TokenizeRequest(token_ids=inference_pb2.TokenIds(ids=[104, 105]))
    )
    model = await server.inference.GetModel(inference_pb2.GetModelRequest())
    assert [t.token_id for t in score.tokens] == [97, 98, 99]
    assert [t.HasField("logprob") for t in score.tokens] == [False, True, True]
    assert score.adapters_used[0].name == "sql"
    assert score.usage.prompt_tokens == 3
    assert (request.score, request.options.top_n, request.options.logprobs) == (True, 2, True)
    assert list(bad.violations) == ["top_n"]
    assert list(tokens.token_ids) == list("hé".encode())
    assert (tokens.text, text.text) == ("hé", "hi")
    assert list(tokens.token_texts) == [
        "h",
        "\N{REPLACEMENT CHARACTER}",
        "\N{REPLACEMENT CHARACTER}",
    ]
    assert (model.vocab_size, model.quantization) == (VOCAB_SIZE, "nf4")
    assert list(model.methods) == ["dora", "loha", "lora"]
    assert model.server_version


async def test_request_ids_are_returned_in_the_trailers(server: Harness) -> None:

    async def echoed(message: Any, *metadata: tuple[str, str]) -> str:
        call = server.inference.Generate(message, metadata=metadata)
        await call
        return dict(await call.trailing_metadata())["x-request-id"]

    assert await echoed(Generate(prompt="a"), ("x-request-id", "r-1")) == "r-1"
    field_wins = Generate(prompt="a", request_id="field")
    assert await echoed(field_wins, ("x-request-id", "r-1")) == "field"
    made = await echoed(Generate(prompt="a"))
    assert len(made) == 32
    assert await echoed(Generate(prompt="a"), ("x-request-id", "x" * 129)) != "x" * 129
    assert server.engine.requests[2].request_id == made


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_cancelled_call_cancels_the_request(streaming: bool, server: Harness) -> None:
    server.engine.script = endless
    message = Generate(prompt="a", adapters=MIX[:1])
    if streaming:
        call = server.inference.GenerateStream(message)
        assert (await call.read()).text == "H"
    else:
        call = asyncio.ensure_future(server.inference.Generate(message))
        await soon(server.engine.submitted)
    call.cancel()
    assert await soon(server.engine.streams[0].cancelled) < 1.0
    server.metrics.adapter_registered("sql")
    await server.inference.GetModel(inference_pb2.GetModelRequest())
    assert server.sample("turret_requests_total", adapter="other", code="CANCELLED") == 1


async def test_a_vanished_client_cancels_the_request(server: Harness) -> None:
    server.engine.script = endless
    other = grpc.aio.insecure_channel(server.rpc.address)
    call = other.unary_stream(
        "/turret.v1.Inference/GenerateStream",
        request_serializer=Generate.SerializeToString,
        response_deserializer=inference_pb2.GenerateChunk.FromString,
    )(Generate(prompt="a"))
    await call.read()
    await other.close()
    await soon(server.engine.streams[0].cancelled)


async def test_a_deadline_reaches_the_engine_and_ends_the_call(server: Harness) -> None:
    server.engine.script = endless
    started = time.monotonic()
    failure = await failure_of(server.inference.GenerateStream(Generate(prompt="a"), timeout=0.3))
    assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
    (request,) = server.engine.requests
    assert request.deadline == pytest.approx(started + 0.3, abs=0.2)
    await soon(server.engine.streams[0].cancelled)
    await server.inference.GetModel(inference_pb2.GetModelRequest())
    assert server.sample("turret_requests_total", adapter="base", code="DEADLINE_EXCEEDED") == 1


async def test_a_request_that_the_engine_ends_at_its_deadline_is_deadline_exceeded(
    server: Harness,
) -> None:
    server.engine.script = saying("H", reason=FinishReason.DEADLINE)
    call = aiter(server.inference.GenerateStream(Generate(prompt="a")))
    # The text so far still arrives.
    assert (await anext(call)).finish_reason == inference_pb2.GenerateResponse.DEADLINE
    for failing_call in (call, server.inference.Generate(Generate(prompt="a"))):
        failure = await failure_of(failing_call)
        assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert failure.reason == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize(
    "data", [b"\x0a\x02\xff\xfe", b"\xff\xff\xff", b"\x0a\x7f"], ids=["utf-8", "tag", "short"]
)
async def test_malformed_bytes_are_the_clients_fault(data: bytes, server: Harness) -> None:
    for path in ("Inference/Generate", "Adapters/LoadAdapter"):
        call = server.channel.unary_unary(f"/turret.v1.{path}")(data)
        assert (await failure_of(call)).code is grpc.StatusCode.INVALID_ARGUMENT
    stream = server.channel.unary_stream("/turret.v1.Inference/GenerateStream")(data)
    assert (await failure_of(stream)).code is grpc.StatusCode.INVALID_ARGUMENT
    check = server.channel.unary_unary("/grpc.health.v1.Health/Check")(data)
    assert (await failure_of(check)).code is grpc.StatusCode.INVALID_ARGUMENT
    await server.inference.Generate(Generate(prompt="still serving"))


async def test_an_oversize_message_and_an_unknown_method_are_refused(server: Harness) -> None:
    failure = await failure_of(server.inference.Generate(Generate(prompt="x" * (5 << 20))))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    unknown = server.channel.unary_unary("/turret.v1.Inference/Nothing")(b"")
    assert (await failure_of(unknown)).code is grpc.StatusCode.UNIMPLEMENTED
    await server.inference.Generate(Generate(prompt="still serving"))


async def test_a_burst_of_calls_is_answered_in_full(server: Harness) -> None:
    """With more calls than its own limit, gRPC would cancel some."""
    texts = [inference_pb2.TokenizeRequest(prompt="a b")] * 3500
    replies = await asyncio.gather(
        *(server.inference.Tokenize(text) for text in texts), return_exceptions=True
    )
    failed = [reply for reply in replies if isinstance(reply, BaseException)]
    assert not failed, (len(failed), failed[0])
