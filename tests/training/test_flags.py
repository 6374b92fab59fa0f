"""What ``turret train`` says of flags that it has not, and of values that they cannot have."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_modules import loaded_and_said_by

from turret.server.cli import main
from turret.training.errors import ConfigError
from turret.training.settings.config import TrainConfig
from turret.training.settings.config_file import build_config
from turret.training.settings.flags import known_otherwise
from turret.training.settings.targets import check_targets


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The first line of what a command ends with that the parser refuses."""
    with pytest.raises(SystemExit) as caught:
        main(["train", *words])
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("run", "t.toml", "--epochs", "3"), "--set run.epochs=3"),
        (("run", "t.toml", "--epochs=3"), "--set run.epochs=3"),
        # The parser takes 3 for the config.
        (("run", "--epochs", "3", "t.toml"), "--set run.epochs=3"),
        (("plan", "t.toml", "--batch_size", "4"), "--set run.batch_size=4"),
        (("sweep", "t.toml", "--bach-size", "4"), "--set run.batch_size=4"),
        (("run", "t.toml", "--lr", "1e-4"), "--learning-rate 1e-4"),
        (("run", "t.toml", "--lr 1e-4"), "--learning-rate VALUE"),
        (("run", "t.toml", "--lora_r", "4"), "--rank 4"),
        (("run", "t.toml", "--model-name-or-path", "org/name"), "--model org/name"),
        (("run", "t.toml", "--resu"), "'--resume'"),
        (("run", "t.toml", "--packing"), "--set data.packing=VALUE"),
        (("run", "t.toml", "--resme"), "'--resume'"),
    ],
)
def test_a_setting_typed_as_a_flag_is_told_as_it_is_typed(
    words: tuple[str, ...], meant: str, capsys: pytest.CaptureFixture[str]
):
    assert refusal(capsys, *words).endswith(f"; did you mean {meant}?")


def test_ranks_are_told_once(capsys: pytest.CaptureFixture[str]):
    said = refusal(capsys, "sweep", "t.toml", "--ranks", "4", "--rank", "8")
    assert said.endswith("stands twice (--rank is read as it is); all in one are --ranks 4,8")


def test_init_says_what_it_wrote_and_where_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "init", str(tmp_path / "t.toml")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/t.toml is written; ")
    assert main(["train", "init", str(tmp_path / "no" / "t.toml")]) == 1
    said = f"error: {tmp_path}/no does not exist; `mkdir -p {tmp_path}/no` makes it\n"
    assert capsys.readouterr().err == said


def test_whatever_is_suggested_is_taken():
    flags = ("--rank", "--train", "--output", "--steps", "--learning-rate", "--seed")
    flags += ("--model", "--method")
    for meant in known_otherwise().values():
        if meant.startswith("--set "):
            table, _, key = meant.removeprefix("--set ").removesuffix("=VALUE").partition(".")
            kinds = TrainConfig.__annotations__
            assert table in kinds
            known = build_config({"data": {"train": "t"}})
            assert hasattr(getattr(known, table), key)
        else:
            assert meant.removesuffix(" VALUE") in flags


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("epochs=3", "there is no key 'epochs'; did you mean run.epochs=3?"),
        ("run.epoch=3", "there is no key 'run.epoch'; did you mean run.epochs=3?"),
        ("method.epochs=3", "there is no key 'method.epochs'; did you mean run.epochs=3?"),
        ("lr=3", "there is no key 'lr'; did you mean optimizer.learning_rate=3?"),
        ("optimizer.zzz=3", "there is no key 'optimizer.zzz'; there are optimizer.name, "),
        ("zzz.zzz=3", "there is no key 'zzz.zzz'; tables are base, method, data, optimizer, run"),
        ("run.epochs", "'run.epochs' is not TABLE.KEY=VALUE"),
    ],
)
def test_a_key_that_is_none_is_refused_with_the_one_that_was_meant(
    override: str, said: str, capsys: pytest.CaptureFixture[str]
):
    line = refusal(capsys, "run", "t.toml", "--set", override)
    assert line.startswith(f"turret train run: error: argument --set: {said}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--threads", "many"), "--threads: must be a whole number from 1 on, not 'many'"),
        (("--threads", "0"), "--threads: must be a whole number from 1 on, not '0'"),
        (("--nice", "20"), "--nice: must be 0 to 19, not '20'"),
        (("--nice", "x"), "--nice: must be 0 to 19, not 'x'"),
    ],
)
def test_a_number_that_cannot_be_is_refused_in_words(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
):
    assert refusal(capsys, "run", "t.toml", *words).endswith(f"argument {said}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "--rank", "x"), '--rank: must be a whole number, not "x"'),
        (("run", "--steps", "0"), "--steps: must be at least 1"),
        (("run", "--learning-rate", "-1"), "--learning-rate: must be more than 0"),
        (("run", "--method", "lorra"), "--method: 'lorra' is none of lora, "),
        (("run", "--model", "nope"), "--model: "),
        (("run", "--set", "base.model=nope"), "--set base.model: "),
        (("run", "--set", "run.seed=-1"), "--set run.seed: must be at least 0"),
        (("sweep", "--ranks", "2,5000"), "--ranks: at most 192 on these modules"),
        # A flag of its own would be without effect.
        (("sweep", "--rank", "5000"), "--ranks: at most 192 on these modules"),
    ],
)
def test_a_value_is_refused_by_the_name_that_was_typed(
    words: tuple[str, ...], said: str, tmp_path: Path
):
    (tmp_path / "t.toml").write_text('[data]\ntrain = "t.jsonl"\n')
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    verb, *flags = words
    _, modules, err = loaded_and_said_by("train", verb, str(tmp_path / "t.toml"), *flags)
    assert err.startswith(f"error: {said}")
    assert "torch" not in modules


def test_modules_are_suggested_by_the_closest_name():
    with pytest.raises(ConfigError, match="did you mean 'all-linear'"):
        check_targets("llama", ["linear"])
