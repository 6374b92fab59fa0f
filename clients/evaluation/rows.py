"""Reads the lines of a file of examples, for training and evaluation, and explains errors."""

from __future__ import annotations

import codecs
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret.closest import closest, did_you_mean

# Recognition of missing files and of files in other formats than JSON Lines.

_KINDS = {
    codecs.BOM_UTF16_LE: "is UTF-16 text; save it as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16 text; save it as UTF-8",
    b"\x1f\x8b": "is compressed; `gunzip` it first",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet; write its rows as JSON, one object a line",
    b"PAR1": "is a Parquet file; write its rows as JSON, one object a line",
}
_CONFIGS = (".toml", ".yaml", ".yml")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}

_FEW = 4


def near_files(path: Path) -> str:
    """The end of a message about a missing file: similar files in its directory."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"; there is no directory {folder}"
    try:
        there = sorted(each.name for each in folder.glob(f"*{path.suffix}") if each.is_file())
    except OSError:
        return ""
    stems = {Path(name).stem: name for name in there}
    if near := closest(path.stem, stems):
        return f"; did you mean {stems[near]!r}?"
    more = ", …" if len(there) > _FEW else ""
    return f"; its directory has {', '.join(there[:_FEW])}{more}" if path.suffix and there else ""


def other_kind(path: Path, data: bytes) -> str:
    """What a file is and what to do with it, such as ``is compressed; …``; "" for JSON Lines.

    Args:
        path: As commands name it.
        data: All of it, or as much as its first two lines have.
    """
    if path.suffix in _CONFIGS:
        return "is a config by its name, and no examples; those are a JSON object a line (.jsonl)"
    for start, problem in _KINDS.items():
        if data.startswith(start):
            return problem
    text = data.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"["):
        of_objects = text[1:].lstrip().startswith((b"{", b"]"))
        step = f"`jq -c '.[]' {shlex.quote(str(path))} >NEW.jsonl` writes its objects one a line"
        return f"is a JSON array; {step if of_objects else 'every line must be a JSON object'}"
    first, _, rest = text.partition(b"\n")
    if first.startswith((b"{", b'"{')):
        return ""
    head, row = (line.decode("utf-8", "replace") for line in (first, rest.partition(b"\n")[0]))
    for delimiter, name in _DELIMITERS.items():
        if delimiter in head and delimiter in row:
            return _table(path, delimiter, name)
    return ""


def _table(path: Path, delimiter: str, name: str) -> str:
    given = "" if delimiter == "," else f", delimiter={delimiter!r}"
    reader = f"csv.DictReader(sys.stdin{given})"
    code = f"import csv, json, sys; [print(json.dumps(row)) for row in {reader}]"
    command = f'python3 -c "{code}" <{shlex.quote(str(path))} >NEW.jsonl'
    return f"is a table with {name} (CSV); `{command}` makes lines of it"


# Reads a test set: JSON Lines with questions and the answers that are right.
#
# A row is a conversation that ends with the assistant's answer, or a prompt and its completion::
#
#     {"messages": [{"role": "user", "content": "Capital of Peru?"},
#                   {"role": "assistant", "content": "Lima"}]}
#     {"prompt": "Capital of Peru?", "completion": "Lima"}
#
# or a question alone with all labels that hold, for adapters that give any number of them::
#
#     {"messages": [{"role": "user", "content": "Broken!"}], "labels": ["shipping", "anger"]}
#     {"prompt": "Hello", "labels": []}


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
        RowError: A row has another form, or there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.absolute()} does not exist{near_files(path)}")
    if path.is_dir():
        near = near_files(Path(f"{path}.jsonl"))
        raise IsADirectoryError(
            f"{path} is a directory; a test set is a JSONL file of examples{near}"
        )
    examples: list[EvalExample] = []
    for row in read_rows(path, is_learned=False):
        if len(examples) == limit:
            break
        examples.append(_example(row, is_raw=is_raw))
        if (examples[-1].labels is None) != (examples[0].labels is None):
            problem = "all rows have labels in place of answers, or none has"
            raise RowError(path, row.line, "labels", problem)
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
        raise row.error("messages", "nothing stands before the answer")
    return EvalExample(row.line, said[:-1], said[-1][1])


ROLES = ("system", "user", "assistant")
_HALF = re.compile("[\ud800-\udfff]")
_LABELS = "labels in an answer's place"


class RowError(ValueError):
    """A file of examples that cannot be used; the text names file, line and field."""

    def __init__(self, path: Path, line: int | None, field: str | None, problem: str) -> None:
        place = str(path) if line is None else f"{path}:{line}"
        super().__init__(f"{place}: {problem}" if field is None else f"{place}: {field}: {problem}")


@dataclass(frozen=True, slots=True)
class Row:
    """One line that is a JSON object.

    Attributes:
        path: Of the file.
        line: From 1.
        values: The object.
        is_learned: Whether it is to be trained on: then it may be plain text, its keys and roles
            are known ones alone, and what is given may be empty.
    """

    path: Path
    line: int
    values: dict[str, Any]
    is_learned: bool

    def error(self, field: str, problem: str) -> RowError:
        """What is wrong with a field of this line."""
        return RowError(self.path, self.line, field, problem)

    def shape_error(self) -> RowError:
        """Why this line has none of the known shapes, and what its keys should be called."""
        keys, holds = set(self.values), f"a line holds {shapes(is_learned=self.is_learned)}"
        asked = "messages" if "messages" in keys else "prompt"
        texts = ({"text"},) if self.is_learned else ()
        labelled = ({asked, "labels"},) if "labels" in keys else ()
        known: tuple[set[str], ...] = (*labelled, {"messages"}, {"prompt", "completion"}, *texts)
        for shape in filter(keys.intersection, known):
            others, missing = sorted(keys - shape), sorted(shape - keys)
            if not others or not (self.is_learned or missing):
                return self.error(missing[0], f"is missing; {holds}")
            meant = did_you_mean(others[0], missing)
            return self.error(others[0], f"is unexpected here; {holds}{meant}")
        there = f"; it holds {', '.join(sorted(keys)):.80}" if keys else ""
        near = (did_you_mean(key, set().union(*known)) for key in sorted(keys))
        meant = next(filter(None, near), "")
        return self.error("line", f"must hold {shapes(is_learned=self.is_learned)}{there}{meant}")

    def text(self, field: str, value: Any, *, may_be_empty: bool = False) -> str:
        """A value that is a text."""
        if not isinstance(value, str):
            shown = "null" if value is None else f"{value!r:.40}"
            raise self.error(field, f"must be a string, not {shown}")
        if half := _HALF.search(value):
            problem = f"holds half of a character, \\u{ord(half[0]):x}; write its other half too"
            raise self.error(field, problem)
        if not value and not (may_be_empty and self.is_learned):
            raise self.error(field, "is empty")
        return value

    def labels(self) -> tuple[str, ...]:
        """All labels that hold, each once."""
        labels = self.values["labels"]
        if not isinstance(labels, list):
            raise self.error("labels", f"must be a list of texts, not {labels!r:.40}")
        for index, label in enumerate(labels):
            self.text(f"labels[{index}]", label)
            if label in labels[:index]:
                raise self.error(f"labels[{index}]", f"is {label!r:.40} once more")
        return tuple(labels)

    def turns(self, *, is_answered: bool = True) -> tuple[dict[str, str], ...]:
        """The messages, with ``role`` and ``content``.

        Args:
            is_answered: The last one is the answer; else the line has labels, and none is.
        """
        value = self.values["messages"]
        if not isinstance(value, list):
            raise self.error("messages", f"must be a list of messages, not {value!r:.40}")
        if not value:
            problem = "is empty; the user's message and the answer stand in it, or remove the line"
            if not is_answered:
                problem = "is empty; what the labels are of stands in it, or remove the line"
            raise self.error("messages", problem)
        turns = tuple(self._turn(f"messages[{i}]", turn) for i, turn in enumerate(value))
        if (turns[-1]["role"] == "assistant") != is_answered:
            does = "learned" if self.is_learned else "judged"
            problem = f"the last message must be the assistant's: it is what is {does}"
            if not is_answered:
                problem = (
                    f"the last message must not be the assistant's: the labels are what is {does}"
                )
            raise self.error(f"messages[{len(turns) - 1}].role", problem)
        return turns

    def _turn(self, field: str, turn: Any) -> dict[str, str]:
        keys = set(turn) if isinstance(turn, dict) else set()
        if keys != {"role", "content"} and (self.is_learned or not keys >= {"role", "content"}):
            alone = " alone" if self.is_learned else ""
            raise self.error(field, f"must be an object with role and content{alone}")
        role = turn["role"]
        if self.is_learned and role not in ROLES:
            problem = f"must be one of {', '.join(ROLES)}, not {role!r:.40}"
            raise self.error(f"{field}.role", problem)
        may_be_empty = role != "assistant"
        content = self.text(f"{field}.content", turn["content"], may_be_empty=may_be_empty)
        return {"role": self.text(f"{field}.role", role), "content": content}


def shapes(*, is_learned: bool) -> str:
    """A description of the shapes that a line may have."""
    text = "or text, " if is_learned else ""
    return f"messages, or prompt and completion, {text}or {_LABELS}"


def read_rows(path: Path, *, is_learned: bool) -> Iterator[Row]:
    """The lines of a file; blank ones are skipped.

    Args:
        path: The file, UTF-8.
        is_learned: As in :class:`Row`.

    Raises:
        OSError: It cannot be read.
        RowError: It holds no line, or is of another kind, or a line is no JSON object.
    """
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if problem := other_kind(path, data):
        raise RowError(path, None, None, problem)
    is_empty = True
    # Do not use splitlines(): JSON strings may contain U+2028 and other separators.
    for line, raw in enumerate(data.split(b"\n"), start=1):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            problem = f"no UTF-8: {error.reason}"
            raise RowError(path, line, f"byte {error.start + 1}", problem) from error
        if text.strip():
            is_empty = False
            yield Row(path, line, _json_object(path, line, text, is_learned), is_learned)
    if is_empty:
        problem = f"holds no example; a line is a JSON object with {shapes(is_learned=is_learned)}"
        raise RowError(path, None, None, problem)


def _json_object(path: Path, line: int, text: str, is_learned: bool) -> dict[str, Any]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        if twice := next((key for key, count in counts.items() if count > 1), None):
            raise RowError(path, line, twice, "stands twice in one object")
        return dict(pairs)

    try:
        row = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        step = _how_to_mend(text.strip(), path)
        problem = f"no JSON: {error.msg}; every line must be a JSON object by itself{step}"
        raise RowError(path, line, f"column {error.colno}", problem) from error
    except RowError:
        raise
    except (RecursionError, ValueError) as error:
        # The line nests too deeply, or has a number of thousands of digits.
        raise RowError(path, line, "line", f"no JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        problem = f"must be a JSON object with {shapes(is_learned=is_learned)}"
        raise RowError(path, line, "line", problem)
    return row


def _how_to_mend(text: str, path: Path) -> str:
    """How to turn an invalid line into JSON, for common mistakes."""
    if text.startswith("{'"):
        return ", with keys and texts in double quotes"
    if text.endswith("},"):
        return ", without a comma behind it"
    # Either an object spans several lines, or a line contains several objects.
    if text == "{" or "}{" in text.replace(" ", ""):
        return f"; `jq -c . {shlex.quote(str(path))} >NEW.jsonl` writes them so"
    return ""
