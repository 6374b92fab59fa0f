"""Turns a scheduled step into the tensors the model runs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turret.kernels.paged_attention import SequenceSpan, plan_attention
from turret.kernels.segments import Component, LongSegment, SegmentPlan, ShortPass
from turret.server.adapters.bank import Members, StepMembers
from turret.server.adapters.pack import AdapterPack, AdapterStep
from turret.server.adapters.soft_prompt import soft_prompt_of
from turret.server.engine.scheduler import Scheduled, Step
from turret.server.engine.sequence import Sequence
from turret.server.models.arch import Arch
from turret.server.models.decoder import StepInput

# Segments of at most this many rows join the wide masked product; longer ones multiply only their
# own ranks (measured: the wide product wins while rows · adapters stays small).
MAX_SHORT_ROWS = 8


@dataclass(frozen=True, slots=True)
class Placed:
    """A scheduled sequence and the first of its rows."""

    item: Scheduled
    row_start: int

    @property
    def last_row(self) -> int:
        return self.row_start + self.item.num_new - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's input and where each sequence sits in it."""

    input: StepInput
    placed: tuple[Placed, ...]


class BatchBuilder:
    """Builds batches for one model, cache geometry and adapter pack."""

    def __init__(
        self, arch: Arch, block_size: int, pack: AdapterPack, device: torch.device
    ) -> None:
        self._arch = arch
        self._block_size = block_size
        self._pack = pack
        self._device = device

    def build(self, step: Step) -> Batch:
        """Order the rows as ``kernels/segments.py`` wants them and prepare all metadata."""
        short, base, long = [], [], []
        for item in step.scheduled:
            if not item.sequence.mix.components:
                base.append(item)
            elif item.num_new <= MAX_SHORT_ROWS:
                short.append(item)
            else:
                long.append(item)
        placed, row = [], 0
        for item in (*short, *base, *long):
            placed.append(Placed(item, row))
            row += item.num_new
        num_short = sum(item.num_new for item in short)
        adapters = None
        if short or long:
            long_placed = placed[len(short) + len(base) :]
            adapters = self._plan_adapters(short, num_short, long_placed)
        return Batch(self._input(placed, row, adapters), tuple(placed))

    def _input(
        self, placed: list[Placed], num_rows: int, adapters: AdapterStep | None
    ) -> StepInput:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        soft_rows: list[int] = []
        soft_values: list[torch.Tensor] = []
        spans = []
        size = self._block_size
        for place in placed:
            sequence, start = place.item.sequence, place.item.sequence.num_computed
            end = start + place.item.num_new
            token_ids.extend(max(token, 0) for token in sequence.tokens[start:end])
            positions.extend(p - sequence.num_padding for p in range(start, end))
            if start < sequence.num_virtual:
                stop = min(end, sequence.num_virtual)
                soft_rows.extend(range(place.row_start, place.row_start + stop - start))
                soft_tokens = soft_prompt_of(sequence.mix).soft_tokens
                assert soft_tokens is not None
                soft_values.append(soft_tokens[start:stop])
            slots.extend(sequence.blocks[p // size] * size + p % size for p in range(start, end))
            used = sequence.blocks[: -(-end // size)]
            spans.append(
                SequenceSpan(place.row_start, place.item.num_new, start, used, sequence.num_padding)
            )
        attention = {
            window: plan_attention(
                spans,
                num_rows=num_rows,
                block_size=size,
                queries_per_head=self._arch.queries_per_head,
                window=window,
                device=self._device,
            )
            for window in set(self._arch.windows)
        }
        return StepInput(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            kv_slots=self._tensor(slots),
            attention=attention,
            adapters=adapters,
            soft_rows=self._tensor(soft_rows) if soft_rows else None,
            soft_values=torch.cat(soft_values).to(self._device) if soft_values else None,
        )

    def _plan_adapters(
        self, short: list[Scheduled], num_short: int, long: list[Placed]
    ) -> AdapterStep:
        sequences = [item.sequence for item in short] + [p.item.sequence for p in long]
        adapters = {a.key: a for sequence in sequences for a, _ in sequence.mix.components}
        self._pack.prepare(adapters.values())
        segments = tuple(
            LongSegment(
                place.row_start,
                place.row_start + place.item.num_new,
                tuple(self._components(place.item.sequence)),
            )
            for place in long
        )
        rows: list[list[Component]] = []
        for item in short:
            rows.extend([self._components(item.sequence)] * item.num_new)
        chosen = [c for components in rows for c in components if c.rank_end > c.rank_start]
        low = min((c.rank_start for c in chosen), default=0)
        high = max((c.rank_end for c in chosen), default=0)
        passes = self._passes(rows, low, high)
        plan = SegmentPlan(num_short, low, high, passes, segments)
        members = StepMembers(
            short=[m for item in short for m in [_members(item.sequence)] * item.num_new],
            long=[
                (p.row_start, p.row_start + p.item.num_new, _members(p.item.sequence)) for p in long
            ],
        )
        return self._pack.step(plan, members, list(adapters))

    def _components(self, sequence: Sequence) -> list[Component]:
        components = []
        for adapter, weight in sequence.mix.components:
            entry = self._pack.entry(adapter.key)
            # Weight 0 adds nothing: no ranks, so that not even an overflow gets through.
            end = entry.rank_end if weight else entry.rank_start
            components.append(Component(entry.rank_start, end, entry.slot, weight))
        return components

    def _passes(self, rows: list[list[Component]], low: int, high: int) -> tuple[ShortPass, ...]:
        """One pass per position in the mixes, over the ranks ``[low, high)``."""
        passes = []
        ranks = torch.arange(low, high, device=self._device)
        for j in range(max((len(components) for components in rows), default=0)):
            members = [i for i, components in enumerate(rows) if len(components) > j]
            chosen = [rows[i][j] for i in members]
            start = self._tensor([c.rank_start for c in chosen]).unsqueeze(1)
            end = self._tensor([c.rank_end for c in chosen]).unsqueeze(1)
            weights = torch.tensor([[c.weight] for c in chosen], device=self._device)
            foreign = (ranks < start) | (ranks >= end)
            passes.append(
                ShortPass(
                    rows=None if j == 0 else self._tensor(members),
                    foreign=foreign if bool(foreign.any()) else None,
                    slots=self._tensor([c.slot for c in chosen]),
                    slot_weights=weights,
                    plain=all(c.weight == 1.0 for c in chosen),
                )
            )
        return tuple(passes)

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _members(sequence: Sequence) -> Members:
    """Key and weight of each adapter that adds something."""
    return [(a.key, weight) for a, weight in sequence.mix.components if weight != 0.0]
