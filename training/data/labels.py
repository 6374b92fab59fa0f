"""Examples of a classification: what stands before the answer, and which label the answer is.

The label's number stands at the end, as the only token to learn: what the model makes of the last
token before it is what a classification head sees. Where any number of labels may hold, it is the
row's number in its batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from turret.server.adapters.head import MAX_LABEL_CHARS, MAX_LABELS
from turret.server.basics.counted import counted
from turret.training.data.encode import Encoded, EncodedSet, encode_prompt, none_left
from turret.training.data.example import Example
from turret.training.errors import DataError
from turret.training.settings.config import DataConfig

_LONG = f"a label has at most {MAX_LABEL_CHARS} characters"


def right_labels(example: Example) -> tuple[str, ...]:
    """Those that hold: its labels, or its completion, or its last message."""
    if example.labels is not None:
        return example.labels
    return (example.completion if example.messages is None else example.messages[-1]["content"],)


def labels_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """The labels of a training set, sorted.

    Raises:
        DataError: A line has no prompt, or a label that cannot be served; or all have the same, or
            there are too many; or only some lines have ``labels``.
    """
    is_multi_label = examples[0].labels is not None
    check_labelled(examples, is_multi_label=is_multi_label)
    labels = tuple(sorted({label for example in examples for label in right_labels(example)}))
    least = 1 if is_multi_label else 2
    if not least <= len(labels) <= MAX_LABELS:
        path = examples[0].path
        raise DataError(
            f"{path}: holds {counted(len(labels), 'label')}, {least} to {MAX_LABELS} are learned"
        )
    return labels


def check_labelled(examples: Iterable[Example], *, is_multi_label: bool) -> None:
    """Refuse lines without a label to learn, or with other ones than the first line's kind.

    Raises:
        DataError: As :func:`labels_of`.
    """
    for example in examples:
        field = "text" if example.messages is None else "messages"
        if example.messages is None and example.prompt is None:
            raise example.error(field, "has no label; a line holds a prompt and its label")
        if (example.labels is not None) != is_multi_label:
            problem = "stand on the first line: all lines have labels, or none has"
            if not is_multi_label:
                problem = "are missing on the first line: all lines have labels, or none has"
            raise example.error("labels", problem)
        field = "labels" if is_multi_label else "completion"
        if any(len(label) > MAX_LABEL_CHARS for label in right_labels(example)):
            raise example.error(field, _LONG)


def encode_labelled(
    tokenizer: Any,
    examples: Iterable[Example],
    labels: Sequence[str],
    config: DataConfig,
    max_length: int,
) -> EncodedSet:
    """Encode a file's examples; arguments and errors as ``encode_all``'s.

    What is over ``max_length`` and to be cut loses its end, not its label.

    Raises:
        DataError: Also where a label is none of ``labels``.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    encoded: list[Encoded] = []
    dropped = truncated = 0
    shortest = sys.maxsize
    path = None
    for example in examples:
        path = example.path
        right = _numbers(example, numbers)
        item = encode_prompt(tokenizer, example, config)
        if len(item.tokens) > max_length:
            if config.too_long == "error":
                problem = f"{len(item.tokens)} tokens, data.max_length is {max_length}"
                raise example.error("line", problem)
            if config.too_long == "drop":
                dropped += 1
                shortest = min(shortest, len(item.tokens))
                continue
            item = replace(item, tokens=item.tokens[:max_length])
            truncated += 1
        if not item.tokens:
            raise example.error("prompt", "has no token")
        learned = (*[False] * len(item.tokens), True)
        if example.labels is not None:
            item = replace(item, labels=right)
        tokens = (*item.tokens, 0 if example.labels is not None else right[0])
        encoded.append(replace(item, tokens=tokens, learned=learned))
    if not encoded:
        raise none_left(path, max_length, shortest)
    return EncodedSet(tuple(encoded), dropped, truncated)


def _numbers(example: Example, numbers: dict[str, int]) -> tuple[int, ...]:
    field = "completion" if example.labels is None else "labels"
    for label in right_labels(example):
        if label not in numbers:
            raise example.error(field, f"the label {label!r:.60} is none of train's")
    return tuple(sorted(numbers[label] for label in right_labels(example)))
