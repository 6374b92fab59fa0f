"""Errors stay complete when they are passed to another process and back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import grpc
import pytest

from turret.clients import errors
from turret.clients.errors import AnswerCutError, FieldViolation, TurretRpcError
from turret.clients.messages.results import Completion
from turret.v1 import inference_pb2

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]
KINDS = [kind for kind in KINDS if issubclass(kind, TurretRpcError)]


def pickled(protocol: int) -> Callable[[TurretRpcError], TurretRpcError]:
    return lambda error: pickle.loads(pickle.dumps(error, protocol))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, *map(pickled, (0, 2, 5))])
def test_an_error_survives_pickling(kind: type[TurretRpcError], again):
    error = kind(
        grpc.StatusCode.NOT_FOUND,
        "no adapter a",
        reason="ADAPTER_NOT_FOUND",
        metadata={"adapters": "a"},
        violations=[FieldViolation("adapters[0]", "is none")],
        retry_delay=0.5,
        request_id="r-7",
    )
    error.add_note("of line 3")
    made = again(error)
    assert type(made) is kind
    assert (str(made), made.args, vars(made)) == (str(error), error.args, vars(error))


def test_a_cut_answer_keeps_its_partial_text():
    answer = inference_pb2.GenerateResponse(text="Once", token_ids=[1, 2])
    error = AnswerCutError.of(Completion.from_proto(answer))
    made = pickle.loads(pickle.dumps(error))
    assert made.completion == error.completion
    assert made.completion.text == "Once"
    assert made.is_lost
