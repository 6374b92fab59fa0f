"""What is said, off a terminal, of what takes long."""

from __future__ import annotations

import logging

import pytest

from turret.server import progress


def test_what_takes_long_is_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = iter(range(1000))
    report = progress._lines(lambda: 0.5 * next(clock))
    for done in range(40):
        report("Quantising", done, 40)
    said = [record.__dict__["fields"] for record in caplog.records]
    assert [each["total"] for each in said] == [40] * len(said)
    assert 2 <= len(said) <= 4
    report("Quantising", 40, 40)
    report("Loading", 1, 2)
    assert len(caplog.records) == len(said)
