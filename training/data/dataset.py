"""The training and validation rows of a run."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from turret.training.data.batch import Row, pack_rows, single_rows
from turret.training.data.encode import Encoded, EncodedSet, encode_all
from turret.training.data.example import Example, data_digest
from turret.training.data.files import num_set_aside, num_shared, read_files
from turret.training.data.invocation import Invocation
from turret.training.data.labels import encode_labelled
from turret.training.models.base_model import TrainingBase
from turret.training.settings.config import DataConfig
from turret.training.settings.inputs import check_max_length


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
        num_shared: Examples set aside that are also among those trained on.
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
    num_shared: int = 0
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
        DataError: See :func:`read_files` and :func:`encode_all`.
    """
    check_max_length(config, base.max_length)
    files = read_files(config, folder)
    examples, held_out, labels = files.train, files.validation, files.labels
    if held_out is None:
        examples, held_out = split(examples, config.validation_fraction, seed)

    def encode(some: list[Example]) -> EncodedSet:
        if labels:
            return encode_labelled(base.tokenizer, some, labels, config, config.max_length)
        return encode_all(base.tokenizer, some, config, config.max_length, invocation)

    train = encode(examples)
    validation = encode(held_out) if held_out else EncodedSet((), 0, 0)
    return Dataset(
        train=tuple(make_rows(train.examples, config)),
        validation=tuple(single_rows(validation.examples)),
        digest=data_digest(*files.paths),
        num_examples=len(train.examples),
        num_tokens=sum(len(example.tokens) for example in train.examples),
        num_dropped=train.num_dropped + validation.num_dropped,
        num_truncated=train.num_truncated + validation.num_truncated,
        num_shared=num_shared(examples, held_out),
        labels=labels,
        is_multi_label=files.is_multi_label,
    )


def make_rows(examples: tuple[Encoded, ...], config: DataConfig) -> list[Row]:
    """Rows of one example, or packed ones."""
    return pack_rows(examples, config.max_length) if config.packing else single_rows(examples)


def split(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Set a share aside, at least one example unless the share is 0, both in the file's order."""
    count = num_set_aside(len(examples), fraction)
    chosen = set(random.Random(f"{seed}/split").sample(range(len(examples)), k=count))
    kept = [example for index, example in enumerate(examples) if index not in chosen]
    return kept, [example for index, example in enumerate(examples) if index in chosen]
