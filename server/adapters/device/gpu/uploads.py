"""Adapters on their way to the device, beside the steps that run meanwhile.

Copies run on a stream of their own, out of pinned memory that is allocated once; the stream of the
steps waits for them by an event, at the first use and no sooner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from turret.kernels.gpu.tables.staged_buffer import has_streams
from turret.server.adapters.operators.adapter_operators import AdapterOperators

# Every tensor in a transfer begins at a multiple of this: a view needs its dtype's alignment.
_ALIGNMENT = 16
_CHUNK_BYTES = 16 << 20
_NUM_CHUNKS = 8
# A request does not wait longer than this for a copy beside other steps; its step makes it then.
_PATIENCE_SECONDS = 1.0


class PinnedRing:
    """Pinned memory in chunks, each written again once it has been copied.

    Args:
        device: Where copies go.
        chunk_bytes: Size of a chunk, a multiple of 16.
        num_chunks: How many there are.
    """

    def __init__(
        self, device: torch.device, chunk_bytes: int = _CHUNK_BYTES, num_chunks: int = _NUM_CHUNKS
    ) -> None:
        size = (num_chunks, chunk_bytes)
        self._chunks = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._events = [torch.cuda.Event() for _ in range(num_chunks)]
        self._next = 0

    def copy(self, tensors: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        """Start copying host tensors to the device, on the current stream.

        Args:
            tensors: They go one behind the other, each to a multiple of 16 bytes (``_layout``).
            target: ``[at least the end of the last]`` uint8 on the device.
        """
        begin = used = 0
        for tensor in tensors:
            data = tensor.contiguous().view(-1).view(torch.uint8)
            while data.numel():
                if used == 0:
                    # Until what it held last has been copied.
                    self._events[self._next].synchronize()
                chunk = self._chunks[self._next]
                size = min(data.numel(), len(chunk) - used)
                chunk[used : used + size].copy_(data[:size])
                data, used = data[size:], used + size
                if used == len(chunk):
                    begin, used = begin + used, self._send(used, target[begin:])
            # A chunk ends at a multiple too: padding crosses no boundary.
            used += -used % _ALIGNMENT
            if used == self._chunks.shape[1]:
                begin, used = begin + used, self._send(used, target[begin:])
        if used:
            self._send(used, target[begin:])

    def _send(self, size: int, target: torch.Tensor) -> int:
        """Copy the chunk at hand and turn to the next, of which nothing is used."""
        size = min(size, target.numel())
        target[:size].copy_(self._chunks[self._next][:size], non_blocking=True)
        self._events[self._next].record(torch.cuda.current_stream())
        self._next = (self._next + 1) % len(self._events)
        return 0


@dataclass(frozen=True, slots=True)
class _Staged:
    """An adapter's operators in device memory of their own.

    Attributes:
        operators: Views of ``memory``.
        memory: What they lie in.
        arrived: The copy is over.
        since: When it began, in seconds.
    """

    operators: AdapterOperators
    memory: torch.Tensor
    arrived: torch.cuda.Event
    since: float


class Uploads:
    """Copies adapters to the device ahead of their first step. One thread only.

    Args:
        device: Where they go.
        max_bytes: Most bytes on their way and not yet used.
        clock: Seconds; tests have their own.
        ring: The pinned memory, made at the first upload if None.
    """

    def __init__(
        self,
        device: torch.device,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        ring: PinnedRing | None = None,
    ) -> None:
        self._device = device
        self._max_bytes = max_bytes
        self._clock = clock
        self._ring = ring
        self._stream = torch.cuda.Stream(device) if has_streams(device) else None
        self._staged: dict[str, _Staged] = {}
        # What steps still copy from.
        self._leaving: list[tuple[torch.cuda.Event | None, torch.Tensor]] = []

    def is_near(self, key: str, operators: AdapterOperators) -> bool:
        """Whether an adapter has arrived, or is not worth waiting for; starts its copy if need be.

        Asked over and over while others run; False for a second at most.
        """
        if self._stream is None:
            return True
        staged = self._staged.get(key)
        if staged is not None:
            is_late = self._clock() - staged.since > _PATIENCE_SECONDS
            return is_late or staged.arrived.query()
        size = _layout(_tensors(operators))[1]
        if size > self._max_bytes:
            return True
        self._forget_unused()
        if sum(s.memory.nbytes for s in self._staged.values()) + size > self._max_bytes:
            return True
        try:
            self._staged[key] = self._start(operators)
        except torch.OutOfMemoryError:
            # The adapter's step can make room; this cannot.
            return True
        return False

    def take(self, key: str, operators: AdapterOperators) -> AdapterOperators:
        """An adapter's operators on the device, for what the current stream is given from now on.

        The soft prompt stays where it is.
        """
        tensors = _tensors(operators)
        is_there = all(tensor.device == self._device for tensor in tensors)
        if is_there and key not in self._staged:
            return operators
        if self._stream is None:
            memory = torch.empty(_layout(tensors)[1], dtype=torch.uint8)
            _fill(memory, tensors)
            return _moved(operators, memory.to(self._device, non_blocking=True))
        staged = self._staged.pop(key, None)
        if staged is None:
            staged = self._start(operators)
        current = torch.cuda.current_stream()
        current.wait_event(staged.arrived)
        self._leaving.append((None, staged.memory))
        return staged.operators

    def taken(self) -> None:
        """What was taken has been used: its memory goes when the current stream gets here."""
        if self._stream is None:
            return
        kept = [(event, memory) for event, memory in self._leaving if not (event and event.query())]
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream())
        self._leaving = [(known or event, memory) for known, memory in kept]

    def drop(self, key: str) -> None:
        """Forget an adapter that is gone."""
        self._staged.pop(key, None)

    def _start(self, operators: AdapterOperators) -> _Staged:
        assert self._stream is not None
        if self._ring is None:
            self._ring = PinnedRing(self._device)
        with torch.cuda.stream(self._stream):
            tensors = _tensors(operators)
            memory = torch.empty(_layout(tensors)[1], dtype=torch.uint8, device=self._device)
            self._ring.copy(tensors, memory)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return _Staged(_moved(operators, memory), memory, arrived, self._clock())

    def _forget_unused(self) -> None:
        """Make room: who asked for these did not come back, or ran without them."""
        now = self._clock()
        for key, staged in list(self._staged.items()):
            if now - staged.since > 2 * _PATIENCE_SECONDS:
                self.drop(key)


def _tensors(operators: AdapterOperators) -> list[torch.Tensor]:
    parts = (*operators.modules.values(), *(operators.experts or {}).values())
    found = [tensor for part in parts for tensor in part.tensors()]
    return found if operators.router is None else [*found, *operators.router.tensors()]


def _layout(tensors: list[torch.Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins, and the end of all."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _fill(memory: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    for tensor, offset in zip(tensors, _layout(tensors)[0], strict=True):
        _view(memory, offset, tensor).copy_(tensor)


def _moved(operators: AdapterOperators, memory: torch.Tensor) -> AdapterOperators:
    tensors = _tensors(operators)
    moved = (
        _view(memory, offset, tensor)
        for offset, tensor in zip(_layout(tensors)[0], tensors, strict=True)
    )
    modules = {name: part.with_tensors(moved) for name, part in operators.modules.items()}
    experts = None
    if operators.experts is not None:
        experts = {name: part.with_tensors(moved) for name, part in operators.experts.items()}
    router = None if operators.router is None else operators.router.with_tensors(moved)
    return replace(operators, modules=modules, experts=experts, router=router)


def _view(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    return buffer[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
