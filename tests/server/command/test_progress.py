"""Progress of long work, with and without a terminal."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from turret.server import log


def test_progress_of_long_work_is_logged_at_intervals(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = iter(range(1000))
    report = log._lines(lambda: 0.5 * next(clock))
    for done in range(40):
        report("Quantising", done, 40)
    said = [record.__dict__["fields"] for record in caplog.records]
    assert [each["total"] for each in said] == [40] * len(said)
    assert 2 <= len(said) <= 4
    report("Quantising", 40, 40)
    report("Loading", 1, 2)
    assert len(caplog.records) == len(said)


def test_log_lines_appear_above_the_progress_bar_and_a_stop_removes_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=60, color_system=None)
    monkeypatch.setattr(log, "Console", lambda **_: console)
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(root, "handlers", [handler])
    long = "call finished [bold] " + "x" * 100
    with log.progress_bar() as report:
        report("Loading layers", 6, 30)
        root.warning(long)
        # The line before the bar is erased, and the bar is drawn again below the message.
        before, _, after = drawn.getvalue().partition(long)
        assert before.endswith("\x1b[2K")
        assert after.startswith("\n")
        assert "Loading layers" in after
        log.end_bars()
        assert drawn.getvalue().endswith("\x1b[?25h")
        ended = len(drawn.getvalue())
        report("Loading layers", 7, 30)
        root.warning("stopped")
    assert drawn.getvalue()[ended:] == "stopped\n"
    root.warning("after")
    assert capsys.readouterr().err == "after\n"
