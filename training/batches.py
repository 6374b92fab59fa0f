"""Converts examples to the rows of a run, and rows to batches.

A batch depends only on the seed and its position, so a resumed run gets the same batches as an
uninterrupted run.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from turret.training.base_model import TrainingBase
from turret.training.examples import (
    Encoded,
    EncodedSet,
    Example,
    Invocation,
    data_digest,
    encode_all,
    num_set_aside,
    num_shared,
    read_files,
)
from turret.training.settings import DataConfig
from turret.training.settings.checks import check_max_length


@dataclass(frozen=True, slots=True)
class Dataset:
    """The data of a run.

    Attributes:
        train: The training rows.
        validation: The validation rows, with one example each; may be empty.
        digest: SHA-256 over the files.
        num_examples: The number of training examples.
        num_tokens: The number of their tokens.
        num_dropped: The number of examples in both sets that were left out for their length.
        num_truncated: The number of examples in both sets that were cut to length.
        num_shared: The number of held-out examples that are also training examples.
        labels: The classes of a classification, in the head's order; else empty.
        is_multi_label: Whether an example may have any number of labels, not exactly one.
    """

    train: tuple[BatchRow, ...]
    validation: tuple[BatchRow, ...]
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
    """Read, split and encode the examples.

    Args:
        config: The config; its paths are relative to ``folder``.
        folder: The directory of the config file.
        base: The base, for its tokenizer and context limit.
        seed: The seed of the split.
        invocation: The tokens from which an aLoRA acts.

    Raises:
        ConfigError: ``data.max_length`` exceeds the model's context.
        DataError: See :func:`read_files` and :func:`encode_all`.
    """
    check_max_length(config, base.arch.max_model_len)
    files = read_files(config, folder)
    examples, held_out, labels = files.train, files.validation, files.labels
    if held_out is None:
        examples, held_out = split(examples, config.validation_fraction, seed)

    encode = functools.partial(
        encode_all, base.tokenizer, config=config, labels=labels, invocation=invocation
    )
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


def make_rows(examples: tuple[Encoded, ...], config: DataConfig) -> list[BatchRow]:
    """Rows of one example each, or packed rows."""
    return pack_rows(examples, config.max_length) if config.packing else single_rows(examples)


def split(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out a share of the examples; see ``num_set_aside``. Both parts stay in order."""
    count = num_set_aside(len(examples), fraction)
    chosen = set(random.Random(f"{seed}/split").sample(range(len(examples)), k=count))
    kept = [example for index, example in enumerate(examples) if index not in chosen]
    return kept, [example for index, example in enumerate(examples) if index in chosen]


# A row holds one example, or several if they are packed.
BatchRow = tuple[Encoded, ...]
IGNORED = -100


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Rows side by side, padded on the right.

    Attributes:
        tokens: ``[rows, longest]`` int64.
        positions: ``[rows, longest]`` int64 for packed rows, else None. They start at 0 with every
            example, which shows transformers the tokens that may attend to each other.
        targets: ``[rows, longest]`` int64: the token to predict at each position, or ``IGNORED``.
        num_targets: The number of positions with a target.
        starts: For each row, the first position on which an aLoRA acts; empty for other methods,
            which act everywhere.
        labels: The right labels of each row, if a row may have several; else empty. If there are
            labels, each target is the number of its row.
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None
    targets: torch.Tensor
    num_targets: int
    starts: tuple[int, ...] = ()
    labels: tuple[tuple[int, ...], ...] = ()


def pack_rows(examples: Sequence[Encoded], max_length: int) -> list[BatchRow]:
    """Fill rows of at most ``max_length`` tokens, the longest examples first (best fit)."""
    rows: list[list[Encoded]] = []
    free: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example.tokens)):
        size = len(example.tokens)
        fitting = [(space, index) for index, space in enumerate(free) if space >= size]
        if fitting:
            _, index = min(fitting)
            rows[index].append(example)
            free[index] -= size
        else:
            rows.append([example])
            free.append(max_length - size)
    return [tuple(row) for row in rows]


def single_rows(examples: Sequence[Encoded]) -> list[BatchRow]:
    """Rows with one example each."""
    return [(example,) for example in examples]


class BatchStream:
    """An endless stream of batches: every row once per epoch, in a new order in each epoch.

    Args:
        rows: The rows.
        batch_size: Rows per batch; a batch may span two epochs.
        seed: The seed of the orders.
    """

    def __init__(self, rows: Sequence[BatchRow], *, batch_size: int, seed: int) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def rows(self, index: int) -> list[BatchRow]:
        """The rows of the batch at a position, from 0."""
        start = index * self._batch_size
        return [self._row(place) for place in range(start, start + self._batch_size)]

    def _row(self, place: int) -> BatchRow:
        epoch, offset = divmod(place, len(self._rows))
        if self._order[0] != epoch:
            rng = random.Random(f"{self._seed}/{epoch}")
            self._order = epoch, rng.sample(range(len(self._rows)), k=len(self._rows))
        return self._rows[self._order[1][offset]]


def make_batch(rows: Sequence[BatchRow], *, pad: int, is_packed: bool) -> TrainingBatch:
    """Arrange rows as tensors.

    Args:
        rows: The rows.
        pad: The token id that fills shorter rows.
        is_packed: Whether to number positions per example.
    """
    lengths = [sum(len(example.tokens) for example in row) for row in rows]
    shape = (len(rows), max(lengths))
    tokens = torch.full(shape, pad)
    targets = torch.full(shape, IGNORED)
    positions = torch.arange(shape[1]).repeat(len(rows), 1) if is_packed else None
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example.tokens)
            ids = torch.tensor(example.tokens)
            tokens[number, start:end] = ids
            learned = torch.tensor(example.learned[1:])
            if example.labels is not None:
                ids[-1] = number
            targets[number, start : end - 1] = torch.where(learned, ids[1:], IGNORED)
            if positions is not None:
                positions[number, start:end] = torch.arange(end - start)
            start = end
        if positions is not None:
            # Number padding from 0, like a separate sequence; otherwise it would attend to the last
            # example.
            positions[number, start:] = torch.arange(shape[1] - start)
    num_targets = int((targets != IGNORED).sum())
    starts = tuple(row[0].start for row in rows if row[0].start is not None)
    labels = tuple(row[0].labels for row in rows if row[0].labels is not None)
    return TrainingBatch(tokens, positions, targets, num_targets, starts, labels)
