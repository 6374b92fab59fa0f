"""The directory of a run: exclusive use, and messages about it."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_modules import loaded_and_said_by
from said import says

from turret.training.errors import RunError
from turret.training.run.folder import RunFolder
from turret.training.words import say


def test_two_runs_do_not_write_into_one_directory(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    (tmp_path / "t.toml").write_text('[data]\ntrain = "t.jsonl"\n')
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    with run.held():
        with pytest.raises(RunError, check=says("RUN_IN_USE")), run.held():
            pass
        code, modules, err = loaded_and_said_by("train", "run", str(tmp_path / "t.toml"))
        assert code == 1
        assert err == f"error: {say('RUN_IN_USE', path=run.path)}\n"
        assert "torch" not in modules
        run.write_facts({})
    with run.held():
        assert run.facts.exists()


def test_a_failed_run_leaves_no_directory(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), run.held():
        raise ZeroDivisionError
    assert not run.path.exists()
    run.path.mkdir()
    with run.held():
        pass
    assert run.path.exists()


def test_only_the_files_of_a_run_are_overwritten(tmp_path: Path):
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    (there / "adapter").mkdir(parents=True)
    (there / "run.json").touch()
    (there / "notes.txt").touch()
    (elsewhere / "step-00000001.pt").mkdir(parents=True)
    (there / "checkpoints").symlink_to(elsewhere)
    (tmp_path / "run").symlink_to(there)
    RunFolder(tmp_path / "run").clear()
    assert [path.name for path in there.iterdir()] == ["notes.txt"]
    assert (elsewhere / "step-00000001.pt").exists()
