"""Steps here are few: they are captured at their second sight."""

from __future__ import annotations

import pytest

from turret.server.engine.step.gpu import decode_graphs


@pytest.fixture(autouse=True)
def captured_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "SIGHTS", 2)
