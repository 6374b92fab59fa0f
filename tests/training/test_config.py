"""The config file and the data files: valid contents, and errors."""

from __future__ import annotations

import io
import tomllib
from pathlib import Path

import pytest
from builders.training import resolve_tiny, write_jsonl
from rich.console import Console
from said import says

from turret.server.basics.settings import fields_of, tables_of
from turret.server.cli import main
from turret.training.examples import Example, read_examples
from turret.training.methods import METHODS as TRAINED
from turret.training.plan import Plan
from turret.training.settings import (
    METHOD_NAMES,
    TrainConfig,
    build_config,
    read_config,
    render_commented,
    render_config,
)
from turret.training.words import ConfigError, DataError, say

MINIMAL = {"data": {"train": "train.jsonl"}}


def test_the_commented_file_holds_every_key_and_the_defaults(tmp_path: Path):
    path = tmp_path / "train.toml"
    path.write_text(render_commented(), encoding="utf-8")
    assert read_config(path) == build_config(MINIMAL)
    # With the commented-out samples enabled, every key is present and every value is valid.
    lines = path.read_text(encoding="utf-8").splitlines()
    keys = [line.removeprefix("# ") if " = " in line else line for line in lines]
    tables = tomllib.loads("\n".join(keys))
    for table, kind in tables_of(TrainConfig).items():
        assert list(tables[table]) == list(fields_of(kind))
    build_config(tables)


def test_a_rendered_config_reads_back_equal(tmp_path: Path):
    config = build_config(
        MINIMAL,
        [
            "method.targets=['q_proj', 'v_proj']",
            'method.init_text="a \\"b\\" \\\\ \\u007f\\n"',
            "optimizer.learning_rate=1e-5",
            "data.packing=true",
        ],
    )
    path = tmp_path / "config.toml"
    path.write_text(render_config(config), encoding="utf-8")
    assert read_config(path) == config


def test_later_overrides_win_and_bare_words_are_strings():
    overrides = ["run.steps=7", "run.steps = 9", "method.name=dora", "method.targets=attention"]
    config = build_config(MINIMAL, overrides)
    assert (config.run.steps, config.method.name) == (9, "dora")
    assert config.method.targets == ("attention",)


def test_method_names_match_the_existing_methods():
    assert tuple(TRAINED) == METHOD_NAMES


def wrong(error: ConfigError) -> set[tuple[str, str, str | None]]:
    """The key, reason and suggestion of each error."""
    return {(key, t.reason, t.params.get("closest")) for key, t in error.violations}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["method.rnak=8", "runs.steps=1", "run.rank=1", "x.y=1", "optimizer.zzz=1"],
            {
                ("method.rnak", "UNKNOWN_FIELD", "method.rank"),
                ("run.rank", "UNKNOWN_FIELD", "method.rank"),
                ("runs", "UNKNOWN_FIELD", "run"),
                ("x", "UNKNOWN_FIELD", None),
                ("optimizer.zzz", "UNKNOWN_FIELD", None),
            },
        ),
        (["method.name=lorra"], {("method.name", "NOT_ONE_OF", "lora")}),
        (["method.name=P-Tuning"], {("method.name", "NOT_ONE_OF", "p_tuning")}),
        (["method.rank=0"], {("method.rank", "TOO_SMALL", None)}),
        (["method.rank=8.5"], {("method.rank", "NOT_A_WHOLE_NUMBER", None)}),
        (["method.rank=true"], {("method.rank", "NOT_A_WHOLE_NUMBER", None)}),
        (["method.rank='8'"], {("method.rank", "NOT_A_WHOLE_NUMBER", None)}),
        (["method.alpha=0"], {("method.alpha", "NOT_ABOVE", None)}),
        (["data.packing=1"], {("data.packing", "NOT_TRUE_OR_FALSE", None)}),
        (["base.weights=int8"], {("base.weights", "NOT_ONE_OF", None)}),
        (["optimizer.beta1=1"], {("optimizer.beta1", "NOT_BELOW", None)}),
        (["method.targets=[]"], {("method.targets", "EMPTY", None)}),
        (["method.targets=[1]"], {("method.targets", "NOT_A_STRING", None)}),
        (
            ["data.task=classification", "data.loss_on=all"],
            {("data.loss_on", "LABELS_ARE_LEARNED", None)},
        ),
        (["steps=1"], {("--set", "NOT_KEY_VALUE", None)}),
        (["run.steps"], {("--set", "NOT_KEY_VALUE", None)}),
        (
            ["method.rank=0", "run.epochs=0", "data.train="],
            {
                ("method.rank", "TOO_SMALL", None),
                ("run.epochs", "NOT_ABOVE", None),
                ("data.train", "EMPTY", None),
            },
        ),
    ],
)
def test_an_invalid_value_is_reported_by_name(
    overrides: list[str], expected: set[tuple[str, str, str | None]]
):
    with pytest.raises(ConfigError) as caught:
        build_config(MINIMAL, overrides)
    assert wrong(caught.value) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("data.train", "REQUIRED", None)),
        ("data = 3", ("data", "NOT_A_TABLE", None)),
        ("[data", ("", "NOT_TOML", None)),
        ("[data]\ntrain = a.jsonl\n", ("", "NOT_TOML", None)),
        ("method: lora\n", ("", "NOT_TOML", None)),
        ("[data]\ntrain = 'a'\ntrain = 'b'\n", ("", "NOT_TOML", None)),
        ("rank = 8\n[data]\ntrain = 'a'\n", ("rank", "UNKNOWN_FIELD", "method.rank")),
    ],
)
def test_an_invalid_file_is_refused(
    tmp_path: Path, text: str, expected: tuple[str, str, str | None]
):
    path = tmp_path / "train.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert wrong(caught.value) == {expected}
    assert caught.value.path == path


def test_a_byte_order_mark_is_skipped(tmp_path: Path):
    path = tmp_path / "train.toml"
    path.write_text('[data]\ntrain = "t.jsonl"\n', encoding="utf-8-sig", newline="\r\n")
    assert read_config(path).data.train == "t.jsonl"
    data = tmp_path / "t.jsonl"
    data.write_text('{"text": "a"}\n', encoding="utf-8-sig")
    assert [example.completion for example in read_examples(data)] == ["a"]


def test_examples_of_all_shapes_are_read(tmp_path: Path):
    chat = [{"role": "user", "content": ""}, {"role": "assistant", "content": "b\u2028c"}]
    path = write_jsonl(
        tmp_path / "train.jsonl",
        [{"messages": chat}, {"prompt": "", "completion": "b"}, {"text": "t"}],
    )
    path.write_text("\n" + path.read_text(encoding="utf-8") + "  \n", encoding="utf-8")
    assert read_examples(path) == [
        Example(path, 2, messages=tuple(chat)),
        Example(path, 3, prompt="", completion="b"),
        Example(path, 4, completion="t"),
    ]


def test_missing_data_are_reported(tmp_path: Path):
    with pytest.raises(DataError, check=says("FILE_UNREADABLE")):
        read_examples(tmp_path / "train.jsonl")


def test_a_config_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.toml"
    assert main(["train", "init", str(file)]) == 0
    before = file.read_text()
    assert main(["train", "init", str(file)]) == 1
    assert capsys.readouterr().err == f"error: {say('PATH_EXISTS', path=file)}\n"
    assert file.read_text() == before


def test_a_missing_config_is_reported(tmp_path: Path) -> None:
    def said(path: Path) -> tuple[str, str, str | None]:
        assert main(["train", "run", str(path)]) == 2
        with pytest.raises(ConfigError) as caught:
            read_config(path)
        (found,) = wrong(caught.value)
        return found

    path = tmp_path / "no.toml"
    assert said(path) == ("", "NO_CONFIG", None)
    run = tmp_path / "hotel"
    run.mkdir()
    assert said(run) == ("", "FILE_UNREADABLE", None)
    (tmp_path / "now.toml").touch()
    assert said(path) == ("", "FILE_UNREADABLE", str(tmp_path / "now.toml"))


def test_no_line_of_a_plan_has_trailing_blanks(tmp_path: Path, tiny_llama: Path) -> None:
    resolved = resolve_tiny(tmp_path, tiny_llama)
    written = io.StringIO()
    plan = Plan(resolved, (("data", "1 example"), ("steps", "one of a row " * 20)))
    plan.print(Console(file=written, width=10_000))
    lines = written.getvalue().splitlines()
    assert " data   1 example" in lines
    assert lines == [line.rstrip() for line in lines]
