"""Copies of adapters to a device that executes everything as late as its streams allow."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fake_cuda import FakeCuda

from turret.server.adapters.device import gpu_uploads as uploads_module
from turret.server.adapters.device.gpu_uploads import PinnedRing, Uploads, blocks_of
from turret.server.adapters.lowering import in_one_block
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.low_rank import LowRank

CPU = torch.device("cpu")


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    fake = FakeCuda()
    with fake.installed(), patch.object(uploads_module, "has_streams", lambda device: True):
        yield fake


def operators(seed: int, rank: int = 5) -> AdapterOperators:
    torch.manual_seed(seed)

    def module(width: int) -> ModuleOperators:
        factors = LowRank(torch.randn(rank, width).half(), torch.randn(rank, 7).half())
        return ModuleOperators(factors, gain=torch.randn(width))

    return AdapterOperators({f"{width}": module(width) for width in (3, 16, 33, 40)})


def tensors(of: AdapterOperators) -> list[torch.Tensor]:
    return [tensor for module in of.modules.values() for tensor in module.tensors()]


class Thread:
    """Replaces the copying thread: it works at once, or only on request."""

    is_late = False

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def __call__(self, copy: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(copy())
            except torch.OutOfMemoryError as error:
                future.set_exception(error)

        self._waiting.append(run)
        if not self.is_late:
            self.work()
        return future

    def work(self) -> None:
        while self._waiting:
            self._waiting.pop(0)()


def uploads(
    max_bytes: int = 1 << 16, clock: _Clock | None = None, thread: Thread | None = None
) -> Uploads:
    """Uploads with a ring that is smaller than an adapter."""
    ring = PinnedRing(CPU, chunk_bytes=64, num_chunks=3)
    return Uploads(CPU, max_bytes, clock or _Clock(), ring, thread or Thread())


@pytest.mark.parametrize("thread", [Thread(), None], ids=["at once", "real thread"])
def test_the_first_use_comes_after_the_copy(cuda: FakeCuda, thread: Thread | None):
    ring = PinnedRing(CPU, chunk_bytes=64, num_chunks=3)
    held = Uploads(CPU, 1 << 16, _Clock(), ring, thread)
    wanted = [operators(seed) for seed in range(4)]
    for number, adapter in enumerate(wanted):
        assert not held.is_near(f"{number}", adapter)
    used: list[torch.Tensor] = []
    for number, adapter in enumerate(wanted):
        taken = tensors(held.take(f"{number}", adapter))
        cuda.launch(lambda taken=taken: used.extend(t.clone() for t in taken))
        held.taken()
    cuda.default.synchronize()
    expected = [tensor for adapter in wanted for tensor in tensors(adapter)]
    assert len(used) == len(expected)
    for one, two in zip(used, expected, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


def test_an_adapter_is_ready_once_its_copy_ends_or_a_second_has_passed(cuda: FakeCuda):
    clock = _Clock()
    held = uploads(clock=clock)
    for _ in range(2):
        assert not held.is_near("a", operators(0))
    assert held._stream is not None
    held._stream.synchronize()
    assert held.is_near("a", operators(0))
    assert not held.is_near("b", operators(1))
    clock.now = 1.1
    assert held.is_near("b", operators(1))


def test_uploads_that_do_not_fit_are_not_awaited_and_unused_ones_are_dropped(cuda: FakeCuda):
    clock = _Clock()
    size = sum(-(-t.nbytes // 16) * 16 for t in tensors(operators(0)))
    held = uploads(2 * size, clock)
    assert held.is_near("large", operators(0, rank=50))
    assert not held.is_near("a", operators(0))
    assert not held.is_near("b", operators(1))
    assert held.is_near("c", operators(2))
    held.drop("b")
    assert not held.is_near("c", operators(2))
    clock.now = 5.0
    assert not held.is_near("d", operators(3))
    assert set(held._staged) == {"d"}


def test_without_device_memory_the_step_copies_the_adapter(cuda: FakeCuda):
    held = uploads()
    full = torch.OutOfMemoryError("CUDA out of memory")
    with patch.object(Uploads, "_copy", side_effect=full):
        assert not held.is_near("a", operators(0))
        assert held.is_near("a", operators(0))
        assert not held.is_near("b", operators(1))
        with pytest.raises(torch.OutOfMemoryError):
            held.take("b", operators(1))
    assert not held.is_near("a", operators(0))
    assert held._staged.keys() == {"a"}


def test_steps_continue_while_the_thread_copies(cuda: FakeCuda):
    """Only a step that needs an adapter without a started copy waits for the thread."""
    clock, thread = _Clock(), Thread()
    thread.is_late = True
    held = uploads(clock=clock, thread=thread)
    assert not held.is_near("a", operators(0))
    assert not held.is_near("a", operators(0))
    assert not held._staged["a"].copying.done()
    clock.now = 1.1
    assert held.is_near("a", operators(0))
    thread.work()
    taken = tensors(held.take("a", operators(0)))
    cuda.default.synchronize()
    held.taken()
    for found, expected in zip(taken, tensors(operators(0)), strict=True):
        assert torch.equal(found, expected)


def test_an_adapter_in_one_block_takes_few_copies(cuda: FakeCuda):
    """The adapter comes from ``in_one_block``: it is one range of memory, also on the device."""
    modules, _ = in_one_block(operators(3).modules)
    held = Uploads(CPU, 1 << 16, _Clock(), PinnedRing(CPU, chunk_bytes=1 << 14), Thread())
    before = len(cuda.default.pending)
    assert not held.is_near("a", AdapterOperators(modules))
    stream: Any = held._stream
    # The copy, its event in the ring, and the event of its arrival.
    assert len(stream.pending) == 3
    taken = held.take("a", AdapterOperators(modules))
    cuda.default.synchronize()
    assert len(cuda.default.pending) == before
    for found, expected in zip(tensors(taken), tensors(operators(3)), strict=True):
        assert torch.equal(found, expected)
        assert found.data_ptr() % found.itemsize == 0


def test_memory_that_steps_read_outlives_them(cuda: FakeCuda):
    held = uploads()
    for number in range(3):
        held.is_near(f"{number}", operators(number))
        held.take(f"{number}", operators(number))
        cuda.launch(lambda: None)
        held.taken()
    assert len(held._leaving) == 3
    cuda.default.synchronize()
    held.is_near("last", operators(9))
    held.take("last", operators(9))
    held.taken()
    assert len(held._leaving) == 1


def test_without_streams_an_adapter_takes_one_copy():
    held = Uploads(torch.device("meta"), 1 << 16)
    assert held.is_near("a", operators(0))
    taken = tensors(held.take("a", operators(0)))
    assert {t.device.type for t in taken} == {"meta"}
    assert [t.shape for t in taken] == [t.shape for t in tensors(operators(0))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_real_copies_beside_a_busy_stream():
    """Many adapters pass through a small ring while the stream of the steps multiplies."""
    device = torch.device("cuda", 0)
    busy = torch.randn(2048, 2048, device=device)
    held = Uploads(device, 1 << 20, ring=PinnedRing(device, chunk_bytes=256, num_chunks=3))
    wanted = [operators(seed) for seed in range(40)]
    used = []
    for number, adapter in enumerate(wanted):
        held.is_near(f"{number}", adapter)
        for _ in range(10):
            busy = (busy @ busy).clamp(-1.0, 1.0)
        used.append([t.clone() for t in tensors(held.take(f"{number}", adapter))])
        held.taken()
    for found, adapter in zip(used, wanted, strict=True):
        for one, two in zip(found, tensors(adapter), strict=True):
            assert torch.equal(one.cpu(), two)


# Tensors that are evenly spaced in memory form one piece.


def test_blocks_keep_the_content_and_alignment_of_every_tensor():
    chance = random.Random(0)
    for _ in range(50):
        memory = [torch.randn(4096).view(torch.uint8) for _ in range(3)]
        tensors = [torch.empty(0, 4)]
        for _ in range(chance.randint(0, 30)):
            dtype = chance.choice([torch.float32, torch.bfloat16, torch.uint8, torch.int64])
            count = chance.randint(1, 99)
            size = count * dtype.itemsize
            begin = chance.randrange(0, 16384 - size) // dtype.itemsize * dtype.itemsize
            tensors.append(chance.choice(memory)[begin : begin + size].view(dtype))
        blocks, offsets, num_bytes = blocks_of(tensors)
        copied = torch.zeros(num_bytes, dtype=torch.uint8)
        ends = [0]
        for block, begin in blocks:
            assert begin % 16 == 0
            assert begin >= ends[-1], "blocks do not overlap"
            copied[begin : begin + len(block)] = block
            ends.append(begin + len(block))
        for tensor, offset in zip(tensors, offsets, strict=True):
            found = copied[offset : offset + tensor.nbytes].view(tensor.dtype)
            assert found.view(torch.uint8).equal(tensor.flatten().view(torch.uint8))
        assert sum(len(block) for block, _ in blocks) <= 3 * 16384
