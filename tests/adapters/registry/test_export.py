"""An export while its adapter is replaced or unloaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.registries import Registries, stage_directory, until
from said import says

from turret.server.adapters.registry.export import AdapterExport
from turret.server.adapters.state_dir import StateDir
from turret.server.errors import AdapterChangedError, AdapterNotFoundError


def files_of(tmp_path: Path) -> list[str]:
    folders = (tmp_path / "state" / "files").glob("*")
    # Unlike a glob over two levels, this does not fail if a folder is removed meanwhile.
    return sorted(p.name for p in folders if (p / "adapter_model.safetensors").exists())


def test_an_export_retries_if_its_files_were_replaced(
    make: Registries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make(100, state=StateDir(tmp_path / "state", 1 << 20))
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

    monkeypatch.setattr("turret.server.adapters.registry.registry.AdapterExport", Slow)
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


def test_an_export_equals_the_loaded_adapter(make: Registries, tmp_path: Path) -> None:
    registry = make(100, state=StateDir(tmp_path / "state", 1 << 20))
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
