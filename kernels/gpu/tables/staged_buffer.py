"""Data that a step brings to the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Start copying a host tensor to the device.

    The pinned copy that the transfer reads is kept by torch's host allocator until it is over.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class StagedBuffer:
    """A device buffer of fixed address, filled by one asynchronous copy a step.

    Not thread-safe.

    Attributes:
        buffer: ``[capacity]`` on the device.
    """

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.buffer = torch.zeros(capacity, dtype=dtype, device=device)
        pinned = device.type == "cuda"
        # Two, so that a copy still under way is not overwritten by the next step's preparation.
        self._staging = [torch.zeros(capacity, dtype=dtype, pin_memory=pinned) for _ in range(2)]
        self._step = 0

    def load(self, words: Sequence[int]) -> None:
        """Start copying ``words`` to the front of the buffer; the rest keeps what it held.

        Raises:
            ValueError: More words than the capacity.
        """
        staging = self._staging[self._step % 2]
        self._step += 1
        size = len(words)
        if size > staging.numel():
            raise ValueError(f"the step needs {size} words; {staging.numel()} are allocated")
        staging[:size] = torch.tensor(words, dtype=staging.dtype)
        self.buffer[:size].copy_(staging[:size], non_blocking=True)
