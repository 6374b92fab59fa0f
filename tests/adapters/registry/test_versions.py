"""Kept generations: who may name them, rollbacks, and what a restart leaves of them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.registries import Registries, Start, Waiter, refs, resident, stage_directory, until
from said import says

from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.registry import AdapterExport, AdapterRegistry
from turret.server.errors import (
    AdapterChangedError,
    AdapterGenerationError,
    AdapterInUseError,
    AdapterNotFoundError,
    StorageFullError,
)
from turret.server.metrics import Metrics


def versions(registry: AdapterRegistry, name: str = "x") -> tuple[int, tuple[int, ...]]:
    """The current generation, and the kept ones."""
    record = registry.get(name)
    return record.generation, record.kept_generations


def digest(registry: AdapterRegistry, generation: int | None = None) -> str:
    """The digest of the weights that a request gets, which are read if they are on disk."""
    mix = registry.acquire([AdapterRef(name="x", generation=generation)])
    waiter = Waiter(mix)
    answer = None if waiter.was_resident else waiter.wait()
    try:
        if answer is not None and answer.error is not None:
            raise answer.error
        assert mix.members[0][0].operators is not None
        return mix.members[0][0].digest
    finally:
        registry.release(mix)


def test_the_last_replaced_generations_are_kept(make: Registries) -> None:
    registry = make(load="abcd", keep_generations=2)
    gone: list[str] = []
    registry.on_unloaded = gone.append
    digests = {path: registry.get(path).facts.digest for path in "abcd"}
    uuid = registry.load("x", "a").uuid
    registry.replace("x", "b")
    registry.replace("x", "c")
    assert versions(registry) == (3, (1, 2))
    assert [digest(registry, n) for n in (1, 2, 3, None)] == [digests[p] for p in "abcc"]
    assert (registry.get("x", 1).generation, registry.get("x", 1).facts.digest) == (1, digests["a"])
    running = registry.acquire([AdapterRef(name="x", generation=1)])
    registry.replace("x", "d")
    assert versions(registry) == (4, (2, 3))
    with pytest.raises(
        AdapterNotFoundError, check=says("OTHER_GENERATION", generation=1, current_generation=4)
    ):
        digest(registry, 1)
    assert gone == []
    registry.release(running)
    assert gone == [f"{uuid}.1"]
    registry.unload("x")
    assert set(gone) == {f"{uuid}.{number}" for number in (1, 2, 3, 4)}
    assert resident(registry) == "abcd"


def test_a_rollback_serves_a_kept_generation_with_its_number(make: Registries) -> None:
    registry = make(load="ab", keep_generations=1)
    first, second = (registry.get(path).facts.digest for path in "ab")
    registry.load("x", "a", pinned=True)
    registry.replace("x", "b")
    running = registry.acquire(refs("x"))
    record = registry.rollback("x", expected_generation=2)
    assert (record.generation, record.kept_generations, record.pinned) == (1, (2,), True)
    assert (digest(registry), digest(registry, 2)) == (first, second)
    assert running.members[0][0].digest == second
    registry.release(running)
    with pytest.raises(
        AdapterNotFoundError, check=says("NO_EARLIER_GENERATION", current_generation=1)
    ):
        registry.rollback("x")
    with pytest.raises(AdapterGenerationError):
        registry.rollback("x", 2, expected_generation=2)
    with pytest.raises(AdapterNotFoundError, check=says("OTHER_GENERATION", generation=3)):
        registry.rollback("x", 3)
    assert registry.rollback("x", 1).generation == 1
    assert versions(registry) == (1, (2,))
    # A rollback may also go to a later generation. New weights get a number that none had before.
    assert registry.rollback("x", 2).generation == 2
    registry.rollback("x")
    assert registry.replace("x", "c").generation == 3
    assert versions(registry) == (3, (1,))


def test_metrics_report_the_tier_of_the_current_generation(make: Registries) -> None:
    metrics = Metrics()
    registry = make(1.5, keep_generations=1, metrics=metrics)

    def is_resident() -> bool:
        labels = {"adapter": "x", "tier": "host"}
        return bool(metrics.registry.get_sample_value("turret_adapter_residency", labels))

    registry.load("x", "a")
    registry.replace("x", "b")
    assert is_resident()
    # There is room for one generation, so a request for one evicts the other.
    digest(registry, 1)
    assert not is_resident()
    registry.rollback("x")
    assert is_resident()
    digest(registry, 2)
    assert not is_resident()


def test_generation_numbers_kept_only_by_an_alias_are_not_reused(
    make: Registries,
) -> None:
    registry = make(load="a")
    registry.load("x", "a")
    registry.set_alias("old", refs("x"))
    registry.replace("x", "b")
    registry.rollback("x")
    # The generation with the highest number stays, although no setting or alias keeps it.
    assert versions(registry) == (1, (2,))
    registry.delete_alias("old")
    assert versions(registry) == (1, (2,))
    assert registry.replace("x", "c").generation == 3
    assert versions(registry) == (3, ())


def test_no_generation_is_kept_by_default(make: Registries) -> None:
    registry = make(load="a")
    registry.replace("a", "b")
    assert versions(registry, "a") == (2, ())
    with pytest.raises(AdapterNotFoundError, check=says("NO_EARLIER_GENERATION")):
        registry.rollback("a")


def test_a_restart_keeps_generations_and_their_files(
    start: Start, make: Registries, tmp_path: Path
) -> None:
    registry = start(keep_generations=2)
    for path in "abc":
        staged = stage_directory(registry, make.root / path)
        registry.upload("x", staged, replace=path != "a")
    registry.replace("x", "d")
    registry.rollback("x", 2)
    registry.pin("x")
    expected = [digest(registry, number) for number in (2, 4)]
    uuid = registry.get("x").uuid
    until(lambda: not (tmp_path / "state" / "files" / f"{uuid}.1").exists())
    assert versions(registry) == (2, (3, 4))
    registry.close()
    # After a restart with a lower limit, the next replacement drops the surplus generations.
    registry = start(keep_generations=1)
    assert versions(registry) == (2, (3, 4))
    assert registry.get("x").pinned
    assert [digest(registry, number) for number in (2, 4)] == expected
    assert digest(registry, 3) == make(load="c").get("c").facts.digest
    assert registry.replace("x", "a").generation == 5
    assert versions(registry) == (5, (2,))
    until(lambda: not (tmp_path / "state" / "files" / f"{uuid}.3").exists())
    assert (tmp_path / "state" / "files" / f"{uuid}.2").is_dir()
    registry.unpin("x")
    registry.unload("x")
    assert list((tmp_path / "state" / "files").iterdir()) == []


def test_changed_files_are_detected_before_a_rollback_changes_anything(
    start: Start, make: Registries
) -> None:
    registry = start(keep_generations=2)
    registry.load("x", "a")
    registry.replace("x", "b")
    registry.close()
    shutil.rmtree(make.root / "a")
    shutil.copytree(make.root / "c", make.root / "a")
    registry = start(keep_generations=2)
    with pytest.raises(AdapterChangedError):
        digest(registry, 1)
    with pytest.raises(AdapterChangedError):
        registry.rollback("x")
    assert versions(registry) == (2, (1,))
    assert digest(registry) == make(load="b").get("b").facts.digest


def test_a_rollback_that_cannot_be_saved_changes_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = start(keep_generations=2)
    registry.load("x", "a", pinned=True)
    registry.replace("x", "b")

    def fail(*_: Any, **__: Any) -> None:
        raise StorageFullError("full")

    with monkeypatch.context() as patch:
        patch.setattr(registry._state, "write", fail)
        with pytest.raises(StorageFullError):
            registry.rollback("x")
    assert versions(registry) == (2, (1,))
    assert registry.rollback("x").pinned
    assert not registry.get("x", 2).pinned


def test_a_kept_generation_can_be_exported(make: Registries) -> None:
    registry = make(load="a", keep_generations=1)
    first = registry.get("a").facts.digest
    registry.replace("a", "b")
    with registry.export("a", 1) as export:
        assert (export.record.generation, export.record.facts.digest) == (1, first)
    registry.unload("a")


# Aliases


def target(registry: AdapterRegistry, name: str, draw: float) -> tuple[str, int]:
    mix = registry.acquire([AdapterRef(name=name, draw=draw)])
    registry.release(mix)
    adapter = mix.members[0][0]
    return adapter.name, adapter.generation


def test_requests_are_divided_by_weight(make: Registries) -> None:
    registry = make(load="abc")
    weights = [AdapterRef(name=name, weight=w) for name, w in (("a", 6), ("b", 3), ("c", 1))]
    registry.set_alias("prod", weights)
    expected = {0.0: "a", 0.59: "a", 0.61: "b", 0.89: "b", 0.91: "c", math.nextafter(1, 0): "c"}
    assert {draw: target(registry, "prod", draw)[0] for draw in expected} == expected
    own, _ = registry.tokenizers.find([AdapterRef(name="prod", draw=0.0)])
    assert own is None
    # Only a request may name an alias.
    with pytest.raises(AdapterNotFoundError, check=says("IS_ALIAS", alias="prod")):
        registry.acquire(refs(["prod"]))


def test_an_alias_keeps_the_generations_that_it_names(
    start: Start, make: Registries, tmp_path: Path
) -> None:
    registry = start(keep_generations=0)
    registry.upload("x", stage_directory(registry, make.root / "a"))
    alias = registry.set_alias("prod", refs("x"))
    assert [(t.name, t.generation, t.weight) for t in alias.targets] == [("x", 1, 1.0)]
    for path in "bcd":
        registry.replace("x", path)
    assert versions(registry) == (4, (1,))
    assert target(registry, "prod", 0.5) == ("x", 1)
    with pytest.raises(AdapterInUseError, check=says("ADAPTER_IS_TARGET", aliases="prod")):
        registry.unload("x")
    registry.close()
    registry = start(keep_generations=0)
    assert registry.aliases() == [alias]
    assert target(registry, "prod", 0.5) == ("x", 1)
    files = tmp_path / "state" / "files"
    assert len(list(files.iterdir())) == 1
    running = registry.acquire([AdapterRef(name="prod", draw=0.5)])
    registry.set_alias("prod", refs("x"))
    assert versions(registry) == (4, ())
    assert target(registry, "prod", 0.5) == ("x", 4)
    assert running.members[0][0].generation == 1
    assert len(list(files.iterdir())) == 1
    registry.release(running)
    until(lambda: not list(files.iterdir()))
    registry.delete_alias("prod")
    registry.unload("x")
    registry.close()
    assert start(keep_generations=2).aliases() == []


def test_a_move_that_cannot_be_saved_changes_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = start(keep_generations=0)
    registry.load("x", "a")
    registry.set_alias("prod", refs("x"))
    registry.replace("x", "b")

    def fail(*_: Any) -> None:
        raise StorageFullError("full")

    with monkeypatch.context() as patch:
        patch.setattr(registry._state, "save_alias", fail)
        with pytest.raises(StorageFullError):
            registry.set_alias("prod", refs("x"))
    assert target(registry, "prod", 0.0) == ("x", 1)
    # The move counts, even if the file of the adapter cannot be written after it.
    with monkeypatch.context() as patch:
        patch.setattr(registry._state, "write", fail)
        registry.set_alias("prod", refs("x"))
    assert target(registry, "prod", 0.0) == ("x", 2)
    assert versions(registry) == (2, (1,))


def test_an_alias_whose_adapter_is_gone_is_reported_and_not_served(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = start(keep_generations=2)
    registry.load("x", "a")
    registry.set_alias("prod", refs("x"))
    registry.set_alias("broken", refs("x"))
    registry.set_alias("empty", refs("x"))
    registry.close()
    state = tmp_path / "state"
    (state / "adapters" / "x.json").unlink()
    (state / "aliases" / "broken.json").write_text("{}")
    empty = {"version": 1, "name": "empty", "targets": []}
    (state / "aliases" / "empty.json").write_text(json.dumps(empty))
    registry = start(keep_generations=2)
    assert registry.aliases() == []
    assert caplog.text.count("cannot restore") == 3
    # The files are left for the operator.
    assert len(list((state / "aliases").iterdir())) == 3
    registry.load("x", "b")
    registry.close()
    # The new registration has the same name and generation, but other weights.
    registry = start(keep_generations=2)
    assert registry.aliases() == []
    registry.set_alias("prod", refs("x"))
    registry.close()
    assert [alias.name for alias in start(keep_generations=2).aliases()] == ["prod"]


# An export while its adapter is replaced or unloaded.


def files_of(tmp_path: Path) -> list[str]:
    folders = (tmp_path / "state" / "files").glob("*")
    # Unlike a glob over two levels, this does not fail if a folder is removed meanwhile.
    return sorted(p.name for p in folders if (p / "adapter_model.safetensors").exists())


def test_an_export_retries_if_its_files_were_replaced(
    start: Start, make: Registries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = start()
    first = registry.upload("up", stage_directory(registry, make.root / "a"))
    meanwhile: list[Callable[[], None]] = []

    class Slow(AdapterExport):
        def __init__(self, *args: Any) -> None:
            if meanwhile:
                meanwhile.pop()()
            super().__init__(*args)

    def replace() -> None:
        registry.upload("up", stage_directory(registry, make.root / "b"), replace=True)
        until(lambda: files_of(tmp_path) == [f"{first.uuid}.2"])

    monkeypatch.setattr("turret.server.adapters.registry.AdapterExport", Slow)
    meanwhile.append(replace)
    with registry.export("up") as export:
        assert export.record.generation == 2
    meanwhile.append(lambda: registry.unload("up"))
    with pytest.raises(AdapterNotFoundError):
        registry.export("up")
    assert not meanwhile
    # Without a change, the files are simply missing.
    registry.load("c", "c")
    shutil.rmtree(make.root / "c")
    with pytest.raises(AdapterChangedError, check=says("FILES_LOST", adapter="c", path="c")):
        registry.export("c")


def test_an_export_equals_the_loaded_adapter(start: Start, make: Registries) -> None:
    registry = start()
    registry.upload("up", stage_directory(registry, make.root / "a"))
    with registry.export("up", 1) as export:
        # Neither of these affects a running export.
        registry.upload("up", stage_directory(registry, make.root / "b"), replace=True)
        registry.unload("up")
        contents: dict[str, bytes] = {}
        for name, data in export.chunks():
            contents[name] = contents.get(name, b"") + data
    for file in export.files:
        assert contents[file.name] == (make.root / "a" / file.name).read_bytes()
        assert file.size_bytes == len(contents[file.name])
    assert export.record.generation == 1
