"""The name in messages of an adapter whose files are in the server's own directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builders.registries import Registries, stage_directory
from said import says

from turret.server.adapters.registry.registry import AdapterRegistry
from turret.server.adapters.state_dir import StateDir
from turret.server.errors import AdapterChangedError, AdapterCheckpointError, TurretError


def test_messages_name_an_upload_but_not_its_path(make: Registries, tmp_path: Path) -> None:
    """Messages during the check, after a loss of its files, and after a restart."""

    def start() -> AdapterRegistry:
        registry = make(state=StateDir(tmp_path / "state", 1 << 20))
        registry.restore()
        return registry

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
