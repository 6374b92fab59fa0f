"""The forms of a call's adapters in the Python clients."""

from __future__ import annotations

import asyncio

import pytest
from servers.fake_turret import FakeTurret

from turret.clients.aio import AsyncTurretClient
from turret.clients.client import AdapterWeight, TurretClient


def test_a_mapping_is_a_mix_with_its_weights(client: TurretClient, server: FakeTurret):
    mix = {"sql": 0.5, "json": -1}
    members = [("sql", 0.5), ("json", -1.0)]

    async def ask_async() -> None:
        async with AsyncTurretClient(server.address) as own:
            await own.generate("a", adapters=mix)
            await own.embed("a", adapters=mix)
            await own.adapters.fuse("f", mix)

    used = client.generate("a", adapters=mix).adapters_used
    assert [(use.name, use.weight) for use in used] == members
    list(client.generate_stream("a", adapters=mix))
    client.chat("a", adapters=mix)
    client.score("a", adapters=mix)
    client.embed("a", adapters=mix)
    client.classify("a", adapters=mix)
    client.adapters.fuse("f", mix)
    client.adapters.merge(mix)
    asyncio.run(ask_async())
    asked = [*server.inference.requests, *server.adapters.requests]
    assert len(asked) == 11
    assert all([(a.name, a.weight) for a in request.adapters] == members for request in asked)
    assert not client.generate("a", adapters={}).adapters_used


@pytest.mark.parametrize(
    ("adapters", "error", "text"),
    [
        ({"sql": "0.5"}, TypeError, r"^adapters: .*\('sql', '0.5'\)"),
        ({3: 0.5}, TypeError, r"^adapters: .* 3$"),
        ([("sql", "1")], TypeError, r"^adapters: .*\('sql', '1'\)"),
        ("caf\udcff", ValueError, "^adapters: "),
        (("sql", 10**400), ValueError, r"^adapters: .*\('sql', 10*.*int too large"),
        (AdapterWeight("sql", generation=-1), ValueError, "^adapters: .*AdapterWeight.*Value out"),
        ({"sql=2": 1.0}, ValueError, "^adapters: .sql=2. "),
        (b"sql", TypeError, "^adapters: .* 115$"),
        (None, TypeError, "^adapters: .* None$"),
    ],
)
def test_an_invalid_mix_is_reported_as_adapters(client: TurretClient, adapters, error, text):
    with pytest.raises(error, match=text):
        client.score("a", adapters=adapters)


def test_a_member_must_be_text():
    with pytest.raises(TypeError, match=r"^text: .* 5$"):
        AdapterWeight.parse(5)  # type: ignore[arg-type]
