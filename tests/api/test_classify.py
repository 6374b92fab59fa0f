"""Classify over both protocols, on a simulated engine."""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from servers.fakes import finish
from servers.http_harness import http_harness
from servers.rpc_harness import failure_of, harness

from turret.server.adapters.adapter import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Head
from turret.server.api import inference
from turret.server.api.inference import probabilities
from turret.server.engine.scheduling.request import Output, Pooling, Request
from turret.server.errors import InvalidRequestError
from turret.server.http import texts as texts_module
from turret.v1 import adapters_pb2, inference_pb2

Classify, Input = inference_pb2.ClassifyRequest, inference_pb2.Input
SQL = [adapters_pb2.AdapterWeight(name="sql")]
PATH = "/classify"


def texts(*prompts: str) -> Any:
    return Classify(inputs=[Input(prompt=prompt) for prompt in prompts], adapters=SQL)


async def test_every_input_gets_its_label() -> None:
    async with harness() as server:
        answer = await server.inference.Classify(texts("abcd", "xyz"))
        requests = server.engine.requests
        failure = await failure_of(server.inference.Classify(Classify(request_id="a\nb")))
        await server.inference.GetModel(inference_pb2.GetModelRequest())
        assert server.sample("turret_requests_total", adapter="other", code="OK") == 1
        assert set(failure.violations) == {"inputs", "request_id"}
    assert [each.label for each in answer.classifications] == ["long", "long"]
    scores = answer.classifications[1].scores
    assert [(score.label, score.logit) for score in scores] == [("long", 3.0), ("short", 1.0)]
    share = math.exp(2) / (1 + math.exp(2))
    assert [score.probability for score in scores] == pytest.approx([share, 1 - share])
    assert {request.pooling for request in requests} == {Pooling(classifies=True)}
    assert answer.usage.prompt_tokens == 7


async def test_an_engine_error_about_the_mix_fails_the_whole_call() -> None:
    async with harness() as server:
        server.engine.refuse = InvalidRequestError.of("adapters", "the mix has no head")
        failure = await failure_of(server.inference.Classify(texts("a", "b")))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(failure.violations) == {"adapters"}


async def test_the_number_of_labels_per_call_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bound, 2,048 inputs with 4,096 labels each would take gigabytes."""
    monkeypatch.setattr(inference, "MAX_LABEL_SCORES", 5)
    async with harness() as server, http_harness() as web:
        assert len((await server.inference.Classify(texts("a", "b"))).classifications) == 2
        failure = await failure_of(server.inference.Classify(texts("a", "b", "c")))
        refused = await web.refused(PATH, {"model": "sql", "input": ["a", "b", "c"]})
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.reasons == {"inputs": "TOO_MANY_NUMBERS"}
    assert failure.metadata["most"] == "2"
    assert (refused.status, refused.param) == (400, "input")


async def test_a_regression_head_has_no_probabilities() -> None:
    async def numbers(request: Request) -> AsyncIterator[Output]:
        head = Head(("price",), REGRESSION)
        yield Output(pooled=array("f", [2.5]), head=head, finish=finish(request))

    async with harness() as server, http_harness() as web:
        server.engine.script = web.engine.script = numbers
        answer = await server.inference.Classify(texts("a"))
        said = (await web.post(PATH, {"model": "sql", "input": "a"})).json()
    (score,) = answer.classifications[0].scores
    assert not score.HasField("probability")
    assert score.logit == 2.5
    assert said["data"][0]["probs"] == [2.5]


def test_probabilities_of_each_kind() -> None:
    logits = array("f", [1.0, -1000.0, 1000.0])
    single, multi = (Head(("a", "b", "c"), kind) for kind in (SINGLE_LABEL, MULTI_LABEL))
    assert probabilities(single, logits) == [0.0, 0.0, 1.0]
    each = probabilities(multi, logits)
    assert each == pytest.approx([1 / (1 + math.exp(-1)), 0.0, 1.0])
    assert probabilities(Head(("a",), REGRESSION), logits[:1]) == [None]


async def test_labels_in_vllms_format() -> None:
    async with http_harness() as server:
        found = (await server.post(PATH, {"model": "sql", "input": ["abc", [1]]})).json()
        turns = [{"role": "user", "content": "hi"}]
        chat = (await server.post(PATH, {"model": "sql", "messages": turns})).json()
        for change, param in (({"input": None}, "input"), ({"input": [[]]}, "input[0]")):
            refused = await server.refused(PATH, {"model": "sql", "input": "a", **change})
            assert (refused.status, refused.param) == (400, param)
    assert found["id"].startswith("classify-")
    assert (found["object"], found["model"]) == ("list", "sql")
    assert found["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    first, second = found["data"]
    assert (first["index"], first["label"], first["num_classes"]) == (0, "long", 2)
    assert first["labels"] == ["long", "short"]
    assert sum(first["probs"]) == pytest.approx(1.0)
    assert (second["index"], second["probs"]) == (1, [0.5, 0.5])
    assert [use["name"] for use in found["adapters_used"]] == ["sql"]
    assert chat["data"][0]["label"] == "long"


async def test_many_labels_are_serialised_outside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2,048 inputs with 77 labels each take a quarter of a second."""
    threads: list[bool] = []
    write = texts_module._labels

    def watched(index: int, classification: inference_pb2.Classification) -> dict[str, Any]:
        threads.append(threading.current_thread() is threading.main_thread())
        return write(index, classification)

    monkeypatch.setattr(texts_module, "_labels", watched)
    async with http_harness() as server:
        for count, is_inline in ((2, True), (300, False)):
            threads.clear()
            answer = await server.post(PATH, {"model": "sql", "input": ["a"] * count})
            assert len(answer.json()["data"]) == count
            assert threads == [is_inline] * count
