"""Fixtures: a server with fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from servers.http_harness import HttpHarness, http_harness


@pytest.fixture
async def http() -> AsyncIterator[HttpHarness]:
    async with http_harness() as running:
        yield running
