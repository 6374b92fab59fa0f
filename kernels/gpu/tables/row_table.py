"""Rows that use tables by slot (Hadamard, Kronecker, fusion), on the device.

One int32 buffer of fixed address: a step costs one asynchronous copy, and a captured CUDA graph
replays with any later step, because kernels read the count from it::

    count · 0 · 0 · 0 | rows [capacity] | slots [capacity] | weights [capacity] (fp32 bits)
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from turret.kernels.gpu.tables.staged_buffer import StagedMemory

HEADER = 4


class RowTable:
    """Owns its part of the device memory. Not thread-safe.

    Attributes:
        buffer: ``[HEADER + 3 · capacity]`` int32 on the device; its address never changes.
        capacity: Rows at most.
    """

    def __init__(
        self, capacity: int, device: torch.device, memory: StagedMemory | None = None
    ) -> None:
        """Allocate, inside ``memory`` if it is given."""
        self.capacity = capacity
        memory = StagedMemory(device, 0) if memory is None else memory
        self._part = memory.part(HEADER + 3 * capacity, torch.int32)
        self.buffer = self._part.buffer

    def load(self, rows: Sequence[int], slots: Sequence[int], weights: Sequence[float]) -> None:
        """Name the step's rows (each at most once), their slots and mix weights.

        Raises:
            ValueError: More rows than the capacity, or the lengths differ.
        """
        if not len(rows) == len(slots) == len(weights) <= self.capacity:
            raise ValueError(
                f"{len(rows)} rows, {len(slots)} slots, {len(weights)} weights; "
                f"{self.capacity} rows are allocated"
            )
        padding = [0] * (self.capacity - len(rows))
        bits = struct.unpack(f"<{len(rows)}i", struct.pack(f"<{len(rows)}f", *weights))
        header = (len(rows), 0, 0, 0)
        self._part.load((*header, *rows, *padding, *slots, *padding, *bits))
