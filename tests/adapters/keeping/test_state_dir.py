"""The state that survives a restart, and invalid state directories."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builders.registries import (
    Gate,
    Registries,
    Start,
    Waiter,
    adapter_bytes,
    refs,
    resident,
    stage_directory,
    until,
)
from said import says

from turret.server.adapters import state_dir
from turret.server.adapters.state_dir import SavedRegistration, StateDir, UploadedFile
from turret.server.basics import files
from turret.server.errors import (
    AdapterChangedError,
    AdapterCheckpointError,
    BudgetExceededError,
    InvalidRequestError,
    StorageFullError,
    TurretError,
)


def files_of(tmp_path: Path) -> list[str]:
    return sorted(p.parent.name for p in (tmp_path / "state" / "files").glob("*/*.safetensors"))


def test_a_restart_keeps_everything_but_residency(start: Start, make: Registries) -> None:
    registry = start()
    registry.load("a", "a")
    registry.load("b", "b", pinned=True)
    registry.load("gone", "c")
    registry.upload("Org/Up.v1/A", stage_directory(registry, make.root / "c"))
    registry.replace("a", "d")
    registry.unload("gone")
    before = registry.list()
    registry.close()
    registry = start()
    after = registry.list()
    assert [r.name for r in after] == ["Org/Up.v1/A", "a", "b"]
    for old, new in zip(before, after, strict=True):
        bytes_host = old.bytes_host if new.name == "b" else 0
        residency = "host" if new.name == "b" else "disk"
        assert new == dataclasses.replace(old, bytes_host=bytes_host, residency=residency)
    for name in ("a", "b", "Org/Up.v1/A"):
        waiter = Waiter(registry.acquire(refs([name])))
        assert waiter.was_resident or waiter.wait().error is None
    assert registry.host_bytes_used == 3 * adapter_bytes()


def test_nothing_is_read_at_startup(start: Start, make: Registries) -> None:
    registry = start()
    registry.load("a", "a")
    registry.close()
    shutil.move(make.root / "a", make.root / "elsewhere")
    registry = start()
    assert registry.get("a").residency == "disk"
    waiter = Waiter(registry.acquire(refs("a")))
    assert isinstance(waiter.wait().error, AdapterCheckpointError)
    registry.release(waiter.mix)
    shutil.move(make.root / "elsewhere", make.root / "a")
    assert Waiter(registry.acquire(refs("a"))).wait().error is None


def test_files_that_changed_during_downtime_are_detected_at_first_use(
    start: Start, make: Registries
) -> None:
    registry = start()
    registry.load("a", "a")
    registry.close()
    shutil.rmtree(make.root / "a")
    shutil.copytree(make.root / "b", make.root / "a")
    registry = start()
    waiter = Waiter(registry.acquire(refs("a")))
    assert isinstance(waiter.wait().error, AdapterChangedError)
    registry.release(waiter.mix)
    with pytest.raises(AdapterChangedError):
        registry.export("a")
    assert registry.replace("a", "a").generation == 2
    assert Waiter(registry.acquire(refs("a"))).was_resident


def test_a_missing_pinned_adapter_does_not_prevent_startup(
    start: Start, make: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    registry = start()
    registry.load("a", "a", pinned=True)
    registry.load("b", "b", pinned=True)
    registry.close()
    shutil.rmtree(make.root / "a")
    registry = start()
    assert [(r.name, r.pinned) for r in registry.list()] == [("a", False), ("b", True)]
    assert "cannot pin" in caplog.text


def test_sizes_that_another_process_measured_are_corrected(start: Start, tmp_path: Path) -> None:
    registry = start()
    registry.load("a", "a")
    registry.load("b", "b")
    registry.close()
    for name, factor in (("a", 0.5), ("b", 2)):
        path = tmp_path / "state" / "adapters" / f"{name}.json"
        saved = json.loads(path.read_bytes())
        saved["facts"]["bytes_host"] = int(saved["facts"]["bytes_host"] * factor)
        path.write_text(json.dumps(saved))
    registry = start(3.5)
    for name, count in (("a", 1), ("b", 2), ("a", 2)):
        waiter = Waiter(registry.acquire(refs(name)))
        assert waiter.was_resident or waiter.wait().error is None
        assert registry.host_bytes_used == count * adapter_bytes()
        registry.release(waiter.mix)


def test_uploaded_files_go_with_the_adapter(start: Start, make: Registries, tmp_path: Path) -> None:
    registry = start(3)
    record = registry.upload("up", stage_directory(registry, make.root / "a"))
    assert files_of(tmp_path) == [f"{record.uuid}.1"]
    running = registry.acquire(refs(["up"]))
    registry.upload("up", stage_directory(registry, make.root / "b"), replace=True)
    assert files_of(tmp_path) == [f"{record.uuid}.1", f"{record.uuid}.2"]
    registry.release(running)
    until(lambda: files_of(tmp_path) == [f"{record.uuid}.2"])
    registry.unload("up")
    assert files_of(tmp_path) == []
    assert list((tmp_path / "state" / "adapters").iterdir()) == []
    # Adapters that were loaded from the root belong to the operator.
    registry.load("a", "a")
    registry.unload("a")
    assert (make.root / "a").is_dir()


def test_a_waiting_request_still_finds_the_files_of_its_generation(
    start: Start, make: Registries
) -> None:
    registry = start(1)
    registry.upload("up", stage_directory(registry, make.root / "a"))
    registry.load("b", "b")
    assert resident(registry) == "b"
    busy = registry.acquire(refs("b"))
    gate = Gate(registry)
    gate.open()
    waiting = Waiter(registry.acquire(refs(["up"])))
    registry.upload("up", stage_directory(registry, make.root / "c"), replace=True)
    registry.release(busy)
    assert waiting.wait().error is None
    assert waiting.mix.key[0][1] == 1


def test_uploading_the_same_content_again_keeps_the_first_files(
    start: Start, make: Registries, tmp_path: Path
) -> None:
    registry = start()
    first = registry.upload("up", stage_directory(registry, make.root / "a"))
    staged = stage_directory(registry, make.root / "a")
    assert registry.upload("up", staged, pinned=True).uuid == first.uuid
    staged.discard()
    assert registry.get("up").pinned
    assert registry.load("up", "a").generation == 1
    assert files_of(tmp_path) == [f"{first.uuid}.1"]
    assert list((tmp_path / "state" / "incoming").iterdir()) == []


def test_a_full_disk_changes_nothing(
    start: Start, make: Registries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = start()
    before = registry.load("a", "a")
    original = files.os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    staged = stage_directory(registry, make.root / "c")
    monkeypatch.setattr(files.os, "fsync", full)
    for change in (
        lambda: registry.load("b", "b"),
        lambda: registry.replace("a", "b"),
        lambda: registry.pin("a"),
        lambda: registry.load("c", "c", pinned=True),
    ):
        with pytest.raises(StorageFullError):
            change()
    monkeypatch.setattr(files.os, "fsync", original)
    assert registry.list() == [before]
    assert registry.host_bytes_used == adapter_bytes()
    staged.discard()
    registry.close()
    registry = start()
    assert [(r.name, r.generation, r.pinned) for r in registry.list()] == [("a", 1, False)]


def test_a_replacement_with_a_failed_disk_write_keeps_its_files(
    start: Start, make: Registries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registration already names the new files, and cannot be written back."""
    registry = start()
    registry.upload("up", stage_directory(registry, make.root / "a"))
    staged = stage_directory(registry, make.root / "b")
    with monkeypatch.context() as patch:
        _full_after(patch, "adapters")
        with pytest.raises(StorageFullError):
            registry.upload("up", staged, replace=True)
    staged.discard()
    assert Waiter(registry.acquire(refs(["up"]))).was_resident
    registry.close()
    registry = start()
    assert Waiter(registry.acquire(refs(["up"]))).wait().error is None


def test_a_failed_change_is_not_found_after_a_restart(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk reports an error although it has made the change."""
    registry = start()
    before, alias = registry.load("a", "a"), [registry.set_alias("prod", refs("a"))]
    free = registry.load("c", "c")
    for folder, change in (
        ("adapters", lambda: registry.unload("c")),
        ("adapters", lambda: registry.pin("a")),
        ("adapters", lambda: registry.replace("a", "b")),
        ("adapters", lambda: registry.load("b", "b")),
        ("aliases", lambda: registry.delete_alias("prod")),
    ):
        with monkeypatch.context() as patch:
            _full_after(patch, folder, once=True)
            with pytest.raises(StorageFullError):
                change()
    assert (registry.list(), registry.aliases()) == ([before, free], alias)
    registry.close()
    registry = start()
    found = [(each.name, each.uuid, each.generation, each.pinned) for each in registry.list()]
    assert found == [(each.name, each.uuid, 1, False) for each in (before, free)]
    assert registry.aliases() == alias


def test_an_alias_that_cannot_be_saved_keeps_its_previous_target(
    start: Start, make: Registries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a restart would lose the alias, whose new target nothing has kept."""
    registry = start()
    registry.load("a", "a")
    registry.load("b", "b")
    before = [registry.set_alias("prod", refs("a"))]
    for name in ("prod", "new"):
        with monkeypatch.context() as patch:
            _full_after(patch, "aliases", once=True)
            with pytest.raises(StorageFullError):
                registry.set_alias(name, refs("b"))
    registry.replace("b", "c")
    assert registry.aliases() == before
    registry.close()
    assert start().aliases() == before


def _full_after(patch: pytest.MonkeyPatch, folder: str, *, once: bool = False) -> None:
    """Make the disk full as soon as a file in this folder has been replaced."""
    original = files.sync_directory

    def full(path: Path) -> None:
        if path.name != folder:
            return original(path)
        if once:
            patch.setattr(files, "sync_directory", original)
        else:
            patch.setattr(files.os, "fsync", full_disk)
        return full_disk()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    patch.setattr(files, "sync_directory", full)


def test_an_upload_over_the_limits_is_refused_before_any_data(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = start()
    with pytest.raises(
        BudgetExceededError, check=says("UPLOAD_TOO_LARGE", max_upload_bytes=1 << 20)
    ):
        registry.stage([UploadedFile("x", 1 << 20), UploadedFile("y", 1)])
    free = shutil.disk_usage("/")._replace(free=state_dir.MIN_FREE_BYTES + 9)
    monkeypatch.setattr(state_dir.shutil, "disk_usage", lambda path: free)
    with pytest.raises(StorageFullError, check=says("STATE_DISK_FULL", bytes=10)):
        registry.stage([UploadedFile("x", 10)])
    registry.stage([UploadedFile("x", 9)]).discard()


def test_chunks_must_match_the_announced_files(start: Start) -> None:
    registry = start()
    sha = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"  # of "foo"
    files = [UploadedFile("x", 3, sha), UploadedFile("y", 4)]

    def refuse(
        check: Callable[[object], bool], *chunks: tuple[str, bytes], finish: bool = False
    ) -> None:
        staged = registry.stage(files)
        steps = [functools.partial(staged.write, *chunk) for chunk in chunks]
        *steps, last = [*steps, staged.finish] if finish else steps
        for step in steps:
            step()
        with pytest.raises(InvalidRequestError, check=check):
            last()
        staged.discard()
        assert not staged.directory.exists()

    refuse(says("FILE_NOT_ANNOUNCED"), ("z", b"1"))
    refuse(says("FILES_INTERLEAVE", other="x"), ("x", b"f"), ("y", b"1"))
    refuse(says("LONGER_THAN_ANNOUNCED", size=3), ("x", b"fo"), ("x", b"oo"))
    refuse(says("FILE_NOT_ANNOUNCED"), ("x", b"foo"), ("x", b"o"))
    refuse(says("WRONG_SHA256"), ("x", b"bar"))
    refuse(says("FILE_CUT_SHORT", found=0, needed=4), ("x", b"foo"), finish=True)
    half = says("FILE_CUT_SHORT", found=2, needed=4)
    refuse(half, ("x", b"foo"), ("y", b"ab"), finish=True)
    staged = registry.stage(files)
    for name, data in (("y", b"ab"), ("y", b"cd"), ("x", b"foo")):
        staged.write(name, data)
    staged.finish()
    assert (staged.directory / "y").read_bytes() == b"abcd"
    staged.discard()
    with pytest.raises(InvalidRequestError, check=says("UPLOAD_OVER")):
        staged.write("x", b"")


def test_one_server_and_one_base_model_per_directory(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "deep" / "state", 1)
    state.bind("m", "d" * 64)
    with pytest.raises(ValueError, check=says("STATE_DIR_IN_USE")):
        StateDir(tmp_path / "deep" / "state", 1)
    state.close()
    state.close()
    again = StateDir(tmp_path / "deep" / "state", 1)
    again.bind("renamed", "d" * 64)
    with pytest.raises(ValueError, check=says("STATE_OF_OTHER_BASE", found="m")):
        again.bind("m", "e" * 64)
    again.close()


@pytest.mark.parametrize("data", ["", "{", "[]", '{"version": 1}', "[" * 200_000])
def test_a_damaged_record_of_the_base_is_reported(tmp_path: Path, data: str) -> None:
    state = StateDir(tmp_path, 1)
    (tmp_path / "base.json").write_text(data)
    with pytest.raises(ValueError, check=says("STATE_BASE_DAMAGED", path=tmp_path / "base.json")):
        state.bind("m", "d" * 64)
    state.close()


def test_a_state_directory_that_everyone_can_change_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for mode, count in ((0o770, 0), (0o777, 1)):
        tmp_path.chmod(mode)
        StateDir(tmp_path, 1).close()
        assert caplog.text.count("every user") == count


def test_a_damaged_file_loses_one_adapter_but_no_upload(
    start: Start, make: Registries, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = start()
    registry.load("a", "a")
    registry.upload("up", stage_directory(registry, make.root / "b"))
    registry.close()
    path = tmp_path / "state" / "adapters" / "up.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    registry = start()
    assert [record.name for record in registry.list()] == ["a"]
    assert "cannot restore" in caplog.text
    registry.close()
    path.write_bytes(whole)
    registry = start()
    assert Waiter(registry.acquire(refs(["up"]))).wait().error is None


def test_foreign_entries_neither_prevent_startup_nor_leave_the_directory(
    start: Start, make: Registries, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = start()
    registry.load("a", "a")
    registry.upload("up", stage_directory(registry, make.root / "b"))
    registry.close()
    folder = tmp_path / "state" / "adapters"
    outside = tmp_path / "outside"
    outside.mkdir()
    saved = json.loads((folder / "up.json").read_text())
    saved["source"]["path"] = "files/../../outside"
    (folder / "up.json").write_text(json.dumps(saved))
    os.mkfifo(folder / "fifo.json")
    os.mkfifo(tmp_path / "state" / "aliases" / "fifo.json")
    (folder / "deep.json").write_text("[" * 200_000)
    (folder / "folder.json.partial").mkdir()
    registry = start()
    assert [record.name for record in registry.list()] == ["a"]
    assert caplog.text.count("cannot restore") == 5
    assert outside.exists()
    registry.close()


def test_registrations_of_the_first_version_are_read(start: Start, tmp_path: Path) -> None:
    registry = start()
    registry.load("a", "a")
    registry.close()
    path = tmp_path / "state" / "adapters" / "a.json"
    fields = json.loads(path.read_bytes())
    del fields["facts"]["components"]
    path.write_text(json.dumps({**fields, "version": 1}))
    assert [record.name for record in start().list()] == ["a"]


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(version=11),
        lambda fields: fields.pop("uuid"),
        lambda fields: fields.update(generation="1"),
        lambda fields: fields.update(pinned=1),
        lambda fields: fields.update(more=1),
        lambda fields: fields["facts"].update(ranks=["8"]),
        lambda fields: fields["facts"].update(ranks=8),
        lambda fields: fields["facts"].pop("digest"),
        lambda fields: fields["source"].update(path=None),
        lambda fields: fields.update(source=[]),
        lambda fields: fields.update(kept=[3]),
        lambda fields: fields["kept"][0].update(generation="1"),
        lambda fields: fields["kept"][0].pop("facts"),
    ],
)
def test_invalid_registrations_are_rejected(start: Start, tmp_path: Path, change: Callable) -> None:
    registry = start(keep_generations=1)
    registry.load("a", "a")
    registry.replace("a", "b")
    data = (tmp_path / "state" / "adapters" / "a.json").read_bytes()
    assert SavedRegistration.from_json(data).to_json() == data
    fields = json.loads(data)
    change(fields)
    with pytest.raises(ValueError, match="registration"):
        SavedRegistration.from_json(json.dumps(fields).encode())


# How messages name an adapter whose files are in the server's own directory.


def test_messages_name_an_upload_but_not_its_path(
    start: Start, make: Registries, tmp_path: Path
) -> None:
    """Messages during the check, after a loss of its files, and after a restart."""
    registry = start()
    config = make.root / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 3}))
    with pytest.raises(
        AdapterCheckpointError, check=says("ADAPTER_UNUSABLE", path="wrong")
    ) as refused:
        registry.upload("wrong", stage_directory(registry, make.root / "a"))
    errors: list[TurretError] = [refused.value]
    registry.upload("up", stage_directory(registry, make.root / "b"))
    for _ in range(2):
        shutil.move(tmp_path / "state" / "files", tmp_path / "elsewhere")
        (tmp_path / "state" / "files").mkdir()
        with pytest.raises(AdapterChangedError, check=says("FILES_LOST", adapter="up")) as gone:
            registry.export("up")
        errors.append(gone.value)
        shutil.rmtree(tmp_path / "state" / "files")
        shutil.move(tmp_path / "elsewhere", tmp_path / "state" / "files")
        registry.close()
        registry = start()
    kept = next((tmp_path / "state" / "files").iterdir())
    shutil.copy(make.root / "c" / "adapter_model.safetensors", kept)
    with pytest.raises(AdapterChangedError, check=says("FILES_CHANGED", adapter="up")) as changed:
        registry.export("up")
    for error in (*errors, changed.value):
        told = f"{error.message} {dict(error.metadata)} {error.violations}"
        assert not any(word in told for word in ("incoming", "files/", str(tmp_path))), told
