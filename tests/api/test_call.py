"""The log line of a rejected call."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from turret.server.api.call import Call
from turret.server.basics.codes import Code
from turret.server.errors import InvalidRequestError
from turret.server.metrics import Metrics
from turret.server.words import say
from turret.v1 import adapters_pb2


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
