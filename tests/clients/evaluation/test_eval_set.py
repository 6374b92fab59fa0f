"""What a test set may hold, and how what it may not is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turret.clients.evaluation.rows import EvalExample, RowError, read_eval_set
from turret.training.data.examples import read_examples
from turret.training.errors import DataError


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"prompt,completion\na,b\n", "is a table with commas (CSV); `python3 -c "),
        (b"prompt;completion\na;b\n", "csv.DictReader(sys.stdin, delimiter=';')"),
        (b'[{"prompt": "a", "completion": "b"}]', "is a JSON array; `jq -c '.[]' "),
        (b"\x1f\x8b\x08", "is compressed; `gunzip` it first"),
    ],
)
def test_a_file_of_another_kind_is_told_as_such(tmp_path: Path, data: bytes, message: str):
    path = tmp_path / "set.jsonl"
    path.write_bytes(data)
    with pytest.raises(RowError) as raised:
        read_eval_set(path)
    assert message in str(raised.value)


def test_a_config_is_no_test_set(tmp_path: Path):
    path = tmp_path / "hotel.toml"
    path.write_text("# a, b\n# c, d\n[data]\n")
    with pytest.raises(RowError, match=r"toml: is a config by its name, and no examples;"):
        read_eval_set(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", ":2: column 2: no JSON: "),
        ("[" * 100_000, ":2: line: no JSON that can be read: "),
        ("[1]", ":2: line: must be a JSON object with messages, or prompt and completion, or"),
        ('{"text": "a"}', ":2: line: must hold messages, or prompt and completion, or labels"),
        ('{"prompt": "a"}', ":2: completion: is missing; a line holds messages, or prompt and"),
        ('{"prompt": "a", "labels": []}', ":2: labels: all rows have labels in place of answers"),
        ('{"prompt": "a", "labels": "b"}', ":2: labels: must be a list of texts"),
        ('{"prompt": "a", "labels": ["b", "b"]}', ":2: labels[1]: is 'b' once more"),
        ('{"prompt": "a", "labels": [""]}', ":2: labels[0]: is empty"),
        ('{"completion": "a"}', ":2: prompt: is missing; "),
        ('{"prompt": "a", "prompt": "b"}', ":2: prompt: stands twice in one object"),
        ('{"prompt": 3, "completion": "a"}', ":2: prompt: must be a string, not 3"),
        ('{"prompt": "", "completion": "a"}', ":2: prompt: is empty"),
        ('{"prompt": "a", "completion": ""}', ":2: completion: is empty"),
        ('{"messages": "a"}', ":2: messages: must be a list of messages, not 'a'"),
        ('{"messages": []}', ":2: messages: is empty; the user's message and the answer stand"),
        ('{"messages": [{"role": "user"}]}', ":2: messages[0]: must be an object with role and"),
        ('{"messages": [{"role": 3, "content": "a"}]}', ":2: messages[0].role: must be a string"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            ":2: messages[0].content: must be a string, not null",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            ":2: messages[0].role: the last message must be the assistant's: it is what is judged",
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
    with pytest.raises(RowError) as raised:
        read_eval_set(path)
    assert str(raised.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ('{\n  "prompt": "a",\n  "completion": "b"\n}\n', None),
        ('{"prompt": "a", "completion": "b"} {"prompt": "c", "completion": "d"}\n', None),
        ('{"prompt": "a", "completion": "b"},\n', ", without a comma behind it"),
        ("{'prompt': 'a', 'completion': 'b'}\n", ", with keys and texts in double quotes"),
        ("hello\n", ""),
    ],
)
def test_lines_that_are_no_objects_are_told_how_to_be(text: str, step: str | None, tmp_path: Path):
    path = tmp_path / "test.jsonl"
    path.write_text(text)
    with pytest.raises(RowError) as raised:
        read_eval_set(path)
    if step is None:
        step = f"; `jq -c . {path} >NEW.jsonl` writes them so"
    assert str(raised.value).endswith(f"; every line must be a JSON object by itself{step}")


def test_a_file_that_is_not_there_is_told_with_what_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)

    def said(name: str) -> str:
        with pytest.raises(FileNotFoundError) as raised:
            read_eval_set(Path(name))
        return str(raised.value)

    assert said("test.jsonl") == f"{tmp_path}/test.jsonl does not exist"
    assert said("no/t.jsonl").endswith(f"; there is no directory {tmp_path}/no")
    for name in ("a.jsonl", "b.jsonl", "tests.jsonl", "c.txt"):
        (tmp_path / name).touch()
    assert said("test.jsonl") == (
        f"{tmp_path}/test.jsonl does not exist; did you mean 'tests.jsonl'?"
    )
    assert said("zzz.jsonl").endswith("; its directory has a.jsonl, b.jsonl, tests.jsonl")
    assert said("zzz.csv").endswith("zzz.csv does not exist")


def test_other_bytes_and_no_rows_are_named(tmp_path: Path):
    path = tmp_path / "test.jsonl"
    path.write_bytes(b"\n\xff\n")
    with pytest.raises(RowError, match="jsonl:2: byte 1: no UTF-8: "):
        read_eval_set(path)
    path.write_bytes(b"\n \n")
    with pytest.raises(RowError, match="jsonl: holds no example; a line is a JSON object"):
        read_eval_set(path)


def test_rows_keep_their_line_and_a_byte_order_mark_is_none(tmp_path: Path):
    path = tmp_path / "test.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n\n{"prompt": "a", "completion": "b"}\r\n')
    assert read_eval_set(path, is_raw=True) == [EvalExample(3, "a", "b")]


def test_other_keys_of_a_row_and_roles_of_a_template_are_passed_over(tmp_path: Path):
    turns = [{"role": "tool", "content": "a", "name": "t"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "a", "completion": "b", "id": 3}, {"messages": turns, "source": "c"}]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pair, chat = read_eval_set(path)
    assert (pair.prompt, pair.reference) == ((("user", "a"),), "b")
    assert (chat.prompt, chat.reference) == ((("tool", "a"),), "b")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"promt": "a", "completion": "b"}, "promt: is unexpected here; a line holds messages, or"),
        ({"zzz": "a"}, "line: must hold messages, or prompt and completion, or "),
    ],
)
def test_training_and_evaluation_say_the_same_of_a_key_that_is_none(
    row: dict[str, str], said: str, tmp_path: Path
):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n")
    heard = []
    for read, error in ((read_eval_set, RowError), (read_examples, DataError)):
        with pytest.raises(error) as raised:
            read(path)
        assert str(raised.value).startswith(f"{path}:1: {said}")
        heard.append(str(raised.value))
    # Plain text is learned, and has no answer to judge.
    assert heard[0] == heard[1].replace("or text, ", "")
    assert heard[0].endswith("; did you mean 'prompt'?") == ("promt" in row)
