"""Fixtures: a server with fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from servers.rpc_harness import Harness, harness


@pytest.fixture
async def server() -> AsyncIterator[Harness]:
    async with harness() as running:
        yield running
