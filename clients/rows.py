"""Reads the lines of a file of examples, for training and evaluation, and explains errors."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret.clients.words import Text, say
from turret.closest import closest
from turret.words import printable

# A test set: a JSON Lines file of questions with the right answers.
#
# A row is a conversation that ends with the assistant's answer, or a prompt and its completion::
#
#     {"messages": [{"role": "user", "content": "Capital of Peru?"},
#                   {"role": "assistant", "content": "Lima"}]}
#     {"prompt": "Capital of Peru?", "completion": "Lima"}
#
# or a question with all of its labels, for adapters that predict any number of labels::
#
#     {"messages": [{"role": "user", "content": "Broken!"}], "labels": ["shipping", "anger"]}
#     {"prompt": "Hello", "labels": []}


@dataclass(frozen=True, slots=True)
class EvalExample:
    """One question with its right answer.

    Attributes:
        line: The line in the file, from 1.
        prompt: The turns before the answer as (role, content), or text that is sent as it is.
        reference: The right answer; empty where the row has labels.
        labels: All labels of a row that has labels instead of an answer, each once; else None.
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
        RowError: A row has the wrong form, or the file has no rows.
    """
    examples: list[EvalExample] = []
    for row in read_rows(path, is_training=False):
        if len(examples) == limit:
            break
        examples.append(_example(row, is_raw=is_raw))
        if (examples[-1].labels is None) != (examples[0].labels is None):
            raise row.error("labels", say("MIXED_LABELS"))
    return examples


def _example(row: Row, *, is_raw: bool) -> EvalExample:
    values = row.values
    if "messages" in values:
        return _chat(row)
    if "prompt" not in values or not {"completion", "labels"} & values.keys():
        raise row.shape_error()
    prompt = row.text("prompt", values["prompt"])
    asked = prompt if is_raw else (("user", prompt),)
    if "completion" in values:
        return EvalExample(row.line, asked, row.text("completion", values["completion"]))
    return EvalExample(row.line, asked, "", row.labels())


def _chat(row: Row) -> EvalExample:
    turns = row.values["messages"]
    last = turns[-1] if isinstance(turns, list) and turns else None
    has_answer = isinstance(last, dict) and last.get("role") == "assistant"
    is_labelled = "labels" in row.values and not has_answer
    said = tuple((t["role"], t["content"]) for t in row.turns(is_answered=not is_labelled))
    if is_labelled:
        return EvalExample(row.line, said, "", row.labels())
    if len(said) == 1:
        raise row.error("messages", say("NOTHING_BEFORE_ANSWER"))
    return EvalExample(row.line, said[:-1], said[-1][1])


# The rows of any file of examples, and the errors in them.

ROLES = ("system", "user", "assistant")
_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


class RowError(ValueError):
    """A file of examples that cannot be used; the message names file, line and field.

    Attributes:
        path: The file.
        line: From 1; None if the whole file is at fault.
        field: The part of the line; None if the whole line or file is at fault.
        problem: The fault.
        place: File, line and field, as in the message.
    """

    def __init__(self, path: Path, line: int | None, field: str | None, problem: Text) -> None:
        self.place = ":".join(map(str, (path, line))) if line is not None else str(path)
        if field is not None:
            self.place = f"{self.place}: {printable(field)}"
        super().__init__(f"{self.place}: {problem}")
        self.path = path
        self.line = line
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Row:
    """One line that is a JSON object.

    Attributes:
        path: The file.
        line: The line in the file, from 1.
        values: The object.
        is_training: Whether the row is for training. If so, it may be plain text, unknown keys and
            roles are rejected, and messages before the answer may be empty.
    """

    path: Path
    line: int
    values: dict[str, Any]
    is_training: bool

    def error(self, field: str | None, problem: Text) -> RowError:
        """The error for a field of this line, or for the whole line."""
        return RowError(self.path, self.line, field, problem)

    def shape_error(self) -> RowError:
        """The error for a line without one of the known sets of keys; suggests the closest."""
        texts = ("text",) if self.is_training else ()
        known = ("messages", "prompt", "completion", "labels", *texts)
        keys = _keys(self.is_training)
        unknown = sorted(self.values.keys() - known)
        if not unknown:
            return self.error(None, say("NOT_AN_EXAMPLE", keys=keys))
        near = closest(unknown[0], known)
        return self.error(unknown[0], say("UNEXPECTED_KEY", keys=keys, closest=near))

    def text(self, field: str, value: Any, *, may_be_empty: bool = False) -> str:
        """Return a value that must be text."""
        if not isinstance(value, str):
            raise self.error(field, say("NOT_A_STRING", value=_shown(value)))
        if half := _HALF_SURROGATE.search(value):
            raise self.error(field, say("HALF_CHARACTER", value=f"\\u{ord(half[0]):x}"))
        if not value and not (may_be_empty and self.is_training):
            raise self.error(field, say("EMPTY"))
        return value

    def labels(self) -> tuple[str, ...]:
        """The labels of the row, each once."""
        labels = self.values["labels"]
        if not isinstance(labels, list):
            raise self.error("labels", say("NOT_A_LIST", value=_shown(labels)))
        found: dict[str, None] = {}
        for index, label in enumerate(labels):
            self.text(f"labels[{index}]", label)
            if label in found:
                raise self.error(f"labels[{index}]", say("DUPLICATE", value=label[:40]))
            found[label] = None
        return tuple(found)

    def turns(self, *, is_answered: bool = True) -> tuple[dict[str, str], ...]:
        """The messages, with ``role`` and ``content``.

        Args:
            is_answered: Whether the last message must be the answer; otherwise the line has labels.
        """
        value = self.values["messages"]
        if not isinstance(value, list):
            raise self.error("messages", say("NOT_A_LIST", value=_shown(value)))
        if not value:
            raise self.error("messages", say("EMPTY"))
        turns = tuple(self._turn(f"messages[{i}]", turn) for i, turn in enumerate(value))
        if (turns[-1]["role"] == "assistant") != is_answered:
            problem = say("LAST_IS_NO_ANSWER" if is_answered else "LAST_IS_ANSWER")
            raise self.error(f"messages[{len(turns) - 1}].role", problem)
        return turns

    def _turn(self, field: str, turn: Any) -> dict[str, str]:
        keys = set(turn) if isinstance(turn, dict) else set()
        if keys != {"role", "content"} and (self.is_training or not keys >= {"role", "content"}):
            problem = say("MESSAGE_HAS_MORE" if self.is_training else "NOT_A_MESSAGE")
            raise self.error(field, problem)
        role = turn["role"]
        if self.is_training and role not in ROLES:
            text = say("NOT_ONE_OF", choices=", ".join(ROLES), value=role)
            raise self.error(f"{field}.role", text)
        may_be_empty = role != "assistant"
        content = self.text(f"{field}.content", turn["content"], may_be_empty=may_be_empty)
        return {"role": self.text(f"{field}.role", role), "content": content}


def _shown(value: Any) -> str:
    return f"{json.dumps(value, ensure_ascii=False):.40}"


def _keys(is_training: bool) -> Text:
    return say("TRAINING_EXAMPLE_KEYS" if is_training else "EXAMPLE_KEYS")


def read_rows(path: Path, *, is_training: bool) -> Iterator[Row]:
    """The lines of a file; blank ones are skipped.

    Args:
        path: The file, UTF-8.
        is_training: As in :class:`Row`.

    Raises:
        OSError: The file cannot be read.
        RowError: The file is empty, or a line is not a JSON object.
    """
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    is_empty = True
    # Do not use splitlines(): JSON strings may contain U+2028 and other separators.
    for line, raw in enumerate(data.split(b"\n"), start=1):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise RowError(path, line, f"byte {error.start + 1}", say("NOT_UTF8")) from error
        if text.strip():
            is_empty = False
            yield Row(path, line, _json_object(path, line, text, is_training), is_training)
    if is_empty:
        raise RowError(path, None, None, say("NO_EXAMPLES", keys=_keys(is_training)))


def _json_object(path: Path, line: int, text: str, is_training: bool) -> dict[str, Any]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        if twice := next((key for key, count in counts.items() if count > 1), None):
            raise RowError(path, line, twice, say("DUPLICATE_KEY"))
        return dict(pairs)

    try:
        row = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        problem = say("LINE_NOT_JSON", problem=error.msg)
        raise RowError(path, line, f"column {error.colno}", problem) from error
    except RowError:
        raise
    except (RecursionError, ValueError) as error:
        # The line nests too deeply, or contains a number with thousands of digits.
        raise RowError(path, line, None, say("NOT_JSON", problem=error)) from error
    if not isinstance(row, dict):
        raise RowError(path, line, None, say("NOT_AN_EXAMPLE", keys=_keys(is_training)))
    return row
