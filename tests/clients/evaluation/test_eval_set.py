"""Valid and invalid rows of test sets and of training data."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.training import write_jsonl
from said import texts_of

from turret.clients.rows import EvalExample, RowError, read_eval_set
from turret.training.examples import read_examples
from turret.training.words import DataError

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "a"}
READERS: dict[str, tuple[Callable[[Path], Any], type[RowError] | type[DataError]]] = {
    "evaluation": (read_eval_set, RowError),
    "training": (read_examples, DataError),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("data", "place", "reason"),
    [
        (b"\n \n", "", "NO_EXAMPLES"),
        (b"prompt,completion\na,b\n", ":1: column 1", "LINE_NOT_JSON"),
        (b'"prompt"\t"completion"\n"a"\t"b"\n', ":1: column 10", "LINE_NOT_JSON"),
        (b'[{"prompt": "a", "completion": "b"}]', ":1", "NOT_AN_EXAMPLE"),
        (b'[\n  {"text": "a"}\n]\n', ":1: column 2", "LINE_NOT_JSON"),
        (b'{\n  "prompt": "a",\n  "completion": "b"\n}\n', ":1: column 2", "LINE_NOT_JSON"),
        (b'{"prompt": "a", "completion": "b"},\n', ":1: column 35", "LINE_NOT_JSON"),
        (b'{"prompt": "a", "labels": []}\n{"text": b}\n', ":2: column 10", "LINE_NOT_JSON"),
        (b'{"prompt": "a", "completion": "b", "prompt": "c"}', ":1: prompt", "DUPLICATE_KEY"),
        # Python's parser raises a different error for each of them.
        (b"[" * 100_000, ":1", "NOT_JSON"),
        (b"{" + b'"text": {' * 100_000, ":1", "NOT_JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", ":1", "NOT_JSON"),
        (gzip.compress(b'{"text": "a"}\n', mtime=0), ":1: byte 2", "NOT_UTF8"),
        ('{"text": "a"}\n'.encode("utf-16"), ":1: byte 1", "NOT_UTF8"),
        (b"\n\xff\n", ":2: byte 1", "NOT_UTF8"),
        (b'\n{"text": "caf\xff"}\n', ":2: byte 14", "NOT_UTF8"),
    ],
)
def test_a_file_of_another_format_is_rejected(
    data: bytes, place: str, reason: str, reader: str, tmp_path: Path
):
    read, error = READERS[reader]
    path = tmp_path / "test.jsonl"
    path.write_bytes(data)
    with pytest.raises(error) as raised:
        read(path)
    assert str(raised.value) == f"{path}{place}: {raised.value.problem}"
    assert raised.value.problem.reason == reason


# Invalid rows, each with its field and the reason of its error.
INVALID: dict[str, list[tuple[Any, str | None, str]]] = {
    "either": [
        ([1], None, "NOT_AN_EXAMPLE"),
        ({}, None, "NOT_AN_EXAMPLE"),
        ({"prompt": "a"}, None, "NOT_AN_EXAMPLE"),
        ({"completion": "a"}, None, "NOT_AN_EXAMPLE"),
        ({"labels": ["b"]}, None, "NOT_AN_EXAMPLE"),
        ({"q": "a", "a": "b"}, "a", "UNEXPECTED_KEY"),
        ({"prompt": 3, "completion": "a"}, "prompt", "NOT_A_STRING"),
        ({"prompt": "a", "completion": ""}, "completion", "EMPTY"),
        ({"prompt": "a", "labels": "b"}, "labels", "NOT_A_LIST"),
        ({"prompt": "a", "labels": ["b", 1]}, "labels[1]", "NOT_A_STRING"),
        ({"prompt": "a", "labels": ["b", "b"]}, "labels[1]", "DUPLICATE"),
        ({"prompt": "a", "labels": [""]}, "labels[0]", "EMPTY"),
        ({"messages": "a"}, "messages", "NOT_A_LIST"),
        ({"messages": []}, "messages", "EMPTY"),
        ({"messages": [USER | {"content": None}]}, "messages[0].content", "NOT_A_STRING"),
        ({"messages": [USER]}, "messages[0].role", "LAST_IS_NO_ANSWER"),
        ({"messages": [USER, ANSWER | {"content": ""}]}, "messages[1].content", "EMPTY"),
    ],
    "evaluation": [
        ({"text": "a"}, "text", "UNEXPECTED_KEY"),
        ({"prompt": "", "completion": "a"}, "prompt", "EMPTY"),
        ({"prompt": "a", "labels": []}, "labels", "MIXED_LABELS"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "NOT_A_MESSAGE"),
        ({"messages": [USER | {"role": 3}]}, "messages[0].role", "NOT_A_STRING"),
        ({"messages": [ANSWER]}, "messages", "NOTHING_BEFORE_ANSWER"),
    ],
    "training": [
        ({"prompt": "a", "completion": "b", "id": 1}, "id", "UNEXPECTED_KEY"),
        ({"prompt": "a", "labels": [], "x": 1}, "x", "UNEXPECTED_KEY"),
        ({"text": None}, "text", "NOT_A_STRING"),
        ({"text": "a\ud83d"}, "text", "HALF_CHARACTER"),
        ({"text": "a", "labels": []}, None, "NOT_AN_EXAMPLE"),
        ({"messages": [USER, "b"]}, "messages[1]", "MESSAGE_HAS_MORE"),
        ({"messages": [USER | {"role": "tool"}]}, "messages[0].role", "NOT_ONE_OF"),
        ({"messages": [ANSWER], "labels": []}, "messages[0].role", "LAST_IS_ANSWER"),
    ],
}


@pytest.mark.parametrize(
    ("reader", "row", "field", "reason"),
    [(name, *row) for name in READERS for row in [*INVALID["either"], *INVALID[name]]],
)
def test_an_invalid_row_is_reported(
    reader: str, row: Any, field: str | None, reason: str, tmp_path: Path
):
    read, error = READERS[reader]
    path = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(error) as raised:
        read(path)
    assert raised.value.problem.reason == reason
    assert str(raised.value).startswith(f"{path}:2: {field}: " if field else f"{path}:2: ")
    if isinstance(raised.value, RowError):
        assert (raised.value.line, raised.value.field) == (2, field)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    for path, kind in (
        (tmp_path / "test.jsonl", FileNotFoundError),
        (tmp_path, IsADirectoryError),
    ):
        with pytest.raises(kind) as raised:
            read_eval_set(path)
        assert raised.value.filename == str(path)


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
