"""These tests run few steps, so steps are captured at their second occurrence."""

from __future__ import annotations

import pytest

from turret.server.engine.step import gpu_executor as executor


@pytest.fixture(autouse=True)
def captured_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "SIGHTS", 2)
