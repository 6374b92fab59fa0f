"""A hub on loopback, which this process queries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers.fake_hub import FakeHub, fake_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "hub", monkeypatch) as hub:
        yield hub
