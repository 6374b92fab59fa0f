"""Valid and invalid test sets, and the errors for the latter."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from said import says, texts_of

from turret.clients.rows import EvalExample, RowError, read_eval_set
from turret.training.errors import DataError
from turret.training.examples import read_examples


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ("{", "column 2", "LINE_NOT_JSON"),
        ("[" * 100_000, None, "NOT_JSON"),
        ("[1]", None, "NOT_AN_EXAMPLE"),
        ('{"text": "a"}', "text", "UNEXPECTED_KEY"),
        ('{"prompt": "a"}', None, "NOT_AN_EXAMPLE"),
        ('{"prompt": "a", "labels": []}', "labels", "MIXED_LABELS"),
        ('{"prompt": "a", "labels": "b"}', "labels", "NOT_A_LIST"),
        ('{"prompt": "a", "labels": ["b", "b"]}', "labels[1]", "DUPLICATE"),
        ('{"prompt": "a", "labels": [""]}', "labels[0]", "EMPTY"),
        ('{"completion": "a"}', None, "NOT_AN_EXAMPLE"),
        ('{"prompt": "a", "prompt": "b"}', "prompt", "DUPLICATE_KEY"),
        ('{"prompt": 3, "completion": "a"}', "prompt", "NOT_A_STRING"),
        ('{"prompt": "", "completion": "a"}', "prompt", "EMPTY"),
        ('{"prompt": "a", "completion": ""}', "completion", "EMPTY"),
        ('{"messages": "a"}', "messages", "NOT_A_LIST"),
        ('{"messages": []}', "messages", "EMPTY"),
        ('{"messages": [{"role": "user"}]}', "messages[0]", "NOT_A_MESSAGE"),
        ('{"messages": [{"role": 3, "content": "a"}]}', "messages[0].role", "NOT_A_STRING"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            "messages[0].content",
            "NOT_A_STRING",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "messages[0].role",
            "LAST_IS_NO_ANSWER",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "messages",
            "NOTHING_BEFORE_ANSWER",
        ),
    ],
)
def test_an_invalid_row_is_reported(tmp_path: Path, row: str, field: str | None, reason: str):
    path = tmp_path / "test.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + row + "\n")
    with pytest.raises(RowError) as raised:
        read_eval_set(path)
    error = raised.value
    assert (error.line, error.field, error.problem.reason) == (2, field, reason)
    assert str(error).startswith(f"{path}:2: {field}: " if field else f"{path}:2: ")


@pytest.mark.parametrize(
    ("data", "field", "reason"),
    [
        (b"prompt,completion\na,b\n", "column 1", "LINE_NOT_JSON"),
        (b'[{"prompt": "a", "completion": "b"}]', None, "NOT_AN_EXAMPLE"),
        (b'{\n  "prompt": "a",\n  "completion": "b"\n}\n', "column 2", "LINE_NOT_JSON"),
        (b'{"prompt": "a", "completion": "b"},\n', "column 35", "LINE_NOT_JSON"),
        (b"\x1f\x8b\x08", "byte 2", "NOT_UTF8"),
    ],
)
def test_a_file_of_another_format_is_rejected_at_its_first_line(
    data: bytes, field: str | None, reason: str, tmp_path: Path
):
    path = tmp_path / "test.jsonl"
    path.write_bytes(data)
    with pytest.raises(RowError) as raised:
        read_eval_set(path)
    error = raised.value
    assert (error.line, error.field, error.problem.reason) == (1, field, reason)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    for path, kind in (
        (tmp_path / "test.jsonl", FileNotFoundError),
        (tmp_path, IsADirectoryError),
    ):
        with pytest.raises(kind) as raised:
            read_eval_set(path)
        assert raised.value.filename == str(path)


def test_invalid_utf8_and_empty_files_are_reported(tmp_path: Path):
    path = tmp_path / "test.jsonl"
    path.write_bytes(b"\n\xff\n")
    with pytest.raises(RowError) as raised:
        read_eval_set(path)
    error = raised.value
    assert (error.line, error.field, error.problem.reason) == (2, "byte 1", "NOT_UTF8")
    path.write_bytes(b"\n \n")
    with pytest.raises(RowError, check=says("NO_EXAMPLES")):
        read_eval_set(path)


def test_rows_keep_their_line_number_and_a_byte_order_mark_is_ignored(tmp_path: Path):
    path = tmp_path / "test.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n\n{"prompt": "a", "completion": "b"}\r\n')
    assert read_eval_set(path, is_raw=True) == [EvalExample(3, "a", "b")]


def test_unknown_keys_and_template_roles_are_accepted(tmp_path: Path):
    turns = [{"role": "tool", "content": "a", "name": "t"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "a", "completion": "b", "id": 3}, {"messages": turns, "source": "c"}]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pair, chat = read_eval_set(path)
    assert (pair.prompt, pair.reference) == ((("user", "a"),), "b")
    assert (chat.prompt, chat.reference) == ((("tool", "a"),), "b")


@pytest.mark.parametrize(
    ("row", "field", "reason", "near"),
    [
        ({"promt": "a", "completion": "b"}, "promt", "UNEXPECTED_KEY", "prompt"),
        ({"zzz": "a"}, "zzz", "UNEXPECTED_KEY", None),
    ],
)
def test_training_and_evaluation_report_an_unknown_key_alike(
    row: dict[str, str], field: str, reason: str, near: str | None, tmp_path: Path
):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n")
    kinds = ((read_eval_set, RowError, "EXAMPLE_KEYS"),)
    for read, error, keys in (*kinds, (read_examples, DataError, "TRAINING_EXAMPLE_KEYS")):
        with pytest.raises(error) as raised:
            read(path)
        assert str(raised.value).startswith(f"{path}:1: {field}: ")
        text, of_keys = texts_of(raised.value)
        assert (text.reason, text.params.get("closest"), of_keys.reason) == (reason, near, keys)


def test_a_key_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"\x1b[2J\nerror": "a"}))
    with pytest.raises(DataError) as raised:
        read_examples(path)
    assert str(raised.value).startswith(f"{path}:1: \\x1b[2J\\nerror: ")


def test_a_row_of_many_labels_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    labels = [str(number) for number in range(200_000)]
    path.write_text(json.dumps({"prompt": "a", "labels": labels}))
    before = time.process_time()
    assert read_eval_set(path)[0].labels == tuple(labels)
    # Comparing each label with all others would take minutes.
    assert time.process_time() - before < 10
