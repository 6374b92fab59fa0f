"""How each row's next token is drawn, on the device, in one buffer of fixed address.

row   uniform · temperature · top_p · max_distance · top_k · 0 · 0 · 0        (all fp32)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.kernels.gpu.tables.staged_buffer import StagedMemory, host_tensor

ROW = 8


class SamplingTable:
    """Owns its part of the device memory. Not thread-safe.

    Attributes:
        buffer: ``[max_rows, ROW]`` fp32 on the device; its address never changes.
    """

    def __init__(
        self, max_rows: int, device: torch.device, memory: StagedMemory | None = None
    ) -> None:
        """Allocate, inside ``memory`` if it is given."""
        memory = StagedMemory(device, 0) if memory is None else memory
        self._memory = memory
        self._part = memory.part(max_rows * ROW, torch.float32)
        self.buffer = self._part.buffer.view(max_rows, ROW)

    def load(self, numbers: Sequence[float]) -> None:
        """Say how the first rows are drawn; all others draw the likeliest token.

        Args:
            numbers: One behind the other five of each row: a uniform number in [0, 1), the
                temperature (0 draws the likeliest), top-p (1: off), how far a token may be behind
                the likeliest in scaled logits (infinity: off), top-k (0: off).

        Raises:
            ValueError: More rows than there are.
        """
        rows = host_tensor(numbers, torch.float32).view(len(numbers) // 5, 5)
        if len(rows) > len(self.buffer):
            raise ValueError(f"{len(rows)} rows are drawn; {len(self.buffer)} are allocated")
        with self._memory.step():
            staged = self._part.staged(self.buffer.numel()).view(-1, ROW)
            staged.zero_()
            staged[: len(rows), :5] = rows
