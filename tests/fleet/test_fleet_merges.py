"""Merges in a fleet: on all replicas or none, and also on later replicas."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from builders.mixes.merges import ARCHITECTURE, PROMPT, merge, refs, save_adapters, unmerge
from fleets.replicas import Fleet, Wire
from method_oracle import twin
from servers.engine_harness import EngineHarness, make_request

from turret.fleet.replica import ReplicaParts
from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.merger import Merger
from turret.server.basics.work import Cancellation
from turret.server.errors import AdapterMergedError, InvalidRequestError, MergeActiveError


async def answer(server: EngineHarness) -> tuple[tuple[int, ...], int]:
    """The current answer of the base alone, and its generation."""
    found = await server.run(make_request(PROMPT, max_tokens=6))
    return found.token_ids, server.merger.state.base_generation


@pytest.mark.slow
async def test_a_merge_is_everywhere_or_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = save_adapters(tmp_path / "root")
    fleet = Fleet(tmp_path / "state", root)

    async with AsyncExitStack() as stack:

        async def start(name: str) -> EngineHarness:
            replica = ReplicaParts(name, Wire(lambda: fleet.host))
            harness = EngineHarness.start(
                twin(ARCHITECTURE).folder,
                root,
                replica=replica,
                state_dir=fleet.state_dir,
                keep_generations=1,
            )
            return await stack.enter_async_context(harness)

        first, second = await start("r0"), await start("r1")
        for name in ("lora", "dora", "prompt_tuning"):
            await asyncio.to_thread(first.registry.load, name, name)
        plain = await answer(first)
        assert plain == await answer(second)
        with pytest.raises(InvalidRequestError):
            await merge(first, "prompt_tuning")

        def fail(*args: object) -> None:
            raise InvalidRequestError("the merged weights are not finite in q_proj")

        # If one replica fails, no replica merges.
        with monkeypatch.context() as patched:
            patched.setattr(second.merger, "_build", fail)
            with pytest.raises(InvalidRequestError, match="not finite"):
                await merge(first, "lora", "dora")
        assert await answer(first) == await answer(second) == plain

        state = await merge(second, "lora", "dora")
        assert state.base_generation == 2
        merged = await answer(first)
        assert merged == await answer(second)
        assert merged != plain
        with pytest.raises(MergeActiveError):
            await merge(first, "lora")
        with pytest.raises(AdapterMergedError):
            await asyncio.to_thread(first.registry.unload, "lora")
        # A later replica serves the same base, and so does a single server.
        third = await start("r2")
        assert await answer(third) == merged
        alone = await stack.enter_async_context(
            EngineHarness.start(twin(ARCHITECTURE).folder, root, adapters=("lora", "dora"))
        )
        assert type(alone.merger) is Merger
        await merge(alone, "lora", "dora")
        assert await answer(alone) == merged

        await unmerge(third)
        for server in (first, second, third):
            assert await answer(server) == (plain[0], 3)
        mix = first.registry.acquire(refs("lora"))
        first.registry.release(mix)

        # A kept generation can be merged, too, and a later replica merges the same one.
        await asyncio.to_thread(first.registry.replace, "lora", "dora")
        kept = [AdapterRef(name="lora", generation=1)]
        await asyncio.to_thread(second.merger.merge, kept, "BF16", Cancellation())
        fourth = await start("r3")
        await unmerge(alone)
        await merge(alone, "lora")
        for server in (first, second, fourth):
            assert (await answer(server))[0] == (await answer(alone))[0] != plain[0]
    fleet.close()
