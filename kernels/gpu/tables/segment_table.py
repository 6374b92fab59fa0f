"""Segment metadata on the device: which rows of a step use which adapters.

One int32 buffer of fixed address and size holds everything, its sub-tables found through a header,
so a step costs one asynchronous copy of the bytes it uses, kernels take one pointer, and a captured
CUDA graph replays with any later step: kernels loop over as many work units as the header says.

A *segment* is all rows that share a mix, in any order and wherever they are in the step (rows are
gathered through ``rows``): decode requests of one adapter are one segment and read its weights
once. Rows of the base model are segments without components. Segments are cut into *chunks* of at
most ``TILE_ROWS`` rows; expand works per chunk. Chunks are cut into *items*, one per component and
``RANK_TILE`` ranks; shrink works per item::

    header   num_rows · rows@ · components@ · 0 | num_chunks · chunks@ · num_items · items@
             | num_gates · gates@ · num_questions · questions@
    rows     row number …
    component  rank_start · rank_end · slot · offset · weight (fp32 bits) · is_gated · 0 · 0
    chunk      position · count · component_begin · component_end · v_base · v_stride · 0 · 0
    item       position · count · rank · rank_end · slot · v_base · v_stride · rank_in_adapter

Rank activations lie compactly: row ``i`` of a chunk has its ``v_stride`` ranks (all components of
the mix side by side, component ``c`` from ``offset_c``) at ``v_base + i · v_stride``.

Where components of a mix are those of a gated adapter, each of its chunks has a *gate* besides,
which names them, and *questions*, ``RANK_TILE`` of the query's vectors each; their products with a
row lie as its rank activations do::

    gate       position · count · component · components · column · slot · v_base · v_stride
               · asked_base · asked_stride
    question   position · count · vector · vectors · slot · asked_base · asked_stride · 0
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from turret.kernels.adapters.segments import GatedMembers, LongSegment, SegmentMember
from turret.kernels.gpu.tables.staged_buffer import StagedMemory

RANK_TILE = 16
# Rows per chunk. The same for all steps, so that every row goes through the same MMA instruction.
TILE_ROWS = 16
HEADER = 12
RECORD = 8
GATE_RECORD = 10
# Header positions of the chunks and their items, and of the gates and their questions.
CHUNKS = 4
GATES = 8


@dataclass(slots=True)
class _Gates:
    """The gates of a step, as words.

    Attributes:
        gates: Their records.
        questions: Those of their questions.
        asked: Rows times vectors so far.
        longest: Gates of one mix at most.
    """

    gates: list[int] = field(default_factory=list)
    questions: list[int] = field(default_factory=list)
    asked: int = 0
    longest: int = 0

    def add(self, gated: GatedMembers, slot: int, chunk: Sequence[int]) -> None:
        """A chunk's rows of one adapter; ``chunk`` is its record."""
        position, count, first, _, v_base, v_stride = chunk[:6]
        asked, vectors = self.asked, gated.asked
        components = (first + gated.begin, gated.end - gated.begin, gated.begin)
        self.gates.extend((position, count, *components, slot, v_base, v_stride))
        self.gates.extend((asked, vectors))
        for j in range(0, vectors, RANK_TILE):
            self.questions.extend((position, count, j, vectors, slot, asked + j, vectors, 0))
        self.asked += count * vectors


class SegmentTable:
    """Owns its part of the device memory. Not thread-safe.

    Attributes:
        buffer: ``[capacity]`` int32 on the device; its address never changes.
        max_gates: Gated adapters of one row's mix at most.
        rank_capacity: Rows times ranks of a step at most; kernels size ``v`` by it.
        asked_capacity: Rows times vectors that gates ask about at most.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_row_rank: int,
        max_components: int,
        device: torch.device,
        max_gates: int = 0,
        max_row_asked: int = 0,
        memory: StagedMemory | None = None,
    ) -> None:
        """Allocate for the largest step.

        Args:
            max_rows: Rows of a step.
            max_row_rank: Sum of the ranks of one row's mix.
            max_components: Components of one row's mix.
            device: Where the kernels run.
            max_gates: Gated adapters of one row's mix.
            max_row_asked: Sum of what they ask about (``GatedMembers.asked``).
            memory: What the table is a part of; None for one of its own.
        """
        self.max_rows = max_rows
        self.max_components = max_components
        self.rank_capacity = max_rows * max_row_rank
        self.max_gates = max_gates
        self.asked_capacity = max_rows * max_row_asked
        # Worst case: every row has its own mix, with one chunk and at most max_row_items items.
        max_row_items = max_components + max_row_rank // RANK_TILE
        max_row_questions = max_gates + max_row_asked // RANK_TILE
        row_records = max_components + 1 + max_row_items + max_row_questions
        row_words = 1 + RECORD * row_records + GATE_RECORD * max_gates
        capacity = HEADER + max_rows * row_words
        memory = StagedMemory(device, 0) if memory is None else memory
        self._part = memory.part(capacity, torch.int32)
        self.buffer = self._part.buffer

    def load(self, runs: Sequence[LongSegment]) -> None:
        """Describe a step and start copying the description to the device.

        Args:
            runs: Runs of rows and their mixes; equal mixes are joined to one segment. Rows in no
                run are touched by no kernel; runs without components only get the base bias.

        Raises:
            ValueError: The step is over a capacity given at construction.
        """
        self._part.load(self._words(runs))

    def _words(self, runs: Sequence[LongSegment]) -> list[int]:
        segments: dict[tuple[SegmentMember, ...], list[int]] = {}
        last_of: dict[tuple[SegmentMember, ...], LongSegment] = {}
        for run in runs:
            segments.setdefault(run.members, []).extend(range(run.start, run.end))
            last_of[run.members] = run
        rows: list[int] = []
        components: list[int] = []
        chunks: list[int] = []
        items: list[int] = []
        gates = _Gates()
        v_base = 0
        for mix, members in segments.items():
            first = len(components) // RECORD
            gated = last_of[mix].gated
            offsets = self._add_components(components, mix, gated)
            gates.longest = max(gates.longest, len(gated))
            stride = sum(c.rank_end - c.rank_start for c in mix)
            for start in range(0, len(members), TILE_ROWS):
                count = min(TILE_ROWS, len(members) - start)
                position = len(rows) + start
                base = v_base + start * stride
                last = first + len(mix)
                chunk = (position, count, first, last, base, stride, 0, 0)
                chunks.extend(chunk)
                for adapter in gated:
                    gates.add(adapter, mix[adapter.begin].slot, chunk)
                for c, offset in zip(mix, offsets, strict=True):
                    for j in range(0, c.rank_end - c.rank_start, RANK_TILE):
                        items.extend((position, count, c.rank_start + j, c.rank_end, c.slot))
                        items.extend((base + offset + j, stride, j))
            rows.extend(members)
            v_base += len(members) * stride
        self._check(len(rows), v_base, segments)
        self._check_gates(gates)
        return self._assemble(rows, components, (chunks, items), gates)

    @staticmethod
    def _add_components(
        components: list[int], mix: tuple[SegmentMember, ...], gated: tuple[GatedMembers, ...]
    ) -> list[int]:
        offsets, offset = [], 0
        is_gated = {i for adapter in gated for i in range(adapter.begin, adapter.end)}
        for i, c in enumerate(mix):
            (weight,) = struct.unpack("<i", struct.pack("<f", c.weight))
            words = (c.rank_start, c.rank_end, c.slot, offset, weight, i in is_gated, 0, 0)
            components.extend(words)
            offsets.append(offset)
            offset += c.rank_end - c.rank_start
        return offsets

    def _check(
        self, num_rows: int, ranks: int, segments: dict[tuple[SegmentMember, ...], list[int]]
    ) -> None:
        if num_rows > self.max_rows:
            raise ValueError(f"the step has {num_rows} rows; {self.max_rows} are allocated")
        if ranks > self.rank_capacity:
            raise ValueError(
                f"the step has {ranks} rows times ranks; {self.rank_capacity} are allocated"
            )
        longest = max((len(mix) for mix in segments), default=0)
        if longest > self.max_components:
            raise ValueError(f"a mix has {longest} components; {self.max_components} are allocated")

    def _check_gates(self, gates: _Gates) -> None:
        if gates.longest > self.max_gates:
            raise ValueError(f"a mix has {gates.longest} gates; {self.max_gates} are allocated")
        if gates.asked > self.asked_capacity:
            raise ValueError(
                f"the gates of the step ask {gates.asked} times; {self.asked_capacity} are "
                "allocated"
            )

    @staticmethod
    def _assemble(
        rows: list[int],
        components: list[int],
        cut: tuple[list[int], list[int]],
        gates: _Gates,
    ) -> list[int]:
        words = [0] * HEADER
        words[0] = len(rows)
        words[1] = len(words)
        words.extend(rows)
        words[2] = len(words)
        words.extend(components)
        asked = (gates.gates, gates.questions)
        for position, record, (heads, parts) in (
            (CHUNKS, RECORD, cut),
            (GATES, GATE_RECORD, asked),
        ):
            words[position] = len(heads) // record
            words[position + 1] = len(words)
            words.extend(heads)
            words[position + 2] = len(parts) // RECORD
            words[position + 3] = len(words)
            words.extend(parts)
        return words
