"""How long a call may take, and what is said when it took longer."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from typing import Any

import pytest
from servers.fake_turret import FakeTurret

from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient

LONG = [1e9, 3e9, 9.2e9, 1e10, sys.maxsize, pytest.param(10**400, id="10**400"), math.inf]


@pytest.mark.parametrize("seconds", LONG)
async def test_a_timeout_that_no_clock_can_hold_is_none(server: FakeTurret, seconds: Any):
    def has_no_deadline() -> bool:
        left, server.inference.time_remaining = server.inference.time_remaining, 0.0
        return left is None

    with TurretClient(server.address, timeout=seconds) as client:
        assert client.generate("a").text == "a"
        assert has_no_deadline()
        assert client.adapters.get("sql", timeout=seconds).name == "sql"
        assert [chunk.text for chunk in client.generate_stream("a", timeout=seconds)] == ["a", ""]
        assert has_no_deadline()
    async with AsyncTurretClient(server.address) as client:
        assert (await client.generate("a", timeout=seconds)).text == "a"
        assert has_no_deadline()
        async with client.generate_stream("a", timeout=seconds) as stream:
            assert [chunk.text async for chunk in stream] == ["a", ""]
        assert has_no_deadline()


def test_any_real_number_is_a_timeout(client: TurretClient, server: FakeTurret):
    client.generate("a", timeout=Fraction(5))  # type: ignore[arg-type]
    assert 4 < (server.inference.time_remaining or 0) < 5.1
