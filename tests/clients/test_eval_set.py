"""What a test set may hold, and how what it may not is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turret.clients.evaluation.eval_set import EvalExample, EvalSetError, read_eval_set


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"prompt,completion\na,b\n", "is a table with commas (CSV); `python3 -c "),
        (b"prompt;completion\na;b\n", "csv.DictReader(sys.stdin, delimiter=';')"),
        (b'[{"prompt": "a", "completion": "b"}]', "is a JSON array; `jq -c '.[]'`"),
        (b"\x1f\x8b\x08", "is compressed; `gunzip` it first"),
    ],
)
def test_a_file_of_another_kind_is_told_as_such(tmp_path: Path, data: bytes, message: str):
    path = tmp_path / "set.jsonl"
    path.write_bytes(data)
    with pytest.raises(EvalSetError) as raised:
        read_eval_set(path)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", ":2: not JSON"),
        ("[" * 100_000, ":2: not JSON"),
        ("[1]", ":2: not a JSON object"),
        ('{"text": "a"}', ':2: a row has "messages", or "prompt" and "completion"'),
        ('{"prompt": "a"}', ":2: completion: missing"),
        ('{"prompt": "a", "labels": []}', ":2: labels: all rows have labels in place of answers"),
        ('{"prompt": "a", "labels": "b"}', ":2: labels: must be a list of texts"),
        ('{"prompt": "a", "labels": ["b", "b"]}', ":2: labels[1]: is 'b' once more"),
        ('{"prompt": "a", "labels": [""]}', ":2: labels[0]: must be a text"),
        ('{"completion": "a"}', ":2: prompt: missing"),
        ('{"prompt": 3, "completion": "a"}', ":2: prompt: must be a text"),
        ('{"prompt": "a", "completion": ""}', ":2: completion: must be a text"),
        ('{"messages": []}', ":2: messages: must be a list of turns"),
        ('{"messages": [{"role": "user"}]}', ":2: messages[0]: must have a role"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            ":2: messages[0].content: must be a text",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            ":2: messages[0].role: the last turn is the answer",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            ":2: messages: nothing stands before the answer",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, message: str):
    path = tmp_path / "test.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + row + "\n")
    with pytest.raises(EvalSetError) as raised:
        read_eval_set(path)
    assert str(raised.value).startswith(f"{path}{message}")


def test_other_bytes_and_no_rows_are_named(tmp_path: Path):
    path = tmp_path / "test.jsonl"
    path.write_bytes(b"\n\xff\n")
    with pytest.raises(EvalSetError, match="jsonl:2: not UTF-8"):
        read_eval_set(path)
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}, indent=2))
    with pytest.raises(EvalSetError, match=r":1: .*; every line must be a JSON object by itself$"):
        read_eval_set(path)
    path.write_bytes(b"\n \n")
    with pytest.raises(EvalSetError, match="no rows"):
        read_eval_set(path)


def test_rows_keep_their_line_and_a_byte_order_mark_is_none(tmp_path: Path):
    path = tmp_path / "test.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n\n{"prompt": "a", "completion": "b"}\r\n')
    assert read_eval_set(path, is_raw=True) == [EvalExample(3, "a", "b")]
