"""Block numbers of the running sequences on the device, kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from turret.kernels.gpu.tables import upload
from turret.server.engine.scheduling.sequence import Sequence


@dataclass(slots=True)
class _Row:
    """What the device has of a sequence.

    Attributes:
        begin: Where its block numbers begin in the buffer.
        blocks: The list that they were taken from. A sequence's list only grows, and is another
            one after its blocks were freed (``Sequence.blocks``).
        count: How many of them have been sent.
    """

    begin: int
    blocks: list[int]
    count: int = 0


@dataclass(frozen=True, slots=True)
class BlockUpdates:
    """What a step's sequences need on the device.

    Attributes:
        begins: Where each sequence's block numbers begin.
        places: Places in the buffer to be written before the step's kernels.
        numbers: The block numbers that belong there.
    """

    begins: list[int]
    places: list[int]
    numbers: list[int]


class BlockTables:
    """A row of block numbers per sequence; only new numbers are sent. Not thread-safe.

    Args:
        max_seqs: Sequences of a step at most.
        max_blocks: Blocks of a sequence; rows become longer when one has more.
        device: Where the buffer is.

    Attributes:
        buffer: ``[(max_seqs + 1) · row length]`` int32 on the device. Place 0 is read by nobody.
        epoch: Moves with the buffer's address.
    """

    def __init__(self, max_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.epoch = 0
        self._max_seqs = max_seqs
        self._device = device
        self._make(max_blocks)

    def _make(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        size = (self._max_seqs + 1) * max_blocks
        self.buffer = torch.zeros(size, dtype=torch.int32, device=self._device)
        self.clear()

    def clear(self) -> None:
        """Take it that the device knows nothing: a step that was to send something has failed."""
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
        """Find what must be sent for a step; from then on it counts as sent."""
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
            places: ``[updates]`` int64 on the device; 0 for what is to be written nowhere.
            numbers: ``[updates]`` int32 on the device.
        """
        self.buffer.index_copy_(0, places, numbers)

    def write_at_once(self, updates: BlockUpdates) -> None:
        """Write updates that are too many for a step's tables."""
        places = upload(torch.tensor(updates.places), self._device)
        numbers = upload(torch.tensor(updates.numbers, dtype=torch.int32), self._device)
        self.write(places, numbers)

    def _assign(self, sequence: Sequence, step: SequenceOf[Sequence]) -> _Row:
        """Give a sequence an empty row: its own, a free one, or that of one not in the step."""
        self.forget(sequence)
        if not self._free:
            needed = set(step)
            self.forget(next(other for other in self._rows if other not in needed))
        row = _Row(self._free.pop(), sequence.blocks)
        self._rows[sequence] = row
        return row
