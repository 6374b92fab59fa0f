"""Device buffers for one kind of step (decode steps, or steps with prompts), allocated once.

``kernels/gpu/tables.py`` defines the tables, with their words and records, and the staging areas.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from turret.kernels.gpu.tables import (
    ROW_TABLE_MULTIPLE,
    SPLIT,
    AttentionTable,
    RowTable,
    RunOfRows,
    SamplingTable,
    SegmentTable,
    StagedMemory,
    host_tensor,
    upload,
)
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step import StepRows
from turret.server.models.decoding import Arch

# Block numbers of the running sequences on the device, kept from step to step.


@dataclass(slots=True)
class _Row:
    """The block numbers of a sequence that are on the device.

    Attributes:
        begin: Where the block numbers begin in the buffer.
        blocks: The list from which they were copied. A sequence's list only grows; after its blocks
            were freed, the sequence has a new list (``Sequence.blocks``).
        count: The number of block numbers on the device.
    """

    begin: int
    blocks: list[int]
    count: int = 0


@dataclass(frozen=True, slots=True)
class BlockUpdates:
    """The block numbers that must be written before a step.

    Attributes:
        begins: Where each sequence's block numbers begin.
        places: Indices of the buffer that must be written before the step's kernels.
        numbers: The block numbers that belong there.
    """

    begins: list[int]
    places: list[int]
    numbers: list[int]


class BlockTables:
    """A row of block numbers per sequence; only new numbers are sent. Not thread-safe.

    Args:
        max_seqs: Maximum number of sequences in a step.
        max_blocks: Blocks of a sequence; rows become longer when a sequence has more.
        device: Where the buffer is.

    Attributes:
        buffer: ``[(max_seqs + 1) · row length]`` int32 on the device. Index 0 is never read.
        epoch: Changes with the buffer's address.
    """

    def __init__(self, max_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.epoch = 0
        self._max_seqs = max_seqs
        self._device = device
        self.buffer = torch.empty(0, dtype=torch.int32, device=device)
        self._make(max_blocks)

    def _make(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        size = (self._max_seqs + 1) * max_blocks
        # Keep the old buffer, which the step before may still read.
        self._previous = self.buffer
        self.buffer = torch.zeros(size, dtype=torch.int32, device=self._device)
        self.clear()

    def clear(self) -> None:
        """Assume that the device has no block numbers, because a step that sent some has failed."""
        self._rows: dict[Sequence, _Row] = {}
        self._free = [number * self._max_blocks for number in range(self._max_seqs, 0, -1)]

    def forget(self, sequence: Sequence) -> None:
        """Give a sequence's row back."""
        row = self._rows.pop(sequence, None)
        if row is not None:
            self._free.append(row.begin)

    def begins(self, sequences: SequenceOf[Sequence]) -> list[int]:
        """Positions at which the block numbers of the last step's sequences begin."""
        return [self._rows[sequence].begin for sequence in sequences]

    def update(self, sequences: SequenceOf[Sequence]) -> BlockUpdates:
        """Find the block numbers to send for a step. From then on, they count as sent."""
        longest = max([len(sequence.blocks) for sequence in sequences], default=0)
        if longest > self._max_blocks:
            self.epoch += 1
            self._make(max(longest, 2 * self._max_blocks))
        begins: list[int] = []
        places: list[int] = []
        numbers: list[int] = []
        for sequence in sequences:
            blocks = sequence.blocks
            row = self._rows.get(sequence)
            if row is None or row.blocks is not blocks:
                row = self._assign(sequence, sequences)
            count = len(blocks)
            if row.count < count:
                places.extend(range(row.begin + row.count, row.begin + count))
                numbers.extend(blocks[row.count :])
                row.count = count
            begins.append(row.begin)
        return BlockUpdates(begins, places, numbers)

    def write(self, places: torch.Tensor, numbers: torch.Tensor) -> None:
        """Write block numbers, on the current stream.

        Args:
            places: ``[updates]`` int64 on the device; index 0 for unused updates.
            numbers: ``[updates]`` int32 on the device.
        """
        self.buffer.index_copy_(0, places, numbers)

    def write_at_once(self, updates: BlockUpdates) -> None:
        """Write updates that do not fit into a step's tables."""
        places = upload(torch.tensor(updates.places), self._device)
        numbers = upload(torch.tensor(updates.numbers, dtype=torch.int32), self._device)
        self.write(places, numbers)

    def _assign(self, sequence: Sequence, step: SequenceOf[Sequence]) -> _Row:
        """Give a sequence an empty row: its own, a free one, or that of another step's sequence."""
        self.forget(sequence)
        if not self._free:
            needed = set(step)
            self.forget(next(other for other in self._rows if other not in needed))
        row = _Row(self._free.pop(), sequence.blocks)
        self._rows[sequence] = row
        return row


AttentionWords = dict[int | None, torch.Tensor]

# Maximum number of records that spread long contexts over several programs. It limits attention's
# scratch memory. If there are no records left, one program reads a whole context.
_MAX_SPREAD_RECORDS = 2048
# Ranks per row for which the first segment table has room; the table grows if a step needs more.
_FIRST_ROW_RANK = 256
# A multiple of 16, like all later sizes, because kernels are compiled for that.
_FIRST_MEMBERS = 16
_FIRST_GATES = 2
_FIRST_ROW_QUERY = 64


class StepTables:
    """Everything that a step's kernels read, at fixed addresses (``GpuTables``).

    There are two buffers: one for data that changes with every step (rows, attention, sampling),
    and one for data that changes with the adapters of the rows. Usually one copy fills each of
    them.

    Args:
        arch: The model.
        blocks: The sequences' block numbers, which all kinds of steps share.
        max_rows: Maximum number of rows in a step.
        max_seqs: Maximum number of sequences in a step.
        max_len: Maximum number of positions of a sequence without a prefix.
        device: Where the kernels run.

    Attributes:
        max_rows: See above.
        sampling: How tokens are drawn.
        attention: Table per distinct window (None is full attention).
    """

    def __init__(
        self,
        arch: Arch,
        blocks: BlockTables,
        *,
        max_rows: int,
        max_seqs: int,
        max_len: int,
        device: torch.device,
    ) -> None:
        self.max_rows = max_rows
        self._device = device
        self._blocks = blocks
        self._memory = StagedMemory(device)
        self._rows = self._memory.part(4 * max_rows, torch.int64)
        self._places = self._memory.part(max_rows, torch.int64)
        self._numbers = self._memory.part(max_rows, torch.int32)
        self.sampling = SamplingTable(max_seqs, device, self._memory)
        self.attention = self._make_attention(arch, max_seqs, max_len)
        self._adapter_memory = StagedMemory(device)
        self._row_tables: dict[Hashable, RowTable] = {}
        self._row_rank, self._members = _FIRST_ROW_RANK, _FIRST_MEMBERS
        self._gates, self._query_length = _FIRST_GATES, _FIRST_ROW_QUERY
        self._segments = self._make_segments()

    @property
    def num_copies(self) -> int:
        """Number of copies to the device so far."""
        return self._memory.num_copies + self._adapter_memory.num_copies

    def step(self) -> AbstractContextManager[None]:
        """A context in which a step's rows, attention and sampling are loaded.

        At its end, they are sent to the device.
        """
        return self._memory.step()

    def adapters(self) -> AbstractContextManager[None]:
        """A context in which the tables of the rows' adapters are loaded; its end sends them."""
        return self._adapter_memory.step()

    def attention_words(self, spans: SequenceOf[int]) -> AttentionWords:
        """The description of a step for attention, by window, on the host."""
        return {window: table.words(spans) for window, table in self.attention.items()}

    def load_rows(
        self,
        rows: StepRows,
        sample_rows: SequenceOf[int],
        updates: BlockUpdates,
        attention: AttentionWords,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Load a step's rows and their attention; missing rows are zero.

        Args:
            rows: The rows.
            sample_rows: Rows from which tokens are drawn.
            updates: Block numbers to be written; see ``write_blocks``.
            attention: The result of ``attention_words``.

        Returns:
            Token ids, positions, KV slots and sample rows, views of the whole buffer, each
            ``[max_rows]`` int64.
        """
        staged = self._rows.staged(4 * self.max_rows).view(4, self.max_rows)
        staged.zero_()
        columns = (rows.token_ids, rows.positions, rows.kv_slots, sample_rows)
        for target, values in zip(staged, columns, strict=True):
            target[: len(values)] = host_tensor(values, torch.int64)
        self._load_updates(updates)
        for window, table in self.attention.items():
            table.blocks = self._blocks.buffer
            table.load_words(attention[window])
        ids, places, slots, samples = self._rows.buffer.view(4, self.max_rows).unbind()
        return ids, places, slots, samples

    def _load_updates(self, updates: BlockUpdates) -> None:
        places, numbers = updates.places, updates.numbers
        if len(places) > self.max_rows:
            # A long prompt was found in the prefix cache and has too many blocks for the step's
            # buffers.
            self._blocks.write_at_once(updates)
            places = numbers = []
        for part, values in ((self._places, places), (self._numbers, numbers)):
            staged = part.staged(self.max_rows)
            # Unused entries write a 0 to index 0, which is never read.
            staged.zero_()
            staged[: len(values)] = host_tensor(values, staged.dtype)

    def write_blocks(self, num_rows: int) -> None:
        """Write the step's new block numbers, on the device, before its attention.

        Args:
            num_rows: The number of the step's rows; each row has at most one new block.
        """
        self._blocks.write(self._places.buffer[:num_rows], self._numbers.buffer[:num_rows])

    def load_segments(self, runs: SequenceOf[RunOfRows]) -> SegmentTable:
        """Load the segment table, and replace it by a larger one if a mix does not fit."""
        self._fit_segments(runs)
        self._segments.load(runs)
        return self._segments

    def _fit_segments(self, runs: SequenceOf[RunOfRows]) -> None:
        mixes = [(run.members, run.gated) for run in runs]
        ranks = max((sum(m.rank_end - m.rank_start for m in mix) for mix, _ in mixes), default=0)
        sizes = (
            ranks,
            max((len(mix) for mix, _ in mixes), default=0),
            max((len(gated) for _, gated in mixes), default=0),
            max((sum(one.query_length for one in gated) for _, gated in mixes), default=0),
        )
        held = (self._row_rank, self._members, self._gates, self._query_length)
        if all(size <= room for size, room in zip(sizes, held, strict=True)):
            return
        self._row_rank, self._members, self._gates, self._query_length = (
            _doubled(room, size) for size, room in zip(sizes, held, strict=True)
        )
        # The old table's memory is not reused, and steps captured with it are never replayed.
        self._segments = self._make_segments()

    def row_table(self, key: Hashable) -> RowTable:
        """The table for a slot table and a position in mixes; a key always gets the same table."""
        if key not in self._row_tables:
            capacity = -(-self.max_rows // ROW_TABLE_MULTIPLE) * ROW_TABLE_MULTIPLE
            self._row_tables[key] = RowTable(capacity, self._device, self._adapter_memory)
        return self._row_tables[key]

    def _make_attention(
        self, arch: Arch, max_seqs: int, max_len: int
    ) -> dict[int | None, AttentionTable]:
        spread = min(max_seqs * -(-max_len // SPLIT), _MAX_SPREAD_RECORDS)
        return {
            window: AttentionTable(
                max_records=self.max_rows + spread,
                blocks=self._blocks.buffer,
                kv_heads=arch.num_kv_heads,
                queries_per_head=arch.queries_per_head,
                window=window,
                device=self._device,
                spread_records=spread,
                memory=self._memory,
            )
            for window in set(arch.windows)
        }

    def _make_segments(self) -> SegmentTable:
        return SegmentTable(
            max_rows=self.max_rows,
            max_row_rank=self._row_rank,
            max_components=self._members,
            max_gates=self._gates,
            max_row_query=self._query_length,
            device=self._device,
            memory=self._adapter_memory,
        )


def _doubled(room: int, size: int) -> int:
    """``room``, doubled until it is at least ``size``."""
    while room < size:
        room *= 2
    return room
