"""Two replicas with real adapters and one registry in one process: a consistent state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders.registries import Registries, in_thread, refs, stage_directory, tiny_base, until
from fleets.replicas import Fleet
from servers.fake_hub import fake_hub

from turret.server.adapters.adapter import REQUEST, OwnTemplate
from turret.server.adapters.registry.registry import AdapterRegistry
from turret.server.adapters.state_dir import StateDir
from turret.server.errors import (
    AdapterExistsError,
    AdapterGenerationError,
    AdapterNotFoundError,
    NotInFleetError,
    UnavailableError,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Registries(tmp_path).root


@pytest.fixture
def fleet(tmp_path: Path, root: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path / "state", root)
    yield made
    made.close()


def test_what_one_loads_all_serve_under_the_same_identity(fleet: Fleet) -> None:
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
    with pytest.raises(AdapterGenerationError):
        first.registry.replace("a", "c", expected_generation=1)
    with pytest.raises(AdapterExistsError):
        second.registry.load("a", "c")
    with pytest.raises(NotInFleetError):
        second.registry.rollback("a")
    with pytest.raises(NotInFleetError):
        second.registry.set_alias("prod", refs("a"))
    with pytest.raises(NotInFleetError):
        second.registry.delete_alias("prod")
    assert second.registry.aliases() == []


def test_a_chat_template_is_the_same_on_every_replica(fleet: Fleet, root: Path) -> None:
    (root / "a" / "chat_template.jinja").write_text("one")
    first, second = fleet.start(), fleet.start()
    loaded = first.registry.load("a", "a")
    assert OwnTemplate.from_json(loaded.facts.chat_template).templates == {"default": "one"}
    assert second.registry.get("a").facts == loaded.facts
    given = OwnTemplate(REQUEST, {"default": "two"})
    with pytest.raises(AdapterExistsError):
        second.registry.load("a", "a", chat_template=given)
    replaced = second.registry.replace("a", "a", chat_template=given)
    assert (replaced.generation, replaced.facts.digest) == (2, loaded.facts.digest)
    assert second.registry.tokenizers.find(refs("a")) == (None, given.to_json())
    until(lambda: first.registry.tokenizers.find(refs("a")) == (None, given.to_json()))


def test_what_the_hub_has_is_of_one_commit_everywhere(
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


def test_a_replica_that_comes_later_serves_when_it_knows_everything(fleet: Fleet) -> None:
    first = fleet.start()
    uuids = {name: first.registry.load(name, name).uuid for name in "abc"}
    first.registry.pin("b")
    second = fleet.start()
    assert {record.name: record.uuid for record in second.registry.list()} == uuids
    until(lambda: second.registry.get("b").pinned)


def test_use_is_told_again_to_a_registry_that_comes_back(fleet: Fleet) -> None:
    first, second = fleet.start(), fleet.start()
    first.registry.load("a", "a")
    mix = second.registry.acquire(refs("a"))
    until(lambda: first.registry.get("a").in_flight == 1)
    fleet.stop_registry()
    fleet.start_registry(is_first=False)
    until(lambda: _is_back(fleet))
    until(lambda: first.registry.get("a").in_flight == 1)
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
        with pytest.raises(AdapterNotFoundError):
            replica.registry.get("a")
        assert replica.registry.holding() == {}
        assert not replica.registry._leaving, "looked through at every report"


def _is_refused(registry: AdapterRegistry, name: str) -> bool:
    try:
        mix = registry.acquire(refs(name))
    except AdapterNotFoundError:
        return True
    registry.release(mix)
    return False


def test_uploads_are_read_by_all_and_kept_by_one(fleet: Fleet, root: Path) -> None:
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


def test_the_registry_comes_back_and_nothing_is_lost(fleet: Fleet) -> None:
    first, second = fleet.start(), fleet.start()
    loaded = first.registry.load("a", "a")
    fleet.stop_registry()
    mix = second.registry.acquire(refs("a"))
    second.registry.release(mix)
    for call in (
        lambda: first.registry.load("b", "b"),
        lambda: first.registry.pin("a"),
        lambda: first.registry.unload("a"),
        lambda: second.registry.list(),
    ):
        with pytest.raises(UnavailableError):
            call()
    assert first.link.is_serving
    fleet.start_registry(is_first=False)
    until(lambda: _is_back(fleet))
    assert second.registry.get("a").uuid == loaded.uuid
    assert second.registry.load("b", "b").generation == 1
    assert first.registry.get("b").generation == 1


def _is_back(fleet: Fleet) -> bool:
    try:
        return len(fleet.host.status().replicas) == 2
    except UnavailableError:
        return False


def test_a_single_server_goes_on_with_what_the_fleet_wrote(fleet: Fleet, tmp_path: Path) -> None:
    replica = fleet.start()
    uuid = replica.registry.load("a", "a").uuid
    fleet.close()
    state = StateDir(fleet.state_dir, 1 << 30)
    state.bind(tiny_base().name, tiny_base().digest)
    (saved,) = state.read()
    assert (saved.name, saved.uuid, saved.generation) == ("a", uuid, 1)
    state.close()
