"""What the log holds of a call that was refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from turret.server.api.call import Call
from turret.server.basics.codes import Code
from turret.server.metrics import Metrics


@pytest.mark.parametrize(
    ("code", "reason", "message", "logged"),
    [
        (
            *(Code.NOT_FOUND, "ADAPTER_NOT_FOUND"),
            *("no adapter 'sgl'; did you mean 'sql'?", "no adapter 'sgl'; did you mean 'sql'?"),
        ),
        (
            *(Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
            *("max_tokens: must be at least 1", "max_tokens: must be at least 1"),
        ),
        (
            *(Code.INVALID_ARGUMENT, "PROMPT_TOO_LONG"),
            "9 tokens are over the model's context of 8",
            "9 tokens are over the model's context of 8",
        ),
        (
            *(Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
            *("stop: must be text, not 'secret", "stop: must be text, not ..."),
        ),
        (
            *(Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
            *("messages: chat template: secret", "messages: chat template ..."),
        ),
        (
            *(Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
            *("regex: is not one\n  secret", "regex: is not one ..."),
        ),
        (Code.INVALID_ARGUMENT, "INVALID_REQUEST", "'secret'", None),
    ],
)
def test_why_a_call_was_refused_is_logged_without_what_it_said(
    code: Code, reason: str, message: str, logged: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    call = Call.begin("/x/Generate", (), Metrics())
    call.fail(reason, message)
    with caplog.at_level(logging.INFO, "turret.server.api"):
        call.finish(code)
    (record,) = caplog.records
    said: dict[str, Any] = record.__dict__["fields"]
    assert (said["code"], said["reason"], said.get("why")) == (code.name, reason, logged)


def test_a_call_that_succeeds_has_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    call = Call.begin("/x/Generate", (), Metrics())
    with caplog.at_level(logging.INFO, "turret.server.api"):
        call.finish(Code.OK)
    said: dict[str, Any] = caplog.records[0].__dict__["fields"]
    assert "why" not in said
    # A number in a log of JSON, as in all other lines.
    assert isinstance(said["seconds"], float)
