"""The rows of a scheduled step, as plain numbers: the same for every device."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from turret.server.adapters.operators.soft_prompt import soft_prompt_of
from turret.server.adapters.operators.vocabulary import added_rows_of
from turret.server.engine.scheduling.sequence import Scheduled, Sequence
from turret.server.models.decoding.arch import LONG


class Placed(NamedTuple):
    """A scheduled sequence and the first of its rows."""

    item: Scheduled
    row_start: int

    @property
    def last_row(self) -> int:
        return self.row_start + self.item.num_rows - 1

    @property
    def sampled(self) -> range:
        """The rows that tokens are drawn from: its last, and those of its draft."""
        return range(self.last_row - len(self.item.draft), self.last_row + 1)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn from its last rows."""
        return self.item.samples and self.item.sequence.request.generates


@dataclass(slots=True)
class StepRows:
    """What the model needs to know of each row.

    Attributes:
        token_ids: Any valid id where ``soft_rows`` or ``added_rows`` says so.
        positions: Position of each row in its sequence, ``LONG`` more where it is a long one.
        kv_slots: Where each row's keys and values go.
        spans: One behind the other five numbers of each sequence: its first row, new tokens, tokens
            before them, where its block numbers begin (as ``collect_rows`` was told), and leading
            positions that are not seen.
        soft_rows: Rows whose embedding is not a token's.
        soft_values: Their embeddings, on the host, piece by piece.
        added_rows: Rows of tokens that the base's embedding has no row for.
        added_values: Their embeddings, on the host, piece by piece.
    """

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    kv_slots: list[int] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    soft_rows: list[int] = field(default_factory=list)
    soft_values: list[torch.Tensor] = field(default_factory=list)
    added_rows: list[int] = field(default_factory=list)
    added_values: list[torch.Tensor] = field(default_factory=list)

    def add(self, place: Placed, block_size: int, blocks_at: int) -> None:
        """Add a sequence's new rows; soft tokens may be among them."""
        sequence, start = place.item.sequence, place.item.sequence.num_computed
        end = start + place.item.num_rows
        known = sequence.tokens[start : start + place.item.num_new]
        self.token_ids.extend(max(token, 0) for token in known)
        self.token_ids.extend(place.item.draft)
        self.take_added(sequence, place.row_start)
        first = _first_position(sequence)
        self.positions.extend(range(first + start, first + end))
        self.kv_slots.extend(
            sequence.blocks[p // block_size] * block_size + p % block_size
            for p in range(start, end)
        )
        self.spans += (place.row_start, place.item.num_rows, start, blocks_at)
        self.spans.append(sequence.num_padding)
        if start < sequence.num_virtual:
            stop = min(end, sequence.num_virtual)
            self.soft_rows.extend(range(place.row_start, place.row_start + stop - start))
            soft_tokens = soft_prompt_of(sequence.mix).soft_tokens
            assert soft_tokens is not None
            self.soft_values.append(soft_tokens[start:stop])

    def take_added(self, sequence: Sequence, row_start: int) -> None:
        """Note which of the last rows, a sequence's, are of tokens that the base lacks."""
        if not sequence.vocab_size or (added := added_rows_of(sequence.mix)) is None:
            return
        rows = range(row_start, len(self.token_ids))
        found = [row for row in rows if self.token_ids[row] >= added.first]
        if not found:
            return
        places = torch.tensor([self.token_ids[row] - added.first for row in found])
        self.added_rows += found
        self.added_values.append(added.embedding.index_select(0, places))
        for row in found:
            self.token_ids[row] = 0


def collect_rows(
    placed: SequenceOf[Placed], block_size: int, blocks_at: SequenceOf[int] | None = None
) -> StepRows:
    """Go through the new tokens of a step's sequences, drafts included, in the order of their rows.

    Args:
        placed: Every row belongs to one of them.
        block_size: Positions per KV block.
        blocks_at: Where each sequence's block numbers begin; None where that is nobody's business.
    """
    rows = StepRows()
    for number, place in enumerate(placed):
        rows.add(place, block_size, 0 if blocks_at is None else blocks_at[number])
    return rows


def collect_decode_rows(
    sequences: SequenceOf[Sequence], block_size: int, positions: list[int]
) -> StepRows:
    """Like ``collect_rows``, for sequences with one new row each, that of a generated token.

    What does not depend on that token may have been collected before (``decode_spans``).
    """
    rows = StepRows(positions=positions)
    ids, slots = rows.token_ids, rows.kv_slots
    for sequence in sequences:
        start = sequence.num_computed
        ids.append(sequence.tokens[start])
        rows.take_added(sequence, len(ids) - 1)
        slots.append(sequence.blocks[start // block_size] * block_size + start % block_size)
    return rows


def decode_spans(
    sequences: SequenceOf[Sequence], blocks_at: SequenceOf[int], ahead: int = 0
) -> tuple[list[int], list[int]]:
    """Positions and spans of a decode step, as ``StepRows`` has them.

    Args:
        sequences: One new row each.
        blocks_at: Where each one's block numbers begin.
        ahead: How many tokens of each are still to come before.
    """
    positions: list[int] = []
    spans: list[int] = []
    for row, (sequence, at) in enumerate(zip(sequences, blocks_at, strict=True)):
        start, padding = sequence.num_computed + ahead, sequence.num_padding
        positions.append(_first_position(sequence) + start)
        spans += (row, 1, start, at, padding)
    return positions, spans


def _first_position(sequence: Sequence) -> int:
    """The model's position for the first slot of a sequence."""
    return (LONG if sequence.is_long else 0) - sequence.num_padding
