"""Copies of adapters to the device, which run concurrently with the steps.

A thread copies adapters into pinned memory, which is allocated once, and from there to the device
on a separate stream. The stream of the steps waits for an adapter's copy, by an event, only when a
step first uses the adapter.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from turret.kernels.gpu.tables import has_streams
from turret.server.adapters.operators.adapter_operators import AdapterOperators


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The stream for all work that runs concurrently with the steps.

    There is only one, because torch hands out 32 streams per priority and then reuses them, and
    because libraries and torch's allocator keep memory for every stream.
    """
    return torch.cuda.Stream(device)


class StepStream:
    """The stream of the engine's steps. Nothing else is on it, so nothing else delays steps.

    Args:
        device: The device of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        # High priority: steps precede concurrent work when both need the device.
        self._stream = torch.cuda.Stream(device, priority=-1) if has_streams(device) else None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run the thread's work on this stream, after all work on the thread's own stream."""
        if self._stream is None:
            yield
            return
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            yield
        before.wait_stream(self._stream)


@contextlib.contextmanager
def beside_steps(device: torch.device) -> Iterator[None]:
    """Run the calling thread's work on a separate stream, after all work on the default stream.

    Such work reads weights that were computed on the default stream, and nothing that the steps
    write on their own stream. When the block ends, the work has finished.
    """
    if not has_streams(device):
        yield
        return
    stream = _beside(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def empty_cache(device: torch.device) -> None:
    """Give back the memory that torch's allocator holds in reserve.

    After a failed capture, torch 2.11 and 2.12.0 raise an error here, which is ignored.
    """
    if has_streams(device):
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


# Tensors that are adjacent or evenly spaced in memory are copied as one.

_ALIGNMENT = 16
# Maximum gap between neighbouring tensors in a block, because groups of tensors begin on cache
# lines.
_MAX_GAP_BYTES = 64


def by_layers(found: Iterable[tuple[int, torch.Tensor]]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Join the tensors of an adapter's layers that are adjacent in memory.

    All tensors of an adapter are in one block of memory, with tensors of equal shape side by side
    (``lowering.py``). This function therefore usually yields only one piece, which a single copy
    moves to the device.

    Args:
        found: Ascending layers, and a tensor of each.

    Yields:
        Layers, and their tensors, ``[layers, …]``, as a view of the same memory.
    """
    run: list[tuple[int, torch.Tensor]] = []
    for layer, tensor in found:
        if run and not _continues(run, layer, tensor):
            yield _joined(run)
            run = []
        run.append((layer, tensor))
    if run:
        yield _joined(run)


def _continues(run: list[tuple[int, torch.Tensor]], layer: int, tensor: torch.Tensor) -> bool:
    last_layer, last = run[-1]
    alike = (
        layer == last_layer + 1
        and tensor.shape == last.shape
        and tensor.dtype == last.dtype
        and tensor.is_contiguous()
        and last.is_contiguous()
        and _memory(tensor) == _memory(last) != 0
    )
    step = tensor.storage_offset() - last.storage_offset()
    return alike and step > 0 and all(step == _step(pair) for pair in pairwise(run[-2:]))


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _step(pair: tuple[tuple[int, torch.Tensor], tuple[int, torch.Tensor]]) -> int:
    (_, first), (_, second) = pair
    return int(second.storage_offset()) - int(first.storage_offset())


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole memory of a tensor's storage."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def apart(
    found: Iterable[tuple[int, torch.Tensor]],
    kept: list[torch.Tensor],
    device: torch.device,
    laid: Callable[[torch.Tensor], torch.Tensor] = lambda stack: stack,
) -> list[int]:
    """Copy tensors of several layers, a few at a time, to separate, aligned memory.

    Args:
        found: Ascending layers, and a tensor of each.
        kept: The list to which the copies are added.
        device: The device of the copies.
        laid: Converts the tensors of some layers, ``[layers, …]``, to the tensor to copy.

    Returns:
        The address of each copy.
    """
    places: list[int] = []
    for _, stack in by_layers(found):
        values = laid(stack).flatten(1)
        size, item = values.shape[1], values.itemsize
        step = aligned(size * item)
        own = torch.empty(len(values), step // item, dtype=values.dtype, device=device)
        own[:, :size] = values
        kept.append(own)
        places += range(own.data_ptr(), own.data_ptr() + len(values) * step, step)
    return places


def aligned(num_bytes: int) -> int:
    """The number of bytes that a tensor takes after ``apart``."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _joined(run: list[tuple[int, torch.Tensor]]) -> tuple[slice, torch.Tensor]:
    layer, first = run[0]
    step = _step((run[0], run[1])) if len(run) > 1 else first.numel()
    shape = (len(run), *first.shape)
    return slice(layer, layer + len(run)), first.as_strided(shape, (step, *first.stride()))


def blocks_of(
    tensors: Sequence[torch.Tensor],
) -> tuple[list[tuple[torch.Tensor, int]], list[int], int]:
    """The host memory of some tensors, for copying it elsewhere in few copies.

    Args:
        tensors: Contiguous tensors.

    Returns:
        Blocks of that memory, ``[bytes]`` uint8, with the target offset of each; the target offset
        of each tensor, with the same alignment as in host memory; and the total number of bytes.
    """
    offsets = [0] * len(tensors)
    blocks: list[tuple[torch.Tensor, int]] = []
    start = begin = end = 0
    for number in sorted(range(len(tensors)), key=lambda number: tensors[number].data_ptr()):
        tensor = tensors[number]
        if not tensor.numel():
            continue
        place, memory = tensor.data_ptr(), _memory(tensor)
        if not blocks or _memory(blocks[-1][0]) != memory or place > end + _MAX_GAP_BYTES:
            start = aligned(start + end - begin)
            begin = max(memory, place - place % _ALIGNMENT)
            end = begin
        else:
            blocks.pop()
        end = max(end, place + tensor.nbytes)
        offsets[number] = start + place - begin
        blocks.append((_bytes_of(tensor)[begin - memory : end - memory], start))
    return blocks, offsets, start + end - begin


_CHUNK_BYTES = 16 << 20
_NUM_CHUNKS = 8
# The longest time that a request waits for a copy that is made while other steps run. After that,
# its own step makes the copy.
_PATIENCE_SECONDS = 1.0


class PinnedRing:
    """Pinned memory in chunks, each of which is reused after its content has been copied.

    Args:
        device: The target of the copies.
        chunk_bytes: Size of a chunk, a multiple of 16.
        num_chunks: The number of chunks.
    """

    def __init__(
        self, device: torch.device, chunk_bytes: int = _CHUNK_BYTES, num_chunks: int = _NUM_CHUNKS
    ) -> None:
        size = (num_chunks, chunk_bytes)
        self._chunks = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._events = [torch.cuda.Event() for _ in range(num_chunks)]
        self._next = 0

    def copy(self, data: torch.Tensor, target: torch.Tensor) -> None:
        """Start copying host memory to the device, on the current stream.

        Args:
            data: ``[n]`` uint8.
            target: ``[n]`` uint8 on the device.
        """
        for begin in range(0, len(data), self._chunks.shape[1]):
            part = data[begin : begin + self._chunks.shape[1]]
            chunk, event = self._chunks[self._next][: len(part)], self._events[self._next]
            # Wait until the chunk's previous content has reached the device.
            event.synchronize()
            chunk.copy_(part)
            target[begin : begin + len(part)].copy_(chunk, non_blocking=True)
            event.record(torch.cuda.current_stream())
            self._next = (self._next + 1) % len(self._events)


@dataclass(frozen=True, slots=True)
class _Arriving:
    """An adapter's operators in separate device memory.

    Attributes:
        operators: Views of ``memory``.
        memory: The memory that holds the operators.
        arrived: The event that marks the end of the copy.
    """

    operators: AdapterOperators
    memory: torch.Tensor
    arrived: torch.cuda.Event


@dataclass(frozen=True, slots=True)
class _Staged:
    """An adapter for which a request waits.

    Attributes:
        copying: Completes when the adapter's copy is queued on the stream; fails if there is no
            memory.
        num_bytes: Bytes that the adapter takes on the device.
        since: When the request asked for the adapter, in seconds.
    """

    copying: Future[_Arriving]
    num_bytes: int
    since: float


# Runs a function on a background thread, one at a time.
Submit = Callable[[Callable[[], _Arriving]], Future[_Arriving]]


class Uploads:
    """Copies adapters to the device ahead of their first step. Only one thread may call it.

    Args:
        device: The target device.
        max_bytes: The maximum total size of copies that no step has used yet, or that steps on the
            device may still read.
        clock: The time in seconds; tests replace it.
        ring: The pinned memory, made at the first upload if None.
        submit: Starts work on the upload thread; tests replace it.
    """

    def __init__(
        self,
        device: torch.device,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        ring: PinnedRing | None = None,
        submit: Submit | None = None,
    ) -> None:
        self._device = device
        self._max_bytes = max_bytes
        self._clock = clock
        self._ring = ring
        self._submit = submit
        # An adapter that was not announced is copied on the thread of the step that needs it, so
        # copies need a lock.
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device) if has_streams(device) else None
        self._staged: dict[str, _Staged] = {}
        # Memory from which queued steps may still copy; kept until its event has passed.
        self._leaving: list[tuple[torch.cuda.Event | None, torch.Tensor]] = []

    def is_near(self, key: str, operators: AdapterOperators) -> bool:
        """Whether a step need not wait for an adapter's copy; starts the copy if it is missing.

        The caller asks repeatedly while other requests run. The answer is False for at most a
        second.
        """
        if self._stream is None:
            return True
        staged = self._staged.get(key)
        if staged is None:
            return not self._begin(key, operators)
        if not staged.copying.done():
            return self._clock() - staged.since > _PATIENCE_SECONDS
        if staged.copying.exception() is not None:
            # The background copy failed. Let the adapter's step try: it can make room, or report
            # the error.
            self.drop(key)
            return True
        is_late = self._clock() - staged.since > _PATIENCE_SECONDS
        return is_late or staged.copying.result().arrived.query()

    def take(self, key: str, operators: AdapterOperators) -> AdapterOperators:
        """An adapter's operators on the device, for later work on the current stream.

        The soft prompt stays in host memory. An adapter that was not announced and for which there
        is no room is also returned in host memory, and is copied later while the step waits.

        Raises:
            torch.OutOfMemoryError: There is no memory for the operators.
        """
        is_there = all(tensor.device == self._device for tensor in _tensors(operators))
        if is_there and key not in self._staged:
            return operators
        if self._stream is None:
            plan = _Plan(operators)
            memory = torch.empty(plan.num_bytes, dtype=torch.uint8)
            for block, begin in plan.blocks:
                memory[begin : begin + len(block)] = block
            return plan.moved(memory.to(self._device, non_blocking=True))
        staged = self._staged.pop(key, None)
        if staged is not None:
            arriving = staged.copying.result()
        else:
            plan = _Plan(operators)
            if self._held() + plan.num_bytes > self._max_bytes:
                return operators
            arriving = self._copy(plan)
        torch.cuda.current_stream().wait_event(arriving.arrived)
        self._leaving.append((None, arriving.memory))
        return arriving.operators

    def taken(self) -> None:
        """Free the memory of used adapters once the current stream has reached this point."""
        if self._stream is None:
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream())
        self._leaving = [(known or event, memory) for known, memory in self._leaving]

    def drop(self, key: str) -> None:
        """Forget a removed adapter."""
        self._staged.pop(key, None)

    def _begin(self, key: str, operators: AdapterOperators) -> bool:
        """Start copying an adapter; returns False if there is no room for the copy."""
        plan = _Plan(operators)
        self._forget_unused()
        if self._held() + plan.num_bytes > self._max_bytes:
            return False
        copying = self._run(lambda: self._copy(plan))
        self._staged[key] = _Staged(copying, plan.num_bytes, self._clock())
        return True

    def _held(self) -> int:
        """Bytes that copies take on the device."""
        self._leaving = [one for one in self._leaving if not (one[0] and one[0].query())]
        used = sum(memory.nbytes for _, memory in self._leaving)
        return used + sum(staged.num_bytes for staged in self._staged.values())

    def _run(self, copy: Callable[[], _Arriving]) -> Future[_Arriving]:
        if self._submit is None:
            self._submit = ThreadPoolExecutor(1, "adapter-upload").submit
        return self._submit(copy)

    def _copy(self, plan: _Plan) -> _Arriving:
        """Queues an adapter's copy, on the upload thread or on the thread of a step that waits."""
        stream = self._stream
        assert stream is not None
        with self._lock, torch.cuda.stream(stream):
            if self._ring is None:
                self._ring = PinnedRing(self._device)
            memory = torch.empty(plan.num_bytes, dtype=torch.uint8, device=self._device)
            for block, begin in plan.blocks:
                self._ring.copy(block, memory[begin : begin + len(block)])
            arrived = torch.cuda.Event()
            arrived.record(stream)
        return _Arriving(plan.moved(memory), memory, arrived)

    def _forget_unused(self) -> None:
        """Drops unused copies, whose requests did not return or ran without them."""
        now = self._clock()
        for key, staged in list(self._staged.items()):
            if now - staged.since > 2 * _PATIENCE_SECONDS:
                self.drop(key)


class _Plan:
    """The plan for copying an adapter to the device.

    Attributes:
        blocks: The host memory of the adapter, ``[bytes]`` uint8 each, with target offsets.
        num_bytes: Bytes that the adapter takes on the device.
    """

    def __init__(self, operators: AdapterOperators) -> None:
        self._operators = operators
        self._tensors = [tensor.contiguous() for tensor in _tensors(operators)]
        self.blocks, self._offsets, self.num_bytes = blocks_of(self._tensors)

    def moved(self, memory: torch.Tensor) -> AdapterOperators:
        """The operators on ``memory``, ``[num_bytes]`` uint8, once the blocks are there."""
        operators = self._operators
        moved = (
            memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for offset, tensor in zip(self._offsets, self._tensors, strict=True)
        )
        modules = {name: part.with_tensors(moved) for name, part in operators.modules.items()}
        experts = None
        if operators.experts is not None:
            experts = {name: part.with_tensors(moved) for name, part in operators.experts.items()}
        router = None if operators.router is None else operators.router.with_tensors(moved)
        return replace(operators, modules=modules, experts=experts, router=router)


def _tensors(operators: AdapterOperators) -> list[torch.Tensor]:
    parts = (*operators.modules.values(), *(operators.experts or {}).values())
    found = [tensor for part in parts for tensor in part.tensors()]
    return found if operators.router is None else [*found, *operators.router.tensors()]
