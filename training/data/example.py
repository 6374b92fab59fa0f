"""Reads examples: JSONL, one object a line, in one of three shapes.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}
    {"text": "…"}

Where any number of labels hold, they stand in the answer's place:

    {"messages": [{"role": "user", "content": "…"}], "labels": ["…", "…"]}
    {"prompt": "…", "labels": []}

A line of another shape, or with other keys beside these, is an error that names file, line and
field. Blank lines are skipped.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret.clients.evaluation.file_kinds import other_kind
from turret.training.errors import DataError

_ROLES = ("system", "user", "assistant")
_HALF = re.compile("[\ud800-\udfff]")
_SHAPES = "messages, or prompt and completion, or text, or labels in an answer's place"


@dataclass(frozen=True, slots=True)
class Example:
    """One line.

    Attributes:
        path: Of the file.
        line: From 1.
        messages: Chat messages, with ``role`` and ``content``; else None.
        prompt: What is given; None for chat and plain text.
        completion: What is to be learned after the prompt, or the whole plain text.
        labels: All that hold, each once, where the line has labels and no answer; else None.
    """

    path: Path
    line: int
    messages: tuple[Mapping[str, str], ...] | None = None
    prompt: str | None = None
    completion: str = ""
    labels: tuple[str, ...] | None = None

    def error(self, field: str, problem: str) -> DataError:
        """What is wrong with a field of this example."""
        return DataError.of(self.path, self.line, field, problem)


def read_examples(path: Path) -> list[Example]:
    """Read a file.

    Raises:
        DataError: The file cannot be read, or is empty, or a line is malformed (the first is
            named).
    """
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    if problem := other_kind(data):
        raise DataError(f"{path}: {problem}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = error.start - data.rfind(b"\n", 0, error.start)
        raise DataError.of(path, line, f"byte {byte}", f"no UTF-8: {error.reason}") from error
    examples = [
        _parse(path, number, line)
        # Not splitlines(): JSON strings may hold U+2028 and other separators as they are.
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not examples:
        raise DataError(f"{path}: holds no example; a line is a JSON object with {_SHAPES}")
    return examples


def data_digest(*paths: Path) -> str:
    """SHA-256, hex, over the bytes of the files, each preceded by its length."""
    digest = hashlib.sha256()
    for path in paths:
        data = path.read_bytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _parse(path: Path, line: int, text: str) -> Example:
    row = _json_object(path, line, text)
    keys = set(row)
    if keys == {"messages"}:
        return Example(path, line, messages=_messages(path, line, row["messages"]))
    if "labels" in keys and keys - {"labels"} in ({"messages"}, {"prompt"}):
        return _labelled(path, line, row)
    if keys == {"prompt", "completion"}:
        prompt = _text(path, line, "prompt", row["prompt"], may_be_empty=True)
        return Example(
            path, line, prompt=prompt, completion=_text(path, line, "completion", row["completion"])
        )
    if keys == {"text"}:
        return Example(path, line, completion=_text(path, line, "text", row["text"]))
    raise _shape_error(path, line, keys)


def _json_object(path: Path, line: int, text: str) -> dict[str, Any]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        if twice := next((key for key, count in counts.items() if count > 1), None):
            raise DataError.of(path, line, twice, "stands twice in one object")
        return dict(pairs)

    try:
        row = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        problem = f"no JSON: {error.msg}; every line must be a JSON object by itself"
        raise DataError.of(path, line, f"column {error.colno}", problem) from error
    except (RecursionError, ValueError) as error:
        # Brackets without end, or a number of thousands of digits.
        problem = f"no JSON that can be read: {error}"
        raise DataError.of(path, line, "line", problem) from error
    if not isinstance(row, dict):
        raise DataError.of(path, line, "line", f"must be a JSON object with {_SHAPES}")
    return row


def _shape_error(path: Path, line: int, keys: set[str]) -> DataError:
    asked = "messages" if "messages" in keys else "prompt"
    labelled = ({asked, "labels"},) if "labels" in keys else ()
    for shape in (*labelled, {"messages"}, {"prompt", "completion"}, {"text"}):
        if keys & shape:
            field = sorted(keys - shape) or sorted(shape - keys)
            problem = "is unexpected here" if keys - shape else "is missing"
            return DataError.of(path, line, field[0], f"{problem}; a line holds {_SHAPES}")
    there = f"; it holds {', '.join(sorted(keys)):.80}" if keys else ""
    return DataError.of(path, line, "line", f"must hold {_SHAPES}{there}")


def _text(path: Path, line: int, field: str, value: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        shown = "null" if value is None else f"{value!r:.40}"
        raise DataError.of(path, line, field, f"must be a string, not {shown}")
    if half := _HALF.search(value):
        problem = f"holds half of a character, \\u{ord(half[0]):x}; write its other half too"
        raise DataError.of(path, line, field, problem)
    if not value and not may_be_empty:
        raise DataError.of(path, line, field, "is empty")
    return value


def _labelled(path: Path, line: int, row: Mapping[str, Any]) -> Example:
    labels = row["labels"]
    if not isinstance(labels, list):
        raise DataError.of(path, line, "labels", f"must be a list of texts, not {labels!r:.40}")
    for index, label in enumerate(labels):
        _text(path, line, f"labels[{index}]", label)
        if label in labels[:index]:
            raise DataError.of(path, line, f"labels[{index}]", f"is {label!r:.40} once more")
    if "prompt" in row:
        prompt = _text(path, line, "prompt", row["prompt"], may_be_empty=True)
        return Example(path, line, prompt=prompt, labels=tuple(labels))
    messages = _messages(path, line, row["messages"], is_answered=False)
    return Example(path, line, messages=messages, labels=tuple(labels))


def _messages(
    path: Path, line: int, value: Any, *, is_answered: bool = True
) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list):
        raise DataError.of(path, line, "messages", f"must be a list of messages, not {value!r:.40}")
    if not value:
        problem = "is empty; the user's message and the answer stand in it, or remove the line"
        if not is_answered:
            problem = "is empty; what the labels are of stands in it, or remove the line"
        raise DataError.of(path, line, "messages", problem)
    messages = []
    for index, message in enumerate(value):
        field = f"messages[{index}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise DataError.of(path, line, field, "must be an object with role and content alone")
        role = message["role"]
        if role not in _ROLES:
            problem = f"must be one of {', '.join(_ROLES)}, not {role!r:.40}"
            raise DataError.of(path, line, f"{field}.role", problem)
        is_answer = role == "assistant"
        content = _text(
            path, line, f"{field}.content", message["content"], may_be_empty=not is_answer
        )
        messages.append({"role": role, "content": content})
    if (messages[-1]["role"] == "assistant") != is_answered:
        problem = "the last message must be the assistant's: it is what is learned"
        if not is_answered:
            problem = "the last message must not be the assistant's: the labels are what is learned"
        raise DataError.of(path, line, f"messages[{len(messages) - 1}].role", problem)
    return tuple(messages)
