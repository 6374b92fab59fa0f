"""Every error class has a row, and every row reaches a client as a rich status."""

from __future__ import annotations

import inspect
import logging

import grpc
import pytest
from google.rpc import error_details_pb2
from servers.fakes import failing
from servers.rpc_harness import failure_of, harness

from turret.server import errors
from turret.server.adapters.checkpoint.adapter_checkpoint import Findings
from turret.server.api.call import fault_of
from turret.server.basics.codes import Code
from turret.server.rpc.interceptor import to_rich_status
from turret.server.words import say
from turret.v1 import inference_pb2

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.TurretError)
]
CODES = {
    "TurretError": "INTERNAL",
    "InvalidRequestError": "INVALID_ARGUMENT",
    "PromptTooLongError": "INVALID_ARGUMENT",
    "AdapterClassifiesError": "INVALID_ARGUMENT",
    "HeadMissingError": "INVALID_ARGUMENT",
    "AdapterError": "FAILED_PRECONDITION",
    "AdapterNotFoundError": "NOT_FOUND",
    "AdapterExistsError": "ALREADY_EXISTS",
    "TrainingNotFoundError": "NOT_FOUND",
    "AdapterCheckpointError": "INVALID_ARGUMENT",
    "AdapterChangedError": "FAILED_PRECONDITION",
    "AdapterMismatchError": "FAILED_PRECONDITION",
    "AdapterComponentError": "FAILED_PRECONDITION",
    "AdapterGenerationError": "FAILED_PRECONDITION",
    "AdapterInUseError": "FAILED_PRECONDITION",
    "AdapterPinnedError": "FAILED_PRECONDITION",
    "AdapterBusyError": "FAILED_PRECONDITION",
    "AdapterMergedError": "FAILED_PRECONDITION",
    "AdapterUnloadedError": "ABORTED",
    "StateDirRequiredError": "FAILED_PRECONDITION",
    "MergeActiveError": "FAILED_PRECONDITION",
    "MergeUnderWayError": "FAILED_PRECONDITION",
    "NotMergedError": "FAILED_PRECONDITION",
    "ResourceError": "RESOURCE_EXHAUSTED",
    "QueueFullError": "RESOURCE_EXHAUSTED",
    "BudgetExceededError": "RESOURCE_EXHAUSTED",
    "OutOfMemoryError": "RESOURCE_EXHAUSTED",
    "StorageFullError": "RESOURCE_EXHAUSTED",
    "StorageFailedError": "UNAVAILABLE",
    "HubError": "INVALID_ARGUMENT",
    "HubUnavailableError": "UNAVAILABLE",
    "UnauthenticatedError": "UNAUTHENTICATED",
    "PermissionDeniedError": "PERMISSION_DENIED",
    "ServiceElsewhereError": "UNIMPLEMENTED",
    "UnavailableError": "UNAVAILABLE",
    "ServerStartingError": "UNAVAILABLE",
    "DeadlineExceededError": "DEADLINE_EXCEEDED",
}
PROMPT = inference_pb2.GenerateRequest(prompt="hi")


def test_violations_that_do_not_fit_are_counted() -> None:
    findings = Findings("a")
    for layer in range(200):
        findings.add(f"layers.{layer}.{'x' * 100}", say("UNKNOWN_FIELD"))
    with pytest.raises(errors.AdapterCheckpointError) as refused:
        findings.raise_if_any()
    status = to_rich_status(fault_of(refused.value))
    detail = error_details_pb2.BadRequest()
    assert any(packed.Unpack(detail) for packed in status.details)
    *listed, rest = detail.field_violations
    assert (rest.field, rest.description) == ("*", say("MORE", count=200 - len(listed)))
    assert len(refused.value.violations) > len(listed) > 10


def test_every_error_class_has_its_code() -> None:
    assert {kind.__name__: kind.code.name for kind in CLASSES} == CODES


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
async def test_each_class_reaches_the_client(kind: type[errors.TurretError]) -> None:
    error = kind(
        "it broke",
        metadata={"adapter": "sql"},
        violations=[("field", "rule")],
        retry_after_seconds=2.5,
    )
    async with harness() as server:
        server.engine.refuse = error
        on_submit = await failure_of(server.inference.Generate(PROMPT))
        server.engine.refuse = None
        server.engine.script = failing(error)
        midway = await failure_of(server.inference.GenerateStream(PROMPT))
        await server.inference.GetModel(inference_pb2.GetModelRequest())
        for failure in (on_submit, midway):
            assert failure.code.name == CODES[kind.__name__]
            assert failure.request_id
            if kind is errors.TurretError:
                assert (failure.message, failure.reason) == (say("INTERNAL"), "INTERNAL")
                assert not failure.metadata
                continue
            assert (failure.message, failure.reason) == ("it broke", kind.reason)
            assert failure.metadata == {"adapter": "sql"}
            assert failure.violations == {"field": "rule"}
            assert failure.retry_seconds == 2.5
        assert (
            server.sample("turret_requests_total", adapter="base", code=CODES[kind.__name__]) == 2
        )


async def test_transient_errors_suggest_a_delay_and_others_do_not() -> None:
    async with harness() as server:
        for kind, delay in (
            (errors.QueueFullError, 1.0),
            (errors.UnavailableError, 1.0),
            (errors.BudgetExceededError, None),
            (errors.AdapterNotFoundError, None),
        ):
            server.engine.refuse = kind("no")
            assert (await failure_of(server.inference.Generate(PROMPT))).retry_seconds == delay


async def test_a_bug_is_internal_to_the_client_and_a_traceback_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with harness() as server:
        server.engine.script = failing(ZeroDivisionError("secret detail"))
        with caplog.at_level(logging.ERROR, "turret"):
            failure = await failure_of(
                server.inference.Generate(PROMPT, metadata=(("x-request-id", "req-7"),))
            )
    assert failure.code is grpc.StatusCode.INTERNAL
    assert (failure.message, failure.request_id) == (say("INTERNAL"), "req-7")
    (record,) = [r for r in caplog.records if r.message == "internal error"]
    assert record.exc_info is not None
    assert "secret detail" in str(record.exc_info[1])


async def test_an_error_of_any_size_fits_the_headers_a_client_accepts() -> None:
    violations = [(f"config.key_{n}", "é" * 300) for n in range(500)]
    error = errors.AdapterCheckpointError(
        "\N{SNOWMAN}" * 20_000, violations=violations, metadata={"k" * 50: "v" * 10_000}
    )
    async with harness() as server:
        server.engine.refuse = error
        failure = await failure_of(server.inference.Generate(PROMPT))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "config.key_0" in failure.violations
    assert "*" in failure.violations
    assert to_rich_status(fault_of(error)).ByteSize() < 6000


def test_codes_match_grpc() -> None:
    assert {code.name: code.value for code in Code} == {
        status.name: status.value[0] for status in grpc.StatusCode
    }


def test_a_subclass_gets_the_code_of_its_parent() -> None:
    class Special(errors.QueueFullError):
        pass

    assert fault_of(Special("x")).code is Code.RESOURCE_EXHAUSTED
    assert fault_of(KeyError("x")).code is Code.INTERNAL
