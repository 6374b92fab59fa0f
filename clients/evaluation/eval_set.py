"""Reads a test set: JSON Lines with questions and the answers that are right.

A row is a conversation that ends with the assistant's answer, or a prompt and its completion::

    {"messages": [{"role": "user", "content": "Capital of Peru?"},
                  {"role": "assistant", "content": "Lima"}]}
    {"prompt": "Capital of Peru?", "completion": "Lima"}

or a question alone with all labels that hold, for adapters that give any number of them::

    {"messages": [{"role": "user", "content": "My parcel broke!"}], "labels": ["shipping", "anger"]}
    {"prompt": "Hello", "labels": []}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret.clients.evaluation.file_kinds import other_kind

_FORMS = 'a row has "messages", or "prompt" and "completion" or "labels"'


class EvalSetError(ValueError):
    """A test set that cannot be used; the text names file, line and field."""

    def __init__(self, path: Path, line: int | None, field: str | None, problem: str) -> None:
        place = str(path) if line is None else f"{path}:{line}"
        super().__init__(f"{place}: {problem}" if field is None else f"{place}: {field}: {problem}")


@dataclass(frozen=True, slots=True)
class EvalExample:
    """One question with its right answer.

    Attributes:
        line: Where in the file it stands, from 1.
        prompt: The turns before the answer as (role, content), or text that is sent as it is.
        reference: The right answer; empty where the row has labels.
        labels: All that hold, each once, of a row that has labels and no answer; else None.
    """

    line: int
    prompt: tuple[tuple[str, str], ...] | str
    reference: str
    labels: tuple[str, ...] | None = None


def read_eval_set(
    path: Path, *, is_raw: bool = False, limit: int | None = None
) -> list[EvalExample]:
    """Read the rows of a file; empty lines are skipped, other keys of a row are ignored.

    Args:
        path: The file, UTF-8.
        is_raw: Send a ``prompt`` as it is, instead of as a user's message.
        limit: Read at most this many rows.

    Raises:
        OSError: The file cannot be read.
        EvalSetError: A row has another form, or there is none.
    """
    examples: list[EvalExample] = []
    for line, row in _rows(path):
        if len(examples) == limit:
            break
        examples.append(_example(path, line, row, is_raw=is_raw))
        if (examples[-1].labels is None) != (examples[0].labels is None):
            problem = "all rows have labels in place of answers, or none has"
            raise EvalSetError(path, line, "labels", problem)
    if not examples:
        raise EvalSetError(path, None, None, "no rows")
    return examples


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    data = path.read_bytes()
    if problem := other_kind(data):
        raise EvalSetError(path, None, None, problem)
    for line, raw in enumerate(data.split(b"\n"), start=1):
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise EvalSetError(path, line, None, f"not UTF-8: {error.reason}") from None
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            problem = f"not JSON: {why}; every line must be a JSON object by itself"
            raise EvalSetError(path, line, None, problem) from None
        if not isinstance(row, dict):
            raise EvalSetError(path, line, None, f"not a JSON object; {_FORMS}")
        yield line, row


def _example(path: Path, line: int, row: dict[str, Any], *, is_raw: bool) -> EvalExample:
    if "messages" in row:
        turns = _turns(path, line, row["messages"])
        if "labels" in row and turns[-1][0] != "assistant":
            return EvalExample(line, tuple(turns), "", _labels(path, line, row["labels"]))
        *asked, (role, answer) = turns
        if role != "assistant":
            field = f"messages[{len(asked)}].role"
            raise EvalSetError(path, line, field, f"the last turn is the answer, not {role!r}")
        if not asked:
            raise EvalSetError(path, line, "messages", "nothing stands before the answer")
        return EvalExample(line, tuple(asked), answer)
    if "labels" in row and "completion" not in row and "prompt" in row:
        prompt = _text(path, line, "prompt", row["prompt"])
        asked = prompt if is_raw else (("user", prompt),)
        return EvalExample(line, asked, "", _labels(path, line, row["labels"]))
    missing = sorted({"prompt", "completion"} - row.keys())
    if len(missing) == 2:
        raise EvalSetError(path, line, None, _FORMS)
    if missing:
        raise EvalSetError(path, line, missing[0], "missing")
    prompt = _text(path, line, "prompt", row["prompt"])
    reference = _text(path, line, "completion", row["completion"])
    return EvalExample(line, prompt if is_raw else (("user", prompt),), reference)


def _labels(path: Path, line: int, value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise EvalSetError(path, line, "labels", f"must be a list of texts, not {value!r:.40}")
    labels: list[str] = []
    for index, label in enumerate(value):
        text = _text(path, line, f"labels[{index}]", label)
        if text in labels:
            raise EvalSetError(path, line, f"labels[{index}]", f"is {text!r:.40} once more")
        labels.append(text)
    return tuple(labels)


def _turns(path: Path, line: int, value: object) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise EvalSetError(path, line, "messages", "must be a list of turns")
    turns: list[tuple[str, str]] = []
    for index, turn in enumerate(value):
        field = f"messages[{index}]"
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise EvalSetError(path, line, field, "must have a role and a content")
        role, content = (
            _text(path, line, f"{field}.{key}", turn[key]) for key in ("role", "content")
        )
        turns.append((role, content))
    return turns


def _text(path: Path, line: int, field: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise EvalSetError(path, line, field, f"must be a text that is not empty, not {value!r}")
    return value
