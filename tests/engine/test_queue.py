"""The limit of waiting requests, and the share of it that one tenant may have."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from method_oracle import twin
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.base import ChangedBase
from turret.server.errors import QueueFullError


async def test_a_tenant_cannot_take_the_whole_queue(tmp_path: Path) -> None:
    go_on = threading.Event()

    def pause() -> ChangedBase:
        assert go_on.wait(30)
        return ChangedBase(2, frozenset())

    async with EngineHarness.start(twin("llama").folder, tmp_path) as harness:
        engine = harness.engine
        engine._max_queued_requests = 8
        engine.change_base(pause)

        async def ask(tenant: bytes) -> None:
            streams.append(await engine.submit(make_request([1], max_tokens=1, tenant=tenant)))

        async def refused(tenant: bytes) -> str:
            with pytest.raises(QueueFullError) as caught:
                await ask(tenant)
            return caught.value.args[0].reason

        streams = []
        for _ in range(6):
            await ask(b"greedy")
        assert await refused(b"greedy") == "QUEUE_SHARE_FULL"
        await ask(b"other")
        # Requests without a token have no tenant.
        await ask(b"")
        for tenant in (b"", b"other", b"greedy"):
            assert await refused(tenant) == "QUEUE_FULL"
        go_on.set()
        for stream in streams:
            assert [output.finish async for output in stream][-1] is not None
        await ask(b"greedy")
        assert [output.finish async for output in streams[-1]][-1] is not None
