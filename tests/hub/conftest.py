"""A hub on loopback, which this process queries, and registries that fetch adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.registries import Registries, tiny_base
from servers.fake_hub import FakeHub, fake_hub

from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import StateDir


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "hub", monkeypatch) as hub:
        yield hub


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Path]:
    made = Registries(tmp_path)
    yield made.root
    made.close()


@pytest.fixture
def registry_with(tmp_path: Path) -> Iterator[Callable[..., AdapterRegistry]]:
    """Create a registry with sources and a state directory, and close the previous one."""
    made: list[AdapterRegistry] = []

    def make(**sources: Any) -> AdapterRegistry:
        while made:
            made.pop().close()
        state = StateDir(tmp_path / "state", 1 << 20)
        state.bind("base", "digest")
        made.append(AdapterRegistry(None, tiny_base(), 1 << 30, 64, state=state, **sources))
        made[-1].restore()
        return made[-1]

    yield make
    for one in made:
        one.close()
