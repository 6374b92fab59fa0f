"""The rows of a scheduled step, as plain numbers: the same for every device."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch

from turret.kernels.paged_attention import SequenceSpan
from turret.server.adapters.soft_prompt import soft_prompt_of
from turret.server.engine.scheduling.scheduler import Scheduled


@dataclass(frozen=True, slots=True)
class Placed:
    """A scheduled sequence and the first of its rows."""

    item: Scheduled
    row_start: int

    @property
    def last_row(self) -> int:
        return self.row_start + self.item.num_new - 1

    @property
    def samples(self) -> bool:
        """Whether a token is drawn from its last row."""
        return self.item.samples and not self.item.sequence.request.score


@dataclass(slots=True)
class StepRows:
    """What the model needs to know of each row.

    Attributes:
        token_ids: Any valid id where ``soft_rows`` says so.
        positions: Position of each row in its sequence.
        kv_slots: Where each row's keys and values go.
        spans: The sequences, for attention.
        soft_rows: Rows whose embedding is not a token's.
        soft_values: Their embeddings, on the host, piece by piece.
    """

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    kv_slots: list[int] = field(default_factory=list)
    spans: list[SequenceSpan] = field(default_factory=list)
    soft_rows: list[int] = field(default_factory=list)
    soft_values: list[torch.Tensor] = field(default_factory=list)


def collect_rows(placed: SequenceOf[Placed], block_size: int) -> StepRows:
    """Go through the new tokens of a step's sequences, in the order of their rows.

    Args:
        placed: Every row belongs to one of them.
        block_size: Positions per KV block.
    """
    rows = StepRows()
    for place in placed:
        sequence, start = place.item.sequence, place.item.sequence.num_computed
        end = start + place.item.num_new
        rows.token_ids.extend(max(token, 0) for token in sequence.tokens[start:end])
        rows.positions.extend(p - sequence.num_padding for p in range(start, end))
        rows.kv_slots.extend(
            sequence.blocks[p // block_size] * block_size + p % block_size
            for p in range(start, end)
        )
        used = sequence.blocks[: -(-end // block_size)]
        rows.spans.append(
            SequenceSpan(place.row_start, place.item.num_new, start, used, sequence.num_padding)
        )
        if start < sequence.num_virtual:
            stop = min(end, sequence.num_virtual)
            rows.soft_rows.extend(range(place.row_start, place.row_start + stop - start))
            soft_tokens = soft_prompt_of(sequence.mix).soft_tokens
            assert soft_tokens is not None
            rows.soft_values.append(soft_tokens[start:stop])
    return rows
