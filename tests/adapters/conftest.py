"""Fixtures of the tests of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders.registries import Registries


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Registries]:
    """Makes registries over the same adapters, and closes them."""
    registries = Registries(tmp_path)
    yield registries
    registries.close()
