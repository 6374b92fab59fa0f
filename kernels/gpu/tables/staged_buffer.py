"""Data that a step brings to the device, without waiting for it."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Sequence

import torch

# Parts of the memory begin at multiples of this, so that kernels can read wide words.
_ALIGNMENT = 256
_CHUNK_BYTES = 1 << 18
# Loaded parts are copied together if no gap between them is larger than this.
_MAX_GAP_BYTES = 1 << 16


def has_streams(device: torch.device) -> bool:
    """Whether a device works asynchronously to the host."""
    return device.type == "cuda"


_CODES = {torch.int32: "i", torch.int64: "q", torch.float32: "f"}


def host_tensor(values: Sequence[int] | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """``[len(values)]`` on the host, for int32, int64 and fp32; a step makes many of them.

    ``torch.tensor`` takes several times as long.
    """
    if not values:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(array(_CODES[dtype], values), dtype=dtype)


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Start copying a host tensor to the device.

    The pinned copy that the transfer reads is kept by torch's host allocator until it is over.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class _Chunk:
    """Device memory, and pinned memory of the same layout for each of two steps.

    Attributes:
        used: Bytes that parts take.
        loaded: Begin and end of what the step at hand has written, in bytes.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.staging = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)
        ]
        self.used = 0
        self.loaded: list[tuple[int, int]] = []

    def send(self, half: int) -> int:
        """Start copying what was loaded; gaps between are copied too, but never read.

        Returns:
            How many copies that took.
        """
        runs: list[list[int]] = []
        for begin, end in sorted(self.loaded):
            if runs and begin - runs[-1][1] <= _MAX_GAP_BYTES:
                runs[-1][1] = max(runs[-1][1], end)
            else:
                runs.append([begin, end])
        for begin, end in runs:
            self.memory[begin:end].copy_(self.staging[half][begin:end], non_blocking=True)
        self.loaded.clear()
        return len(runs)


class StagedMemory:
    """Device buffers of fixed addresses that a step fills together: by one copy, as a rule.

    A step calls ``begin``, loads parts, and calls ``send``. There are two staging areas, so that
    the next step can be prepared while this one's copy is under way; ``begin`` waits for the copy
    of the step before the last, which read the same area. A part holds what it was given in the
    last step that loaded any part of its memory, or nothing that may be read.

    Not thread-safe.

    Args:
        device: Where the buffers are.
        chunk_bytes: Parts share allocations of at least this.

    Attributes:
        num_copies: Copies started since it was made.
    """

    def __init__(self, device: torch.device, chunk_bytes: int = _CHUNK_BYTES) -> None:
        self.num_copies = 0
        self._device = device
        self._chunk_bytes = chunk_bytes
        self._chunks: list[_Chunk] = []
        self._half = 0
        self._is_open = False
        self._events = [torch.cuda.Event() for _ in range(2)] if has_streams(device) else []

    def part(self, count: int, dtype: torch.dtype) -> StagedPart:
        """Reserve a buffer of ``count`` elements. Its address never changes."""
        size = count * dtype.itemsize
        chunk = next((c for c in self._chunks if c.used + size <= c.memory.numel()), None)
        if chunk is None:
            chunk = _Chunk(max(size, self._chunk_bytes), self._device)
            self._chunks.append(chunk)
        begin = chunk.used
        chunk.used = -(-(begin + size) // _ALIGNMENT) * _ALIGNMENT
        return StagedPart(self, chunk, begin, count, dtype)

    def begin(self) -> None:
        """Begin a step; waits until its staging area was copied."""
        self._half = 1 - self._half
        if self._events:
            self._events[self._half].synchronize()
        self._is_open = True

    def staging_of(self, halves: Sequence[torch.Tensor]) -> torch.Tensor:
        """Which of the two staging areas the open step writes to."""
        assert self._is_open, "outside a step the device may be reading it"
        return halves[self._half]

    def send(self) -> None:
        """Start the step's copies, on the current stream."""
        for chunk in self._chunks:
            self.num_copies += chunk.send(self._half)
        if self._events:
            self._events[self._half].record(torch.cuda.current_stream())
        self._is_open = False

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Run the block between ``begin`` and ``send``, or within the open step if there is one."""
        if self._is_open:
            yield
            return
        self.begin()
        try:
            yield
        finally:
            self.send()


class StagedPart:
    """A buffer in a ``StagedMemory``.

    Attributes:
        buffer: ``[count]`` on the device; its address never changes.
    """

    def __init__(
        self, memory: StagedMemory, chunk: _Chunk, begin: int, count: int, dtype: torch.dtype
    ) -> None:
        self._memory = memory
        self._chunk = chunk
        self._begin = begin
        self._item_bytes = dtype.itemsize
        where = slice(begin, begin + count * dtype.itemsize)
        self.buffer = chunk.memory[where].view(dtype)
        self._staging = [staging[where].view(dtype) for staging in chunk.staging]

    def load(self, words: Sequence[int]) -> None:
        """Write to the front of the buffer; the rest holds nothing that may be read.

        It is on its way with the step's ``send``, or at once where no step is open.

        Raises:
            ValueError: More elements than the buffer has.
        """
        size = len(words)
        with self._memory.step():
            self.staged(size).copy_(host_tensor(words, self.buffer.dtype))

    def staged(self, size: int) -> torch.Tensor:
        """The front of the open step's staging area, to be written to.

        Raises:
            ValueError: More elements than the buffer has.
        """
        if size > self.buffer.numel():
            raise ValueError(f"the step needs {size} words; {self.buffer.numel()} are allocated")
        self._chunk.loaded.append((self._begin, self._begin + size * self._item_bytes))
        return self._memory.staging_of(self._staging)[:size]
