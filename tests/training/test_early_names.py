"""Early errors of ``turret train`` about names and examples."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.training import ended, write_config
from command_modules import loaded_and_said_by

from turret.training.words import say


def test_only_a_name_written_as_an_id_is_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A path that is joined with a file's folder may look like an id."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = write_config(Path("acme"), '{"text": "a"}')
    own = Path("acme/own.toml")
    own.write_text('[base]\nmodel = "my-model"\n[data]\ntrain = "t.jsonl"\n')
    for words, place in (
        ((str(own),), "acme/my-model"),
        ((config, "--set", "base.model=my-model"), "acme/my-model"),
        ((config, "--model", "my-model"), "my-model"),
        ((config, "--model", "./org/name"), "org/name"),
    ):
        code, modules, err = loaded_and_said_by("train", "run", *words)
        assert code == 1
        assert f"{tmp_path}/{place} " in err
        assert not modules & {"torch", "huggingface_hub"}
    _, _, err = loaded_and_said_by("train", "run", config, "--model", "org/name")
    assert "org/name" in err


def test_the_data_are_read_before_the_hub_is_asked(tmp_path: Path):
    config = write_config(tmp_path, '{"messages": []}')
    code, modules, err = loaded_and_said_by("train", "plan", config, "--model", "org/name")
    assert code == 1
    assert err == f"error: {tmp_path}/t.jsonl:1: messages: {say('EMPTY')}\n"
    assert not modules & {"torch", "huggingface_hub"}


@pytest.mark.parametrize(
    ("lines", "flags"), [(1, ()), (3, ("--set", "data.validation_fraction=0"))]
)
def test_a_sweep_without_validation_data_is_rejected_before_torch_is_loaded(
    lines: int, flags: tuple[str, ...], tmp_path: Path
):
    config = write_config(tmp_path, *(f'{{"text": "{line}"}}' for line in range(lines)))
    said = str(say("VALIDATION_EMPTY", path=tmp_path / "t.jsonl", found=lines))
    assert said in ended("sweep", config, *flags)
