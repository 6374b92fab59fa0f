"""Rows that use tables by slot (Hadamard, Kronecker, fusion), on the device.

One int32 buffer of fixed address: a step costs one asynchronous copy, and a captured CUDA graph
replays with any later step, because kernels read the count from it::

    count · 0 · 0 · 0 | rows [capacity] | slots [capacity] | weights [capacity] (fp32 bits)
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

HEADER = 4


class RowTable:
    """Owns the device buffer. Not thread-safe.

    Attributes:
        buffer: ``[HEADER + 3 · capacity]`` int32 on the device; its address never changes.
        capacity: Rows at most.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        size = HEADER + 3 * capacity
        self.buffer = torch.zeros(size, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        # Two, so that a copy still under way is not overwritten by the next step's preparation.
        self._staging = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._step = 0

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
        staging = self._staging[self._step % 2]
        self._step += 1
        n = len(rows)
        bits = struct.unpack(f"<{n}i", struct.pack(f"<{n}f", *weights))
        staging[0] = n
        for part, values in enumerate((rows, slots, bits)):
            start = HEADER + part * self.capacity
            staging[start : start + n] = torch.tensor(list(values), dtype=torch.int32)
        self.buffer.copy_(staging, non_blocking=True)
