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

from dataclasses import dataclass
from pathlib import Path

from turret.clients.evaluation.file_kinds import near_files
from turret.clients.evaluation.rows import Row, RowError, read_rows


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
