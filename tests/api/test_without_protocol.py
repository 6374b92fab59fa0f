"""``server/api`` without a protocol: answers, counts, log lines, errors."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from checkout import ROOT
from servers.fakes import (
    FakeEngine,
    FakeFuser,
    FakeMerger,
    FakeRegistry,
    endless,
    fake_backend,
    finish,
)

from turret.server import errors, log
from turret.server.api.access import TokenTable, authorize
from turret.server.api.admin import Adapters
from turret.server.api.call import Call, fault_of
from turret.server.api.gate import ServingGate
from turret.server.api.inference import Inference
from turret.server.basics.codes import Code
from turret.server.engine.scheduling.request import FinishReason, Output, Request
from turret.server.errors import InvalidRequestError
from turret.server.metrics import Metrics
from turret.server.words import say
from turret.v1 import adapters_pb2, inference_pb2
from turret.v1 import adapters_pb2 as pb

Generate = inference_pb2.GenerateRequest


@dataclass
class Parts:
    """All parts behind the protocols."""

    gate: ServingGate = field(default_factory=ServingGate)
    engine: FakeEngine = field(default_factory=FakeEngine)
    registry: FakeRegistry = field(default_factory=FakeRegistry)
    merger: FakeMerger = field(default_factory=FakeMerger)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.inference, self.adapters = Inference(self.gate), Adapters(self.gate)
        self.gate.open(fake_backend(self.engine, self.registry, self.merger, FakeFuser()))

    def begin(self, *sent_ids: str | bytes, is_counted: bool = True) -> Call:
        return Call.begin("POST /v1/x", sent_ids, self.metrics, is_counted=is_counted)

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
async def parts() -> AsyncIterator[Parts]:
    made = Parts()
    yield made
    made.adapters.close()


def test_no_protocol_is_loaded() -> None:
    script = (
        "import sys\nimport turret.server.api.inference\n"
        "import turret.server.api.admin, turret.server.api.access\n"
        "print([m for m in ('grpc', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.stdout == "[]\n"


async def test_an_answer_is_counted_and_logged_when_its_call_is_finished(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    parts.metrics.adapter_registered("sql")
    call = parts.begin("r-1")
    message = Generate(prompt="abc", adapters=[pb.AdapterWeight(name="sql")])
    call.deadline = deadline = time.monotonic() + 60
    texts = [chunk.text async for chunk in parts.inference.generate(message, call)]
    assert texts == ["H", "i"]
    (request,) = parts.engine.requests
    assert (request.request_id, request.deadline) == ("r-1", deadline)
    labels = {"adapter": "sql", "code": "OK"}
    assert parts.sample("turret_requests_total", **labels) is None
    with caplog.at_level(logging.INFO, "turret.server.api"):
        call.finish(Code.OK)
    assert parts.sample("turret_requests_total", **labels) == 1
    assert parts.sample("turret_prompt_tokens_total", adapter="sql") == 3
    assert parts.sample("turret_generated_tokens_total", adapter="sql") == 2
    (record,) = caplog.records
    said: dict[str, Any] = record.__dict__["fields"]
    assert record.message == "call finished"
    assert (said["method"], said["code"], said["adapters"]) == ("POST /v1/x", "OK", "sql")
    assert (said["prompt_tokens"], said["generated_tokens"]) == (3, 2)


async def test_a_call_that_is_not_counted_is_only_logged(parts: Parts) -> None:
    call = parts.begin(is_counted=False)
    answer = await parts.inference.tokenize(inference_pb2.TokenizeRequest(prompt="a"), call)
    assert list(answer.token_ids) == [97]
    call.finish(Code.OK)
    assert parts.sample("turret_requests_total", adapter="base", code="OK") is None


async def test_the_request_id_of_a_message_replaces_that_of_its_call(parts: Parts) -> None:
    call = parts.begin(b"\xff", "bad\nid", "", "good")
    assert call.request_id == log.request_id.get() == "good"
    await parts.inference.generate_whole(Generate(prompt="a", request_id="own"), call)
    assert call.request_id == log.request_id.get() == "own"
    assert len(parts.begin().request_id) == 32


@pytest.mark.parametrize("how", ["close", "cancel", "finish"])
async def test_the_engine_releases_a_call_that_ends_early(parts: Parts, how: str) -> None:
    parts.engine.script = endless
    call = parts.begin()
    chunks = parts.inference.generate(Generate(prompt="a"), call)
    assert (await anext(chunks)).text == "H"
    stream = parts.engine.streams[0]
    assert not stream.cancelled.is_set()
    if how == "close":
        await chunks.aclose()
    elif how == "cancel":
        waiting = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    else:
        # The iterator is neither consumed nor closed.
        call.finish(Code.CANCELLED)
    assert stream.cancelled.is_set()
    if how != "finish":
        call.finish(Code.CANCELLED)
    else:
        await chunks.aclose()
    assert parts.sample("turret_requests_total", adapter="base", code="CANCELLED") == 1


async def test_a_deadline_is_an_error_after_the_last_chunk(parts: Parts) -> None:
    async def late(request: Request) -> AsyncIterator[Output]:
        yield Output(text="H", finish=finish(request, FinishReason.DEADLINE))

    parts.engine.script = late
    chunks = parts.inference.generate(Generate(prompt="a"), parts.begin())
    assert (await anext(chunks)).finish_reason == inference_pb2.GenerateResponse.DEADLINE
    with pytest.raises(errors.DeadlineExceededError):
        await anext(chunks)


async def test_a_closed_gate_and_an_invalid_message_raise_turret_errors(parts: Parts) -> None:
    with pytest.raises(errors.InvalidRequestError) as bad:
        await parts.inference.score(inference_pb2.ScoreRequest(top_n=21), parts.begin())
    assert {path for path, _ in fault_of(bad.value).violations} == {"input", "top_n"}
    parts.gate.close(say("SHUTTING_DOWN"))
    with pytest.raises(errors.UnavailableError) as closed:
        parts.inference.model()
    fault = fault_of(closed.value)
    assert (fault.code, fault.retry_after_seconds) == (Code.UNAVAILABLE, 1.0)
    with pytest.raises(errors.UnavailableError):
        await parts.adapters.pin(pb.PinAdapterRequest(name="a"), parts.begin())


async def test_private_names_are_in_no_list(parts: Parts) -> None:
    call, name = parts.begin(is_counted=False), f"training/{'a1' * 16}/0"
    for each in (name, "a"):
        await parts.adapters.load(pb.LoadAdapterRequest(name=each, path=each), call)
    page = await parts.adapters.list_page(pb.ListAdaptersRequest(), call)
    assert ([a.name for a in page.adapters], page.total_size) == (["a"], 1)
    assert [record.name for record in await parts.adapters.records(call)] == ["a"]
    found = await parts.adapters.find("a", 9, call)
    assert ([a.name for a in found.shown], found.num_matching, found.num_all) == (["a"], 1, 1)
    # Their own client knows the name.
    assert (await parts.adapters.get(pb.GetAdapterRequest(name=name), call)).name == name


async def test_adapters_are_loaded_listed_pinned_and_unloaded(parts: Parts) -> None:
    call = parts.begin(is_counted=False)
    for name in ("a", "b", "c"):
        await parts.adapters.load(pb.LoadAdapterRequest(name=name, path=name), call)
    assert call.adapters == ("c",)
    page = await parts.adapters.list_page(pb.ListAdaptersRequest(page_size=2), call)
    assert [a.name for a in page.adapters] == ["a", "b"]
    token = page.next_page_token
    asked = pb.ListAdaptersRequest(page_size=2, page_token=token)
    page = await parts.adapters.list_page(asked, call)
    assert ([a.name for a in page.adapters], page.total_size) == (["c"], 3)
    assert (await parts.adapters.pin(pb.PinAdapterRequest(name="b"), call)).pinned
    await parts.adapters.unload(pb.UnloadAdapterRequest(name="a"), call)
    assert parts.registry.unloads == [("a", "DRAIN", 30.0)]
    state = await parts.adapters.merge(
        pb.MergeAdaptersRequest(adapters=[pb.AdapterWeight(name="b")]), call
    )
    assert state == parts.adapters.merge_state()


async def test_a_caller_that_disconnects_cancels_its_merge(parts: Parts) -> None:
    parts.merger.is_slow = True
    message = pb.MergeAdaptersRequest(adapters=[pb.AdapterWeight(name="b")])
    merging = asyncio.ensure_future(parts.adapters.merge(message, parts.begin()))
    assert await asyncio.to_thread(parts.merger.begun.wait, 5)
    merging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await merging
    assert await asyncio.to_thread(parts.merger.withdrawn.wait, 5)


def test_each_turret_service_requires_its_role_and_others_none() -> None:
    tokens = TokenTable([("t", frozenset({"inference"}))])
    authorize(tokens, "turret.v1.Inference", "Bearer t")
    authorize(None, "turret.v1.Adapters", None)
    authorize(tokens, "grpc.health.v1.Health", None)
    with pytest.raises(errors.PermissionDeniedError):
        authorize(tokens, "turret.v1.Adapters", "bearer t")
    for sent in (None, b"Bearer t", "t", "Basic t", "Bearer u"):
        with pytest.raises(errors.UnauthenticatedError):
            authorize(tokens, "turret.v1.Inference", sent)


# The log line of a rejected call.


def finished(
    caplog: pytest.LogCaptureFixture, call: Call, code: Code = Code.INVALID_ARGUMENT
) -> dict[str, Any]:
    """The fields of the line that is logged at the end of a call."""
    with caplog.at_level(logging.INFO, "turret.server.api"):
        call.finish(code)
    (record,) = caplog.records
    assert "secret" not in str(record.__dict__["fields"])
    return record.__dict__["fields"]


def test_only_the_fields_of_a_refused_call_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    call = Call.begin("/x/Generate", (), Metrics())
    found = [
        ("stop.stop_strings[0]", "must be text, not 'secret'"),
        ("messages[3].content", "secret"),
        # Parts of a schema and keys of a body are private data of the client.
        ("json_schema.properties.secret", "is no schema"),
        ("secret.temperature", "is no field"),
    ]
    call.fail("INVALID_REQUEST", "stop: must be text, not 'secret'", violations=found)
    said = finished(caplog, call)
    assert (said["code"], said["reason"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert said["fields"] == "stop.stop_strings,messages.content,json_schema"


def test_numeric_metadata_of_an_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    call = Call.begin("/x/Generate", (), Metrics())
    metadata = {"prompt_tokens": "9", "max_model_len": "8", "unit": "secret", "path": "a/b"}
    call.fail("PROMPT_TOO_LONG", "9 secret tokens", metadata=metadata)
    said = finished(caplog, call)
    assert (said["prompt_tokens"], said["max_model_len"], said["path"]) == (9, 8, "a/b")
    assert "unit" not in said


def test_values_sent_by_a_client_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    call = Call.begin("/x/Generate", (), Metrics())
    bad = InvalidRequestError.of("stop", say("NOT_ONE_OF", value="4711", choices="a", closest="b"))
    call.fail(bad.reason, bad.message, violations=bad.violations, metadata=bad.metadata)
    said = finished(caplog, call)
    assert (said["reason"], said["fields"]) == ("INVALID_REQUEST", "stop")
    assert not {"value", "choices", "closest"} & said.keys()


def test_an_adapter_is_logged_by_name_if_it_is_registered(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    metrics.adapter_registered("sql")
    call = Call.begin("/x/Generate", (), metrics)
    call.about([adapters_pb2.AdapterWeight(name=name) for name in ("sql", "a secret")])
    call.fail("ADAPTER_NOT_FOUND", "no a secret", metadata={"adapters": "a secret"})
    assert finished(caplog, call, Code.NOT_FOUND)["adapters"] == "sql,?"


def test_a_call_that_succeeds_has_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    call = Call.begin("/x/Generate", (), Metrics())
    with caplog.at_level(logging.INFO, "turret.server.api"):
        call.finish(Code.OK)
    said: dict[str, Any] = caplog.records[0].__dict__["fields"]
    assert not {"reason", "fields"} & said.keys()
    # The value is a number in a JSON log, as in all other lines.
    assert isinstance(said["seconds"], float)
