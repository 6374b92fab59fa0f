"""Fixtures of the tests of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.registries import Registries, Start

from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import StateDir


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Registries]:
    """Makes registries over the same adapters, and closes them."""
    registries = Registries(tmp_path)
    yield registries
    registries.close()


@pytest.fixture
def start(make: Registries, tmp_path: Path) -> Start:
    """Starts a registry on the test's state directory; close it before the next one."""

    def begin(room: float = 100, **options: Any) -> AdapterRegistry:
        registry = make(room, state=StateDir(tmp_path / "state", 1 << 20), **options)
        registry.restore()
        return registry

    return begin
