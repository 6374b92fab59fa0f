"""Replicas with real adapters and one registry in one process: adapters, versions and merges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from builders.mixes.merges import ARCHITECTURE, PROMPT, merge, save_adapters, unmerge
from builders.registries import Registries, in_thread, refs, stage_directory, tiny_base, until
from fleets.replicas import Fleet, Started, Wire
from method_oracle import twin
from servers.engine_harness import EngineHarness, make_request
from servers.fake_hub import fake_hub

from turret.fleet.follower import Channel
from turret.fleet.replica import ReplicaParts
from turret.server import errors
from turret.server.adapters.adapter import REQUEST, AdapterRef, OwnTemplate
from turret.server.adapters.merger import Merger
from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import StateDir
from turret.server.basics.work import Cancellation


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Registries(tmp_path).root


@pytest.fixture
def fleet(tmp_path: Path, root: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path / "state", root)
    yield made
    made.close()


def test_an_adapter_loaded_by_one_replica_has_the_same_identity_on_all(fleet: Fleet) -> None:
    first, second = fleet.start(), fleet.start()
    loaded = first.registry.load("a", "a")
    there = second.registry.get("a")
    assert (there.uuid, there.generation) == (loaded.uuid, loaded.generation)
    mix = second.registry.acquire(refs("a"))
    assert mix.members[0][0].digest == loaded.facts.digest
    second.registry.release(mix)
    replaced = second.registry.replace("a", "b", expected_generation=1)
    assert replaced.generation == 2
    assert first.registry.get("a").facts.digest == replaced.facts.digest
    with pytest.raises(errors.AdapterGenerationError):
        first.registry.replace("a", "c", expected_generation=1)
    with pytest.raises(errors.AdapterExistsError):
        second.registry.load("a", "c")


def test_a_chat_template_is_the_same_on_every_replica(fleet: Fleet, root: Path) -> None:
    (root / "a" / "chat_template.jinja").write_text("one")
    first, second = fleet.start(), fleet.start()
    loaded = first.registry.load("a", "a")
    assert OwnTemplate.from_json(loaded.facts.chat_template).templates == {"default": "one"}
    assert second.registry.get("a").facts == loaded.facts
    given = OwnTemplate(REQUEST, {"default": "two"})
    with pytest.raises(errors.AdapterExistsError):
        second.registry.load("a", "a", chat_template=given)
    replaced = second.registry.replace("a", "a", chat_template=given)
    assert (replaced.generation, replaced.facts.digest) == (2, loaded.facts.digest)
    assert second.registry.tokenizers.find(refs("a")) == (None, given.to_json())
    until(lambda: first.registry.tokenizers.find(refs("a")) == (None, given.to_json()))


@pytest.fixture
def keeping(tmp_path: Path, root: Path) -> Iterator[Fleet]:
    """A fleet that keeps one replaced generation."""
    made = Fleet(tmp_path / "state", root, keep_generations=1)
    yield made
    made.close()


def served(started: Started, name: str, generation: int | None = None) -> tuple[str, int]:
    """The uuid and generation that a request for a name gets; it may go through an alias."""
    ref = AdapterRef(name=name, generation=generation, draw=0.5)
    mix = started.registry.acquire([ref])
    adapter = mix.members[0][0]
    started.registry.release(mix)
    return adapter.uuid, adapter.generation


def test_generations_are_kept_and_rolled_back_everywhere(keeping: Fleet, root: Path) -> None:
    first, second = keeping.start(), keeping.start()
    uuid = first.registry.upload("a", stage_directory(first.registry, root / "a")).uuid
    first.registry.pin("a")
    for number, path in enumerate("bc", 2):
        staged = stage_directory(second.registry, root / path)
        second.registry.upload("a", staged, replace=True)
        assert served(first, "a") == (uuid, number)
        assert served(first, "a", number - 1) == (uuid, number - 1)
    with pytest.raises(errors.AdapterNotFoundError):
        served(first, "a", 1)
    files = keeping.state_dir / "files"
    until(lambda: {path.name for path in files.iterdir()} == {f"{uuid}.2", f"{uuid}.3"})
    mix = second.registry.acquire(refs("a"))
    back = first.registry.rollback("a", expected_generation=3)
    assert (back.generation, back.kept_generations, back.pinned) == (2, (3,), True)
    assert [served(each, "a") for each in (first, second)] == [(uuid, 2)] * 2
    assert mix.members[0][0].generation == 3
    second.registry.release(mix)
    with pytest.raises(errors.AdapterGenerationError):
        second.registry.rollback("a", 3, expected_generation=3)
    with pytest.raises(errors.AdapterNotFoundError):
        second.registry.rollback("a")
    assert second.registry.rollback("a", 3).generation == 3
    assert first.registry.replace("a", "a").generation == 4
    # The registry's successor and a later replica know the same generations.
    keeping.stop_registry()
    keeping.start_registry(is_first=False)
    until(lambda: _is_back(keeping))
    third = keeping.start()
    assert served(third, "a", 3) == (uuid, 3)
    exported = third.registry.export("a", 3)
    assert exported.record.generation == 3
    exported.close()


def test_a_rollback_to_changed_files_changes_nothing(keeping: Fleet, root: Path) -> None:
    first, second = keeping.start(), keeping.start()
    first.registry.load("a", "a")
    first.registry.replace("a", "b")
    weights = root / "a" / "adapter_model.safetensors"
    weights.write_bytes((root / "c" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(errors.AdapterChangedError):
        second.registry.rollback("a")
    assert [served(each, "a")[1] for each in (first, second)] == [2, 2]


def test_an_alias_has_the_same_target_on_every_replica(keeping: Fleet) -> None:
    first, second = keeping.start(), keeping.start()
    uuid = first.registry.load("a", "a").uuid
    alias = first.registry.set_alias("prod", [AdapterRef(name="a")])
    assert second.registry.aliases() == [alias]
    assert served(second, "prod") == (uuid, 1)
    for path in "bcb":
        second.registry.replace("a", path)
    # The alias keeps a generation that the setting would not.
    assert served(first, "prod") == (uuid, 1)
    assert second.registry.get("a").kept_generations == (1, 3)
    with pytest.raises(errors.AdapterInUseError):
        second.registry.unload("a")
    for wrong in ("a", "base", "no spaces"):
        with pytest.raises(errors.InvalidRequestError):
            first.registry.set_alias(wrong, [AdapterRef(name="a")])
    with pytest.raises(errors.InvalidRequestError):
        second.registry.load("prod", "b")
    with pytest.raises(errors.AdapterNotFoundError):
        first.registry.set_alias("prod", [AdapterRef(name="a", generation=2)])
    split = [AdapterRef(name="a", generation=each, weight=each) for each in (1, 3)]
    second.registry.set_alias("prod", split)
    assert [served(each, "prod") for each in (first, second)] == [(uuid, 3)] * 2
    # A running request keeps its generation, even when the alias lets it go.
    mix = first.registry.acquire([AdapterRef(name="prod", draw=0.0)])
    second.registry.set_alias("prod", [AdapterRef(name="a")])
    assert first.registry.get("a").kept_generations == (3,)
    assert mix.members[0][0].generation == 1
    first.registry.release(mix)
    # The registry's successor and a later replica know the alias.
    keeping.stop_registry()
    keeping.start_registry(is_first=False)
    until(lambda: _is_back(keeping))
    assert served(keeping.start(), "prod") == (uuid, 4)
    second.registry.delete_alias("prod")
    for started in (first, second):
        assert started.registry.aliases() == []
        with pytest.raises(errors.AdapterNotFoundError):
            served(started, "prod")
    with pytest.raises(errors.AdapterNotFoundError):
        first.registry.delete_alias("prod")
    first.registry.unload("a")


def test_a_fleet_and_a_single_server_read_each_others_versions(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "state"

    def single() -> AdapterRegistry:
        state = StateDir(path, 1 << 30)
        state.bind(tiny_base().name, tiny_base().digest)
        base, room = tiny_base(), 1 << 30
        made = AdapterRegistry(root, base, room, 64, state=state, keep_generations=1)
        made.restore()
        return made

    registry = single()
    uuid = registry.load("a", "a").uuid
    registry.replace("a", "b")
    registry.set_alias("prod", [AdapterRef(name="a", generation=1)])
    registry.close()
    fleet = Fleet(path, root, keep_generations=1)
    started = fleet.start()
    assert served(started, "prod") == (uuid, 1)
    started.registry.set_alias("test", [AdapterRef(name="a")])
    assert started.registry.rollback("a").generation == 1
    fleet.close()
    registry = single()
    assert (registry.get("a").generation, registry.get("a").kept_generations) == (1, (2,))
    assert [alias.name for alias in registry.aliases()] == ["prod", "test"]
    registry.close()


def test_all_replicas_load_the_same_commit_from_the_hub(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path / "state", root, adapter_hub=("acme",))
    with fake_hub(tmp_path / "hub", monkeypatch) as hub:
        repo = hub.repo("acme/a", root / "a")
        first, second = fleet.start(), fleet.start()
        commit = repo.refs["main"]
        loaded = first.registry.load("a", "hub:acme/a")
        assert loaded.source == f"hub:acme/a@{commit}"
        repo.push({**repo.commits[commit], "adapter_config.json": b"{}"})
        mix = second.registry.acquire(refs("a"))
        fleet.wait_resident(mix)
        assert mix.members[0][0].digest == loaded.facts.digest
        second.registry.release(mix)
        replaced = second.registry.replace("a", f"hub:acme/a@{commit}")
        assert (replaced.generation, replaced.source) == (1, loaded.source)
        fleet.close()


def test_a_late_replica_serves_only_after_it_has_caught_up(fleet: Fleet) -> None:
    first = fleet.start()
    uuids = {name: first.registry.load(name, name).uuid for name in "abc"}
    first.registry.pin("b")
    second = fleet.start()
    assert {record.name: record.uuid for record in second.registry.list()} == uuids
    until(lambda: second.registry.get("b").pinned)


def test_usage_is_reported_again_to_a_restarted_registry(fleet: Fleet) -> None:
    first, second = fleet.start(), fleet.start()
    first.registry.load("a", "a")
    mix = second.registry.acquire(refs("a"))
    until(lambda: first.registry.get("a").in_flight == 1)
    fleet.stop_registry()
    fleet.start_registry(is_first=False)
    until(lambda: _is_back(fleet))
    until(lambda: first.registry.get("a").in_flight == 1)
    second.registry.release(mix)


def test_lists_cannot_keep_the_registry_busy(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = fleet.start(), fleet.start()
    first.registry.load("a", "a")
    mix, asked = second.registry.acquire(refs("a")), list[float]()
    until(lambda: first.registry.get("a").in_flight == 1)
    usage = Channel.usage

    def noted(channel: Channel) -> Any:
        asked.append(time.monotonic())
        return usage(channel)

    monkeypatch.setattr(Channel, "usage", noted)
    start = time.monotonic()
    for _ in range(500):
        (record,) = first.registry.list()
        assert record.in_flight == first.registry.get("a").in_flight == 1
    assert len(asked) <= 1 + time.monotonic() - start
    second.registry.release(mix)
    until(lambda: first.registry.get("a").in_flight == 0)


def test_lists_keep_the_last_figures_while_the_registry_is_away(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = fleet.start(), fleet.start()
    first.registry.load("a", "a")
    mix = second.registry.acquire(refs("a"))
    until(lambda: first.registry.get("a").in_flight == 1)
    first.wire.is_cut = True
    monkeypatch.setattr("turret.fleet.replica._USAGE_SECONDS", 0.0)
    (record,) = first.registry.list()
    assert record.in_flight == first.registry.get("a").in_flight == 1
    second.registry.release(mix)


def test_an_unload_drains_every_replica(fleet: Fleet) -> None:
    first, second = fleet.start(), fleet.start()
    first.registry.load("a", "a")
    mix = second.registry.acquire(refs("a"))
    thread, results = in_thread(lambda: first.registry.unload("a", timeout_seconds=10.0))
    until(lambda: _is_refused(second.registry, "a"))
    assert thread.is_alive()
    second.registry.release(mix)
    thread.join(10.0)
    assert results == [None]
    for replica in (first, second):
        with pytest.raises(errors.AdapterNotFoundError):
            replica.registry.get("a")
        assert replica.registry.holding() == {}
        assert not replica.registry._leaving, "looked through at every report"


def _is_refused(registry: AdapterRegistry, name: str) -> bool:
    try:
        mix = registry.acquire(refs(name))
    except errors.AdapterNotFoundError:
        return True
    registry.release(mix)
    return False


def test_uploads_are_stored_once_and_read_by_every_replica(fleet: Fleet, root: Path) -> None:
    first, second = fleet.start(), fleet.start()
    record = first.registry.upload("up", stage_directory(first.registry, root / "a"))
    files = fleet.state_dir / "files"
    assert [path.name for path in files.iterdir()] == [f"{record.uuid}.1"]
    mix = second.registry.acquire(refs(["up"]))
    done, results = in_thread(lambda: fleet.wait_resident(mix))
    done.join(10.0)
    assert results == [None]
    staged = stage_directory(second.registry, root / "b")
    assert second.registry.upload("up", staged, replace=True).generation == 2
    time.sleep(0.3)
    # A request on the second replica still holds the replaced generation.
    assert {path.name for path in files.iterdir()} == {f"{record.uuid}.1", f"{record.uuid}.2"}
    second.registry.release(mix)
    until(lambda: [path.name for path in files.iterdir()] == [f"{record.uuid}.2"])
    assert not list((fleet.state_dir / "incoming").iterdir())


def test_a_restarted_registry_loses_nothing(fleet: Fleet) -> None:
    first, second = fleet.start(), fleet.start()
    loaded = first.registry.load("a", "a")
    fleet.stop_registry()
    mix = second.registry.acquire(refs("a"))
    second.registry.release(mix)
    for call in (
        lambda: first.registry.load("b", "b"),
        lambda: first.registry.pin("a"),
        lambda: first.registry.unload("a"),
    ):
        with pytest.raises(errors.UnavailableError):
            call()
    assert [record.name for record in second.registry.list()] == ["a"]
    assert first.link.is_serving
    fleet.start_registry(is_first=False)
    until(lambda: _is_back(fleet))
    assert second.registry.get("a").uuid == loaded.uuid
    assert second.registry.load("b", "b").generation == 1
    assert first.registry.get("b").generation == 1


def _is_back(fleet: Fleet) -> bool:
    try:
        return len(fleet.host.status().replicas) == 2
    except errors.UnavailableError:
        return False


def test_a_single_server_continues_with_the_state_of_a_fleet(fleet: Fleet, tmp_path: Path) -> None:
    replica = fleet.start()
    uuid = replica.registry.load("a", "a").uuid
    fleet.close()
    state = StateDir(fleet.state_dir, 1 << 30)
    state.bind(tiny_base().name, tiny_base().digest)
    (saved,) = state.read()
    assert (saved.name, saved.uuid, saved.generation) == ("a", uuid, 1)
    state.close()


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
        with pytest.raises(errors.InvalidRequestError):
            await merge(first, "prompt_tuning")

        def fail(*args: object) -> None:
            raise errors.InvalidRequestError("the merged weights are not finite in q_proj")

        # If one replica fails, no replica merges.
        with monkeypatch.context() as patched:
            patched.setattr(second.merger, "_build", fail)
            with pytest.raises(errors.InvalidRequestError, match="not finite"):
                await merge(first, "lora", "dora")
        assert await answer(first) == await answer(second) == plain

        state = await merge(second, "lora", "dora")
        assert state.base_generation == 2
        merged = await answer(first)
        assert merged == await answer(second)
        assert merged != plain
        with pytest.raises(errors.MergeActiveError):
            await merge(first, "lora")
        with pytest.raises(errors.AdapterMergedError):
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
        mix = first.registry.acquire(refs(["lora"]))
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
