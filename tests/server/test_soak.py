"""Many clients, many adapters, cancellations and deadlines on one real server process."""

from __future__ import annotations

import asyncio
import collections
import random
import time
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from builders.bases.tiny_models import CONTEXT, VOCAB_SIZE, save_tiny_model
from builders.random_adapters import ALL, AdapterSpec, arch_of, write_adapter
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients.aio import AsyncTurretClient
from turret.clients.errors import TurretRpcError
from turret.clients.messages.mix import AdapterWeight

NUM_REQUESTS = 1000
WARM_UP_REQUESTS = 200
NUM_CLIENTS = 64
NUM_ADAPTERS = 32
# Allowed ends: a finish reason, or the status of a failed call.
ENDS = {"STOP", "LENGTH", "cancelled", "DEADLINE_EXCEEDED"}
MIB = 1 << 20
# Large blocks are returned to the system when they are freed, so that RSS shows the held memory.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
MAX_GROWTH_BYTES = 12 * MIB


def specs() -> list[AdapterSpec]:
    """Adapters of four kinds with ranks 1 to 16."""
    kinds: tuple[dict[str, Any], ...] = (
        {"targets": ("q_proj", "v_proj")},
        {"targets": ALL, "is_rslora": True},
        {"targets": ("o_proj", "down_proj"), "is_dora": True},
        {"targets": ALL, "has_bias": True},
    )
    return [
        AdapterSpec(f"adapter-{i:02}", 1 + i % 16, **kinds[i % len(kinds)])
        for i in range(NUM_ADAPTERS)
    ]


class Soak:
    """Sends requests and records how each one ended.

    Attributes:
        ends: The number of requests by their end.
        generated: The number of received tokens.
    """

    def __init__(self, client: AsyncTurretClient, names: list[str], seed: int) -> None:
        self.ends: collections.Counter[str] = collections.Counter()
        self.generated = 0
        self._client = client
        self._names = names
        self._random = random.Random(seed)

    async def run(self, count: int) -> None:
        """Send ``count`` requests, ``NUM_CLIENTS`` at a time."""
        todo = iter(range(count))

        async def one_client() -> None:
            for _ in todo:
                self.ends[await self._one()] += 1

        await asyncio.gather(*(one_client() for _ in range(NUM_CLIENTS)))

    async def _one(self) -> str:
        """Send one streamed request; returns its end."""
        chance = self._random
        members = chance.sample(self._names, chance.choice([0, 1, 1, 1, 1, 2, 3]))
        length = chance.choice([1, 4, 16, 40, 100, 200])
        fate = chance.random()
        stream = self._client.generate_stream(
            [chance.randrange(VOCAB_SIZE - 2) for _ in range(length)],
            adapters=[AdapterWeight(name, chance.uniform(-1.0, 1.5)) for name in members],
            max_tokens=chance.randint(1, 12),
            temperature=chance.choice([0.0, 0.8]),
            seed=chance.randrange(1 << 30),
            timeout=chance.uniform(0.001, 0.15) if fate < 0.1 else 120.0,
        )
        cancel_after = chance.randint(0, 3) if 0.1 <= fate < 0.2 else None
        end = "no last chunk"
        num_chunks = 0
        async with stream:
            if cancel_after == 0:
                await asyncio.sleep(0)
                return "cancelled"
            try:
                async for chunk in stream:
                    num_chunks += 1
                    assert end == "no last chunk", "a chunk after the last one"
                    if chunk.finish_reason is not None:
                        assert chunk.usage is not None
                        self.generated += chunk.usage.completion_tokens
                        end = chunk.finish_reason
                    elif num_chunks == cancel_after:
                        return "cancelled"
            except TurretRpcError as error:
                # The text so far arrives in a last chunk, followed by the deadline's status. The
                # deadline may also pass between any last chunk and its status.
                late = error.code is grpc.StatusCode.DEADLINE_EXCEEDED
                assert late or end == "no last chunk", "an error after the last chunk"
                return error.code.name
        assert end != "DEADLINE", "a missed deadline with status OK"
        return end


async def settled(server: ServerUnderTest) -> dict[str, float]:
    """The server's own counts after it has noticed that the clients are gone."""
    deadline = time.monotonic() + 20.0
    while True:
        metrics = await asyncio.to_thread(server.metrics)
        found = {
            "used": metrics["turret_kv_blocks", frozenset({("state", "used")})],
            "running": metrics["turret_sequences", frozenset({("state", "running")})],
            "waiting": metrics["turret_sequences", frozenset({("state", "waiting")})],
        }
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.1)


def resident_bytes(server: ServerUnderTest) -> int:
    return psutil.Process(server.process.pid).memory_info().rss


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_thousand_requests_end_once_and_leave_nothing_behind(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    flags = (
        *("--model", str(model), "--max-num-batched-tokens", "128"),
        # Room for about a third of the clients, and for half of the adapters.
        *("--kv-cache-bytes", str(2 * MIB), "--adapter-host-bytes", str(MIB)),
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), **MALLOC}
    with start_server(tmp_path, *flags, environment=environment) as server:
        for seed, spec in enumerate(specs()):
            write_adapter(server.adapter_root, arch_of(model), spec, seed)
        async with AsyncTurretClient(server.address) as client:
            names = [spec.name for spec in specs()]
            for name in names:
                await client.adapters.load(name, name)
            info = await client.get_model()
            assert info.max_model_len == CONTEXT
            await Soak(client, names, seed=0).run(WARM_UP_REQUESTS)
            soak = Soak(client, names, seed=1)
            await soak.run(NUM_REQUESTS // 2)
            assert not any((await settled(server)).values())
            half_way = resident_bytes(server)
            await soak.run(NUM_REQUESTS // 2)
            assert not any((await settled(server)).values())
            grown = resident_bytes(server) - half_way
            assert soak.ends.total() == NUM_REQUESTS
            assert set(soak.ends) <= ENDS, soak.ends
            assert min(soak.ends["cancelled"], soak.ends["DEADLINE_EXCEEDED"]) > 20, soak.ends
            assert soak.ends["STOP"] + soak.ends["LENGTH"] > 0.7 * NUM_REQUESTS, soak.ends
            assert soak.generated > NUM_REQUESTS
            assert grown < MAX_GROWTH_BYTES, f"{grown / MIB:.1f} MiB more after the second half"
            adapters = [adapter async for adapter in client.adapters.list()]
            assert sorted(adapter.name for adapter in adapters) == names
            assert {adapter.in_flight for adapter in adapters} == {0}
            evictions = server.metric(
                "turret_adapter_evictions_total", tier="host", reason="budget"
            )
            assert evictions > 0
            # The server still answers.
            answer = await client.generate([1, 2, 3], adapters=names[0], max_tokens=3)
            assert answer.usage.completion_tokens == 3 or answer.finish_reason == "STOP"
