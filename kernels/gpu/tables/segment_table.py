"""Segment metadata on the device: which rows of a step use which adapters.

One int32 buffer of fixed address and size holds everything, its sub-tables found through a header,
so a step costs one asynchronous copy of the bytes it uses, kernels take one pointer, and a captured
CUDA graph replays with any later step: kernels loop over as many work units as the header says.

A *segment* is all rows that share a mix, in any order and wherever they are in the step (rows are
gathered through ``rows``): decode requests of one adapter are one segment and read its weights
once. Rows of the base model are segments without components. Segments are cut into *chunks* of at
most ``TILE_ROWS`` rows; expand works per chunk. Chunks are cut into *items*, one per component and
``RANK_TILE`` ranks; shrink works per item::

    header   num_rows · rows@ · components@ · 0 | num_chunks · chunks@ · num_items · items@ | same
    rows     row number …                           (the second list: one-row chunks, the GEMV form)
    component  rank_start · rank_end · slot · offset · weight (fp32 bits) · 0 · 0 · 0
    chunk      position · count · component_begin · component_end · v_base · v_stride · as_is · 0
    item       position · count · rank · rank_end · slot · v_base · v_stride · rank_in_adapter

Rank activations lie compactly: row ``i`` of a chunk has its ``v_stride`` ranks (all components of
the mix side by side, component ``c`` from ``offset_c``) at ``v_base + i · v_stride``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from turret.kernels.adapters.segments import LongSegment, SegmentMember
from turret.kernels.gpu.tables.staged_buffer import StagedMemory

RANK_TILE = 16
# Rows per chunk. One size for all steps: every row goes through the same MMA instruction.
TILE_ROWS = 16
HEADER = 12
RECORD = 8
# Header positions of the two lists; kernels take one of these.
TILES = 4
ONE_ROW = 8


class SegmentTable:
    """Owns its part of the device memory. Not thread-safe.

    Attributes:
        buffer: ``[capacity]`` int32 on the device; its address never changes.
        rank_capacity: Rows times ranks of a step at most; kernels size ``v`` by it.
        gemv: Whether chunks of one row go to the second list. Faster where most rows have adapters
            of their own, but a row then rounds differently when it shares its adapter with another.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_row_rank: int,
        max_components: int,
        device: torch.device,
        gemv: bool = False,
        memory: StagedMemory | None = None,
    ) -> None:
        """Allocate for the largest step.

        Args:
            max_rows: Rows of a step.
            max_row_rank: Sum of the ranks of one row's mix.
            max_components: Components of one row's mix.
            device: Where the kernels run.
            gemv: See the class.
            memory: What the table is a part of; None for one of its own.
        """
        self.gemv = gemv
        self.max_rows = max_rows
        self.max_components = max_components
        self.rank_capacity = max_rows * max_row_rank
        # Every row its own mix: one chunk and at most max_row_items items each.
        max_row_items = max_components + max_row_rank // RANK_TILE
        records = max_rows * (max_components + 1 + max_row_items)
        capacity = HEADER + max_rows + RECORD * records
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
        as_is: dict[tuple[SegmentMember, ...], int] = {}
        for run in runs:
            segments.setdefault(run.members, []).extend(range(run.start, run.end))
            as_is[run.members] = run.as_is
        rows: list[int] = []
        components: list[int] = []
        lists: dict[int, tuple[list[int], list[int]]] = {TILES: ([], []), ONE_ROW: ([], [])}
        v_base = 0
        for mix, members in segments.items():
            first = len(components) // RECORD
            offsets = self._add_components(components, mix)
            stride = sum(c.rank_end - c.rank_start for c in mix)
            for start in range(0, len(members), TILE_ROWS):
                count = min(TILE_ROWS, len(members) - start)
                chunks, items = lists[ONE_ROW if self.gemv and count == 1 else TILES]
                position = len(rows) + start
                base = v_base + start * stride
                last = first + len(mix)
                chunks.extend((position, count, first, last, base, stride, as_is[mix], 0))
                for c, offset in zip(mix, offsets, strict=True):
                    for j in range(0, c.rank_end - c.rank_start, RANK_TILE):
                        items.extend((position, count, c.rank_start + j, c.rank_end, c.slot))
                        items.extend((base + offset + j, stride, j))
            rows.extend(members)
            v_base += len(members) * stride
        self._check(len(rows), v_base, segments)
        return self._assemble(rows, components, lists)

    @staticmethod
    def _add_components(components: list[int], mix: tuple[SegmentMember, ...]) -> list[int]:
        offsets, offset = [], 0
        for c in mix:
            (weight,) = struct.unpack("<i", struct.pack("<f", c.weight))
            components.extend((c.rank_start, c.rank_end, c.slot, offset, weight, 0, 0, 0))
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

    @staticmethod
    def _assemble(
        rows: list[int], components: list[int], lists: dict[int, tuple[list[int], list[int]]]
    ) -> list[int]:
        words = [0] * HEADER
        words[0] = len(rows)
        words[1] = len(words)
        words.extend(rows)
        words[2] = len(words)
        words.extend(components)
        for position, (chunks, items) in lists.items():
            words[position] = len(chunks) // RECORD
            words[position + 1] = len(words)
            words.extend(chunks)
            words[position + 2] = len(items) // RECORD
            words[position + 3] = len(words)
            words.extend(items)
        return words
