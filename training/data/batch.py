"""Which examples make up which batch.

It is a function of seed and position alone, so that a resumed run sees what the uninterrupted one
would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turret.training.data.encode import Encoded

# A row holds one example, or several if they are packed.
Row = tuple[Encoded, ...]
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows side by side, padded on the right.

    Attributes:
        tokens: ``[rows, longest]`` int64.
        positions: ``[rows, longest]`` int64 where rows are packed: they start at 0 with every
            example, from which transformers tells which tokens may attend to which. Else None.
        targets: ``[rows, longest]`` int64: the token to predict at each position, or ``IGNORED``.
        num_tokens: Tokens without padding.
        num_targets: Positions with a target.
        starts: Of each row, the first position that an aLoRA acts on; empty if everywhere.
        labels: Of each row, the labels that hold, where any number may: the target is then the
            row's own number. Else empty.
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None
    targets: torch.Tensor
    num_tokens: int
    num_targets: int
    starts: tuple[int, ...] = ()
    labels: tuple[tuple[int, ...], ...] = ()


def pack_rows(examples: Sequence[Encoded], max_length: int) -> list[Row]:
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


def single_rows(examples: Sequence[Encoded]) -> list[Row]:
    """One example a row."""
    return [(example,) for example in examples]


class BatchStream:
    """An endless stream of batches: every row once an epoch, in a new order each.

    Args:
        rows: What there is.
        batch_size: Rows per batch; a batch may span two epochs.
        pad: Token id that fills the shorter rows.
        seed: Of the orders.
        is_packed: Whether to number positions per example.
    """

    def __init__(
        self, rows: Sequence[Row], *, batch_size: int, pad: int, seed: int, is_packed: bool
    ) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._pad = pad
        self._seed = seed
        self._is_packed = is_packed
        self._order: tuple[int, list[int]] = (-1, [])

    def batch(self, index: int) -> Batch:
        """The batch at a position, from 0."""
        start = index * self._batch_size
        rows = [self._row(place) for place in range(start, start + self._batch_size)]
        return make_batch(rows, pad=self._pad, is_packed=self._is_packed)

    def _row(self, place: int) -> Row:
        epoch, offset = divmod(place, len(self._rows))
        if self._order[0] != epoch:
            rng = random.Random(f"{self._seed}/{epoch}")
            self._order = epoch, rng.sample(range(len(self._rows)), k=len(self._rows))
        return self._rows[self._order[1][offset]]


def make_batch(rows: Sequence[Row], *, pad: int, is_packed: bool) -> Batch:
    """Lay rows out as tensors; the arguments are those of :class:`BatchStream`."""
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
            # Padding is a sequence of its own: numbered on, it would attend to the last example.
            positions[number, start:] = torch.arange(shape[1] - start)
    num_targets = int((targets != IGNORED).sum())
    starts = tuple(row[0].start for row in rows if row[0].start is not None)
    labels = tuple(row[0].labels for row in rows if row[0].labels is not None)
    return Batch(tokens, positions, targets, sum(lengths), num_targets, starts, labels)
