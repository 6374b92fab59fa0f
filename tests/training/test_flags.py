"""Errors of ``turret train`` about unknown flags and invalid values."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from command_modules import loaded_and_said_by
from said import says

from turret.server.basics.settings import all_keys
from turret.server.cli import main
from turret.training.settings import TrainConfig, build_config
from turret.training.settings.checks import check_names
from turret.training.settings.flags import config_parser, flags, given
from turret.training.words import ConfigError


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The first line of the output of a command that the parser rejects."""
    with pytest.raises(SystemExit) as caught:
        main(["train", *words])
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[0]


def test_every_key_has_a_flag(tmp_path: Path):
    parser = argparse.ArgumentParser(parents=[config_parser()])
    words = ["c/t.toml", "--epochs", "3", "--packing", "--no-decompose-both", "--method", "dora"]
    words += ["--optimizer", "adamw8bit", "--init-text", "8", "--targets", "q_proj,v_proj"]
    words += ["--train", "a.jsonl", "--validation", "b.jsonl", "--learning-rate", "1e-4"]
    args = parser.parse_args(words)
    config = build_config({"data": {"train": "t"}}, ["run.epochs=9", "run.seed=4"], given(args))
    assert (config.run.epochs, config.run.seed) == (3.0, 4)
    assert (config.data.packing, config.method.decompose_both) == (True, False)
    assert (config.method.name, config.optimizer.name) == ("dora", "adamw8bit")
    assert (config.method.init_text, config.method.targets) == ("8", ("q_proj", "v_proj"))
    assert config.optimizer.learning_rate == 1e-4
    assert config.data.train == str(Path("a.jsonl").absolute())
    assert config.data.validation == str(Path("b.jsonl").absolute())
    named = {key for _, key, _ in flags()}
    assert named == {*all_keys(TrainConfig)} - {"method.components"}
    assert len({flag for flag, _, _ in flags()}) == len(named)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("run", "t.toml", "--epoch", "3"), "--epochs"),
        (("sweep", "t.toml", "--bach-size", "4"), "--batch-size"),
        (("run", "t.toml", "--resme"), "--resume"),
    ],
)
def test_the_closest_flag_is_suggested(
    words: tuple[str, ...], meant: str, capsys: pytest.CaptureFixture[str]
):
    assert meant in refusal(capsys, *words)


def test_init_reports_what_it_wrote_or_could_not_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "init", str(tmp_path / "t.toml")]) == 0
    assert (tmp_path / "t.toml").is_file()
    assert str(tmp_path / "t.toml") in capsys.readouterr().out
    assert main(["train", "init", str(tmp_path / "no" / "t.toml")]) == 1
    assert str(tmp_path / "no") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--threads", "many"), ("--threads", "0"), ("--nice", "20"), ("--nice", "x")],
)
def test_impossible_numbers_are_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]):
    assert flag in refusal(capsys, "run", "t.toml", flag, value)


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (("run", "--rank", "x", "--steps", "0"), ["--rank", "--steps"]),
        (("run", "--learning-rate", "-1"), ["--learning-rate"]),
        (("run", "--method", "lorra"), ["--method"]),
        (("run", "--model", "nope"), ["--model"]),
        (("run", "--set", "base.model=nope"), ["--set base.model"]),
        (("run", "--set", "run.seed=-1"), ["--set run.seed"]),
        (("run", "--set", "run.epoch=3"), ["--set run.epoch"]),
        (("run", "--set", "epochs"), ["--set"]),
        (("sweep", "--ranks", "2,5000"), ["--ranks"]),
        # Lists are joined.
        (("sweep", "--ranks", "5000", "--ranks", "2"), ["--ranks"]),
        # For a sweep, --rank is another spelling of --ranks.
        (("sweep", "--rank", "5000"), ["--ranks"]),
    ],
)
def test_an_invalid_value_is_reported_under_the_name_that_was_typed(
    words: tuple[str, ...], place: list[str], tmp_path: Path
):
    (tmp_path / "t.toml").write_text('[data]\ntrain = "t.jsonl"\n')
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    verb, *flags = words
    _, modules, err = loaded_and_said_by("train", verb, str(tmp_path / "t.toml"), *flags)
    assert sorted(line.split(": ")[1] for line in err.splitlines()) == place
    assert "torch" not in modules


def test_modules_are_suggested_by_the_closest_name():
    with pytest.raises(ConfigError, check=says("UNKNOWN_TARGET", closest="all-linear")):
        check_names("llama", ["q_proj"], ["linear"])
