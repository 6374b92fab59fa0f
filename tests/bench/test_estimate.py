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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NVIDIA H100 80GB HBM3", ("H100",)),
        ("NVIDIA H100 PCIe", ("H100", "PCIe")),
        ("NVIDIA A100-SXM4-40GB", ("A100", "40GB")),
        ("NVIDIA L40S", ("L40S",)),
        ("NVIDIA L4", ("L4",)),
        ("NVIDIA GeForce RTX 4090", ("4090",)),
    ],
)
def test_cards_are_known_by_their_names(name, words):
    assert estimate.card_of(name) is estimate.CARDS[words]


def test_nothing_is_printed_beside_a_card_that_is_not_known():
    assert estimate.card_of("NVIDIA Quadro 600") is None
    assert estimate.facts(estimate.bytes_work(1), None, 1.0) == {}


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


def test_what_others_move_and_what_draws_take():
    """A loop launches more, padding and gathering read more.

    One program draws the token of a row.
    """
    few, many = (estimate.sample_work(rows, 128256, 17, H100).kernel_ms(H100) for rows in (1, 132))
    assert few == pytest.approx(many)
    assert 0.02 < few < 0.2
    assert estimate.sample_work(264, 128256, 17, H100).kernel_ms(H100) == pytest.approx(2 * few)


def test_the_table_of_machine_code_has_what_is_asked_for():
    for target in ("sm_80", "sm_90"):
        few, many = (estimate.cost("nf4_matmul", target, f"TILES={n};")[0] for n in (1, 4))
        assert 5 < few < many < 13
    with pytest.raises(ValueError, match="no nf4_matmul"):
        estimate.cost("nf4_matmul", "sm_90", "TILES=9;")
