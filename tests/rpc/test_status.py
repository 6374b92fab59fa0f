"""Errors as rich statuses, and the definition of the API."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from checkout import ROOT
from google.rpc import error_details_pb2
from servers.fakes import failing
from servers.rpc_harness import Harness, eventually, failure_of

from turret.server import errors
from turret.server.adapters.checkpoint import Findings
from turret.server.api.call import fault_of
from turret.server.basics.codes import Code
from turret.server.log import LineFormatter
from turret.server.rpc import to_rich_status
from turret.server.words import say
from turret.v1 import adapters_pb2, inference_pb2

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.TurretError)
]
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


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
async def test_each_class_reaches_the_client(
    kind: type[errors.TurretError], server: Harness
) -> None:
    error = kind(
        "it broke",
        metadata={"adapter": "sql"},
        violations=[("field", "rule")],
        retry_after_seconds=2.5,
    )
    server.engine.refuse = error
    on_submit = await failure_of(server.inference.Generate(PROMPT))
    server.engine.refuse = None
    server.engine.script = failing(error)
    midway = await failure_of(server.inference.GenerateStream(PROMPT))
    await server.inference.GetModel(inference_pb2.GetModelRequest())
    for failure in (on_submit, midway):
        assert failure.code.name == kind.code.name
        assert failure.request_id
        if kind is errors.TurretError:
            assert (failure.message, failure.reason) == (say("INTERNAL"), "INTERNAL")
            assert not failure.metadata
            continue
        assert (failure.message, failure.reason) == ("it broke", kind.reason)
        assert failure.metadata == {"adapter": "sql"}
        assert failure.violations == {"field": "rule"}
        assert failure.retry_seconds == 2.5
    assert server.sample("turret_requests_total", adapter="base", code=kind.code.name) == 2


async def test_transient_errors_suggest_a_delay_and_others_do_not(server: Harness) -> None:
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
    server: Harness,
) -> None:
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


async def test_a_call_that_ends_while_its_answer_is_written_is_no_internal_error(
    caplog: pytest.LogCaptureFixture, server: Harness
) -> None:
    server.engine.script = failing(grpc.aio.InternalError("no longer open"))
    with caplog.at_level(logging.INFO, "turret"):
        call = server.inference.Generate(PROMPT)

        async def is_counted() -> bool:
            return server.sample("turret_requests_total", adapter="base", code="CANCELLED") == 1

        await eventually(is_counted)
    call.cancel()
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    (record,) = [r for r in caplog.records if r.message == "call ended by gRPC"]
    assert "no longer open" in LineFormatter().format(record)


async def test_an_error_of_any_size_fits_the_headers_a_client_accepts(server: Harness) -> None:
    violations = [(f"config.key_{n}", "é" * 300) for n in range(500)]
    error = errors.AdapterCheckpointError(
        "\N{SNOWMAN}" * 20_000, violations=violations, metadata={"k" * 50: "v" * 10_000}
    )
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


PROTO = ROOT / "proto"
SOURCES = tuple(
    f"turret/v1/{name}.proto" for name in ("adapters", "inference", "tinker", "training")
)


def test_generated_code_is_up_to_date(tmp_path: Path):
    grpc_tools = pytest.importorskip("grpc_tools")
    version = importlib.metadata.version("grpcio-tools")
    # Other versions generate other bytes; pyproject.toml pins the required one.
    assert version == "1.75.1", f"generate with the pinned grpcio-tools, not {version}"
    outputs = (f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python"))
    subprocess.run(
        [sys.executable, "-m", f"{grpc_tools.__name__}.protoc", f"-I{PROTO}", *outputs, *SOURCES],
        cwd=PROTO,
        check=True,
    )
    fresh = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*_pb2*.py*")}
    committed = {
        p.relative_to(PROTO): p.read_bytes()
        for p in PROTO.rglob("*_pb2*.py*")
        if p.suffix in (".py", ".pyi")
    }
    assert len(fresh) == 3 * len(SOURCES)
    assert committed == fresh


def test_every_proto_file_is_generated():
    assert sorted(SOURCES) == sorted(str(p.relative_to(PROTO)) for p in PROTO.rglob("*.proto"))


def test_zero_is_distinguished_from_unset():
    """Scalars have presence if 0 is a valid value other than the default."""
    for message in (inference_pb2.SamplingParams, inference_pb2.StopConditions):
        for field in message.DESCRIPTOR.fields:
            assert field.is_repeated or field.has_presence, field.full_name
    assert inference_pb2.TokenLogprob.DESCRIPTOR.fields_by_name["logprob"].has_presence
    weight = adapters_pb2.AdapterWeight.DESCRIPTOR
    assert weight.fields_by_name["weight"].has_presence
    assert weight.fields_by_name["generation"].has_presence
