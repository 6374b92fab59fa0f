"""Turns a scheduled step into the tensors the model runs on."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from turret.kernels.paged_attention import SequenceSpan
from turret.server.adapters.device.members import Members, StepMembers
from turret.server.adapters.device.store import AdapterStep, StepStore
from turret.server.adapters.device.vocabulary import VocabularyGroup
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, Step
from turret.server.engine.step.first_passes import NO_SCALINGS, StepScalings, given_rows
from turret.server.engine.step.rows import Placed, collect_rows
from turret.server.engine.step.vocabulary_plan import changed_embeddings
from turret.server.models.decoding.arch import Arch
from turret.server.models.decoding.decoder import StepInput
from turret.server.models.decoding.layer_ops import LayerOps

# Segments of at most this many rows join the wide masked product; longer ones multiply only their
# own ranks (measured: the wide product wins while rows · adapters stays small).
MAX_SHORT_ROWS = 8

# Sequences and their rows.
Rows = SequenceOf[tuple[Sequence, range]]


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's input and where each sequence sits in it."""

    input: StepInput
    placed: tuple[Placed, ...]


class BatchBuilder:
    """Builds batches for one model, cache geometry and adapter store."""

    def __init__(
        self,
        arch: Arch,
        ops: LayerOps,
        block_size: int,
        store: StepStore,
        device: torch.device,
    ) -> None:
        self._arch = arch
        self._ops = ops
        self._block_size = block_size
        self._store = store
        self._device = device

    def build(self, step: Step, scalings: StepScalings = NO_SCALINGS) -> Batch:
        """Order the rows (short adapted ones by mix, base, long adapted ones); prepare metadata.

        Args:
            step: What is scheduled.
            scalings: Those that first passes have computed.
        """
        short, base, long = [], [], []
        for item in step.scheduled:
            if not item.sequence.active_mix.members:
                base.append(item)
            elif item.num_rows <= MAX_SHORT_ROWS:
                short.append(item)
            else:
                long.append(item)
        # Put rows of one mix side by side, so that they share reads of its adapters.
        short.sort(key=lambda item: item.sequence.active_mix.key)
        placed, row = [], 0
        for item in (*short, *base, *long):
            placed.append(Placed(item, row))
            row += item.num_rows
        adapters = None
        if short or long:
            long_placed = placed[len(short) + len(base) :]
            given = given_rows(placed, scalings)
            adapters = self._bind_adapters(short, long_placed, given)
        return Batch(self._input(placed, row, adapters), tuple(placed))

    def _input(
        self, placed: list[Placed], num_rows: int, adapters: AdapterStep | None
    ) -> StepInput:
        rows = collect_rows(placed, self._block_size)
        spans = [self._span(place) for place in placed]
        attention = {
            window: self._ops.plan_attention(
                spans,
                num_rows=num_rows,
                block_size=self._block_size,
                window=window,
                device=self._device,
            )
            for window in set(self._arch.windows)
        }
        return StepInput(
            token_ids=self._tensor(rows.token_ids),
            positions=self._tensor(rows.positions),
            kv_slots=self._tensor(rows.kv_slots),
            attention=attention,
            adapters=adapters,
            soft_rows=self._tensor(rows.soft_rows) if rows.soft_rows else None,
            soft_values=torch.cat(rows.soft_values).to(self._device) if rows.soft_rows else None,
            embeddings=self._changed_embeddings(placed),
            added_rows=self._tensor(rows.added_rows) if rows.added_rows else None,
            added_values=torch.cat(rows.added_values).to(self._device) if rows.added_rows else None,
        )

    def _span(self, place: Placed) -> SequenceSpan:
        sequence, num_new = place.item.sequence, place.item.num_rows
        context = sequence.num_computed
        used = sequence.blocks[: -(-(context + num_new) // self._block_size)]
        return SequenceSpan(place.row_start, num_new, context, used, sequence.num_padding)

    def _changed_embeddings(self, placed: list[Placed]) -> list[VocabularyGroup]:
        rows = [(p.item.sequence, range(p.row_start, p.last_row + 1)) for p in placed]
        return changed_embeddings(rows, self._store, self._device)

    def _bind_adapters(
        self, short: list[Scheduled], long: list[Placed], given: dict[str, torch.Tensor]
    ) -> AdapterStep:
        sequences = [item.sequence for item in short] + [p.item.sequence for p in long]
        adapters = {a.key: a for sequence in sequences for a, _ in sequence.active_mix.members}
        self._store.prepare(adapters.values())
        return self._store.step(
            StepMembers(
                short=[m for item in short for m in [members_of(item.sequence)] * item.num_rows],
                long=[
                    (p.row_start, p.row_start + p.item.num_rows, members_of(p.item.sequence))
                    for p in long
                ],
                given=given,
            )
        )

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def members_of(sequence: Sequence) -> Members:
    """Key and weight of each adapter that adds something to the tokens that are computed next."""
    return [(a.key, weight) for a, weight in sequence.active_mix.members if weight != 0.0]


def runs_of(rows: Rows) -> list[tuple[int, int, Members]]:
    """Runs of rows: first, end, and their mix."""
    return [(its.start, its.stop, members_of(sequence)) for sequence, its in rows]
