"""The estimates that the GPU benchmark prints beside its measurements."""

from __future__ import annotations

import pytest
from ptx.launcher import bench_module

estimate = bench_module("cuda.estimate")
H100 = estimate.CARDS[("H100",)]
LLAMA_8B = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}


def step_ms(rows: int, rows_of_rank: list[tuple[int, int]], context: int = 512) -> float:
    works = estimate.step_work(
        LLAMA_8B, num_layers=32, rows=rows, context=context, heads=(8, 4, 128), vocab=128256,
        rows_of_rank=rows_of_rank, card=H100,
    )  # fmt: skip
    return estimate.expected_ms(works, H100)


def test_the_scarcest_resource_decides():
    second = estimate.Work(num_bytes=3350e9, instructions=1, launches=0)
    assert estimate.expected_ms([second], H100) == pytest.approx(1e3)
    per_second = 132 * 128 * 1.755e9
    busy = estimate.Work(num_bytes=1, instructions=2 * per_second, launches=0)
    assert estimate.expected_ms([busy, second], H100) == pytest.approx(3e3)
    found = estimate.facts(lambda _: [busy, second], H100, 6e3)
    assert found["over_expected"] == pytest.approx(2)
    assert found["floor_ms"] == pytest.approx(1e3)
    launch = estimate.Work(launches=10)
    assert estimate.expected_ms([launch], H100) == pytest.approx(10 * estimate.LAUNCH_MS)


def test_an_8b_on_an_h100():
    """Orders of magnitude: half a byte per weight at full bandwidth takes 1.2 ms."""
    alone, full = step_ms(1, []), step_ms(64, [])
    assert 1.5 < alone < 3.5
    assert alone < full < 8
    # More distinct adapters cost more; a shared one costs the least.
    shared, eight = step_ms(64, [(16, 64)]), step_ms(64, [(16, 8)] * 8)
    distinct = step_ms(64, [(16, 1)] * 64)
    assert full < shared < eight < distinct
    assert step_ms(8, [], 32768) > step_ms(8, [], 512)
