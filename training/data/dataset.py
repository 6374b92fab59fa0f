"""The training and validation rows of a run."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from turret.training.base_model import TrainingBase
from turret.training.data.batch import Row, pack_rows, single_rows
from turret.training.data.encode import Encoded, EncodedSet, encode_all
from turret.training.data.example import Example, data_digest, read_examples
from turret.training.data.invocation import Invocation
from turret.training.data.labels import check_labelled, encode_labelled, labels_of
from turret.training.errors import ConfigError, DataError
from turret.training.settings.config import DataConfig


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a run learns from.

    Attributes:
        train: Rows.
        validation: Rows of one example each; may be empty.
        digest: SHA-256 over the files.
        num_examples: Training examples.
        num_tokens: Their tokens.
        num_dropped: Examples left out for their length, of both sets.
        num_truncated: Examples cut to length, of both sets.
        labels: What a classification tells apart, in the head's order; else empty.
        is_multi_label: Whether any number of them may hold, and not exactly one.
    """

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    digest: str
    num_examples: int
    num_tokens: int
    num_dropped: int
    num_truncated: int
    labels: tuple[str, ...] = ()
    is_multi_label: bool = False


def load_dataset(
    config: DataConfig,
    folder: Path,
    base: TrainingBase,
    seed: int,
    invocation: Invocation | None = None,
) -> Dataset:
    """Read, split and encode.

    Args:
        config: Paths are relative to ``folder``.
        folder: Of the config file.
        base: Its tokenizer and context limit.
        seed: Of the split.
        invocation: Where an aLoRA begins to act.

    Raises:
        ConfigError: ``data.max_length`` is beyond the model's context.
        DataError: See :func:`read_examples` and :func:`encode_all`; or an example is in both sets.
    """
    if config.max_length > base.max_length:
        raise ConfigError.of("data.max_length", f"the model's context ends at {base.max_length}")
    path = folder / config.train
    examples = read_examples(path)
    # Before the split: a label may be on so few lines that all of them are set aside.
    labels = labels_of(examples) if config.task == "classification" else ()
    is_multi_label = bool(labels) and examples[0].labels is not None
    paths = [path]
    if config.validation is not None:
        paths.append(folder / config.validation)
        held_out = read_examples(paths[1])
        if labels:
            check_labelled(held_out, is_multi_label=is_multi_label)
        _check_disjoint(examples, held_out)
    else:
        examples, held_out = split(examples, config.validation_fraction, seed)

    if not labels:
        _check_answered([*examples, *held_out])

    def encode(some: list[Example]) -> EncodedSet:
        if labels:
            return encode_labelled(base.tokenizer, some, labels, config, config.max_length)
        return encode_all(base.tokenizer, some, config, config.max_length, invocation)

    train = encode(examples)
    validation = encode(held_out) if held_out else EncodedSet((), 0, 0)
    return Dataset(
        train=tuple(make_rows(train.examples, config)),
        validation=tuple(single_rows(validation.examples)),
        digest=data_digest(*paths),
        num_examples=len(train.examples),
        num_tokens=sum(len(example.tokens) for example in train.examples),
        num_dropped=train.num_dropped + validation.num_dropped,
        num_truncated=train.num_truncated + validation.num_truncated,
        labels=labels,
        is_multi_label=is_multi_label,
    )


def make_rows(examples: tuple[Encoded, ...], config: DataConfig) -> list[Row]:
    """Rows of one example, or packed ones."""
    return pack_rows(examples, config.max_length) if config.packing else single_rows(examples)


def split(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Set a share aside, at least one example unless the share is 0, both in the file's order."""
    if fraction == 0 or len(examples) < 2:
        return examples, []
    count = min(max(1, round(len(examples) * fraction)), len(examples) - 1)
    chosen = set(random.Random(f"{seed}/split").sample(range(len(examples)), k=count))
    kept = [example for index, example in enumerate(examples) if index not in chosen]
    return kept, [example for index, example in enumerate(examples) if index in chosen]


def _content(example: Example) -> object:
    messages = example.messages and tuple((m["role"], m["content"]) for m in example.messages)
    return messages, example.prompt, example.completion, example.labels


def _check_answered(examples: list[Example]) -> None:
    for example in examples:
        if example.labels is not None:
            raise example.error("labels", 'are learned with data.task = "classification" alone')


def _check_disjoint(train: list[Example], validation: list[Example]) -> None:
    seen = {_content(example): example.line for example in train}
    for example in validation:
        line = seen.get(_content(example))
        if line is not None:
            raise DataError(
                f"{example.path}:{example.line}: line: is line {line} of the training file too"
            )
