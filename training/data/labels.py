"""Examples of a classification: what stands before the answer, and which label the answer is.

The label's number stands at the end, as the only token to learn: what the model makes of the last
token before it is what a classification head sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from turret.server.adapters.peft_format.classifier_checkpoint import MAX_LABEL_CHARS, MAX_LABELS
from turret.training.data.encode import Encoded, EncodedSet, encode_prompt
from turret.training.data.example import Example
from turret.training.errors import DataError
from turret.training.settings.config import DataConfig


def label_of(example: Example) -> str:
    """The right label: the completion, or the last message."""
    return example.completion if example.messages is None else example.messages[-1]["content"]


def labels_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """The labels of a training set, sorted.

    Raises:
        DataError: A line has no prompt, or a label that cannot be served; or all have the same, or
            there are too many.
    """
    for example in examples:
        field = "text" if example.messages is None else "messages"
        if example.messages is None and example.prompt is None:
            raise example.error(field, "has no label; a line holds a prompt and its label")
        if len(label_of(example)) > MAX_LABEL_CHARS:
            raise example.error("completion", f"a label has at most {MAX_LABEL_CHARS} characters")
    labels = tuple(sorted({label_of(example) for example in examples}))
    if not 2 <= len(labels) <= MAX_LABELS:
        path = examples[0].path
        raise DataError(f"{path}: holds {len(labels)} labels, 2 to {MAX_LABELS} are learned")
    return labels


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
    path = None
    for example in examples:
        path = example.path
        label = label_of(example)
        if label not in numbers:
            raise example.error("completion", f"the label {label!r:.60} is none of train's")
        item = encode_prompt(tokenizer, example, config)
        if len(item.tokens) > max_length:
            if config.too_long == "error":
                problem = f"{len(item.tokens)} tokens, data.max_length is {max_length}"
                raise example.error("line", problem)
            if config.too_long == "drop":
                dropped += 1
                continue
            item = replace(item, tokens=item.tokens[:max_length])
            truncated += 1
        if not item.tokens:
            raise example.error("prompt", "has no token")
        tokens = (*item.tokens, numbers[label])
        learned = (*[False] * len(item.tokens), True)
        encoded.append(replace(item, tokens=tokens, learned=learned))
    if not encoded:
        raise DataError(f"{path}: every example is longer than data.max_length = {max_length}")
    return EncodedSet(tuple(encoded), dropped, truncated)
