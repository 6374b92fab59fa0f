"""The transfers of a step to a device that is as late as its streams allow."""

from __future__ import annotations

import random
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from fake_cuda import FakeCuda

from turret.kernels.gpu import tables
from turret.kernels.gpu.tables import StagedMemory, StagedPart, host_tensor

CPU = torch.device("cpu")


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    fake = FakeCuda()
    with fake.installed(), patch.object(tables, "has_streams", lambda device: True):
        yield fake


def test_every_step_finds_its_own_data(cuda: FakeCuda):
    """The host is as far ahead as possible; parts are loaded or not, in any order."""
    memory, generator = StagedMemory(CPU, chunk_bytes=1 << 12), random.Random(1)
    parts = [memory.part(count, torch.int32) for count in (3, 700, 40, 5000, 1)]
    parts.append(memory.part(20, torch.int64))
    seen: list[tuple[int, int]] = []

    def read(part: StagedPart, size: int) -> None:
        (word,) = set(part.buffer[:size].tolist())
        seen.append((word, size))

    expected = []
    for step in range(40):
        chosen = generator.sample(range(len(parts)), generator.randint(1, len(parts)))
        sizes = [generator.randint(1, parts[i].buffer.numel()) for i in chosen]
        with memory.step():
            for i, size in zip(chosen, sizes, strict=True):
                parts[i].load([1000 * step + i] * size)
        for i, size in zip(chosen, sizes, strict=True):
            expected.append((1000 * step + i, size))
            cuda.launch(lambda part=parts[i], size=size: read(part, size))
    cuda.default.synchronize()
    assert seen == expected


def test_a_step_takes_one_copy_unless_its_parts_are_far_apart(cuda: FakeCuda):
    memory = StagedMemory(CPU, chunk_bytes=1 << 20)
    first, between, last = (memory.part(n, torch.int32) for n in (10, 1 << 17, 10))
    with memory.step():
        first.load([1, 2, 3])
        between.load([4])
    assert memory.num_copies == 1
    with memory.step():
        first.load([5])
        last.load([6])
    assert memory.num_copies == 3
    with memory.step():
        pass
    assert memory.num_copies == 3
    cuda.default.synchronize()
    assert first.buffer[0] == 5
    assert last.buffer[0] == 6


def test_oversized_data_is_refused_and_the_memory_stays_usable():
    part = StagedMemory(CPU, 0).part(2, torch.int32)
    with pytest.raises(ValueError, match="3 words"):
        part.load([1, 2, 3])
    part.load([4, 5])
    assert part.buffer.tolist() == [4, 5]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_host_tensors_are_those_of_torch(dtype: torch.dtype):
    for values in ([], [1], [3, -(2**31), 2**31 - 1]):
        found, expected = host_tensor(values, dtype), torch.tensor(values, dtype=dtype)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
