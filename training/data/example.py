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

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from turret.clients.evaluation.rows import Row, RowError, read_rows
from turret.training.errors import DataError


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
        return [_example(row) for row in read_rows(path, is_learned=True)]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except RowError as error:
        raise DataError(str(error)) from error


def data_digest(*paths: Path) -> str:
    """SHA-256, hex, over the bytes of the files, each preceded by its length."""
    digest = hashlib.sha256()
    for path in paths:
        data = path.read_bytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _example(row: Row) -> Example:
    keys, values = set(row.values), row.values
    if keys == {"messages"}:
        return Example(row.path, row.line, messages=row.turns())
    if keys == {"messages", "labels"}:
        labels = row.labels()
        return Example(row.path, row.line, messages=row.turns(is_answered=False), labels=labels)
    if keys == {"text"}:
        return Example(row.path, row.line, completion=row.text("text", values["text"]))
    if keys not in ({"prompt", "labels"}, {"prompt", "completion"}):
        raise row.shape_error()
    if "labels" in keys:
        labels = row.labels()
        prompt = row.text("prompt", values["prompt"], may_be_empty=True)
        return Example(row.path, row.line, prompt=prompt, labels=labels)
    prompt = row.text("prompt", values["prompt"], may_be_empty=True)
    completion = row.text("completion", values["completion"])
    return Example(row.path, row.line, prompt=prompt, completion=completion)
