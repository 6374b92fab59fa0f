"""The emulator reports each fault that is planted in the compiled kernels."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from kernel_traffic import HALF, make_pack, traffic
from ptx.fault import Fault
from ptx.launcher import emulated

from turret.kernels.gpu import nf4
from turret.kernels.gpu.low_rank import segmented_shrink
from turret.kernels.gpu.paged_attention import paged_attention
from turret.kernels.gpu.tables import AttentionTable, SegmentTable
from turret.kernels.nf4_matmul import Nf4Matrix
from turret.kernels.paged_attention import SequenceSpan

DEVICE = torch.device("cpu")


def base_product(missing_bytes: int = 0, gated: bool = False) -> torch.Tensor:
    """``nf4_matmul`` at a small shape, with a weight that lacks some bytes."""
    torch.manual_seed(0)
    out, inner = 64, 512
    packed = torch.randint(0, 256, (out * inner // 2 - missing_bytes,), dtype=torch.uint8)
    matrix = Nf4Matrix(packed, torch.rand(out * inner // 64), out, inner)
    return nf4.nf4_matmul(torch.randn(16, inner).to(HALF), matrix, gated=gated)


def gated_product() -> torch.Tensor:
    """``nf4_matmul`` with gates in one program and ups in another."""
    return base_product(gated=True)


def shrink() -> None:
    """``segmented_shrink`` for a few rows."""
    pack = make_pack(1024, (40,), HALF)
    table = SegmentTable(max_rows=64, max_row_rank=256, max_components=4, device=DEVICE)
    table.load(next(runs for name, runs, _ in traffic(pack) if name == "mixes"))
    segmented_shrink(torch.randn(5, 1024).to(HALF), pack.a, pack.slice_ranks, table)


def attention() -> torch.Tensor:
    """``paged_attention`` for two rows with contexts of two splits each."""
    torch.manual_seed(0)
    table = AttentionTable(
        max_records=8, blocks=40, kv_heads=1, queries_per_head=2, window=None, device=DEVICE,
        spread_records=4,
    )  # fmt: skip
    table.load([SequenceSpan(row, 1, 260, list(range(17))) for row in range(2)])
    keys, values = torch.randn(2, 17, 16, 1, 16).to(HALF)
    return paged_attention(torch.randn(2, 2, 16).to(HALF), keys, values, table, scale=0.25)


def without(pattern: str, number: int) -> Callable[[str], str]:
    """Remove the ``number``-th match from a kernel's text."""

    def edit(ptx: str) -> str:
        place = list(re.finditer(pattern, ptx))[number]
        return ptx[: place.start()] + ptx[place.end() :]

    return edit


def count(launch: Callable[[], object], pattern: str) -> int:
    """The number of matches in the text of the kernel that ``launch`` launches."""
    found: list[int] = []

    def edit(ptx: str) -> str:
        found.append(len(re.findall(pattern, ptx)))
        return ptx

    with emulated("sm_90", edit=edit):
        launch()
    return found[0]


BARRIER = r"bar\.sync\s+0;"
WAIT = r"cp\.async\.wait_group\s+\d+;"


@pytest.mark.parametrize("launch", [base_product, shrink])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_kernels_as_they_are_pass(launch, target):
    with emulated(target):
        launch()


@pytest.mark.parametrize("launch", [base_product, shrink])
def test_dropped_barriers(launch):
    """All barriers are dropped at once."""
    without_any = emulated("sm_90", edit=lambda ptx: re.sub(BARRIER, "", ptx))
    with without_any, pytest.raises(Fault, match="race"):
        launch()


@pytest.mark.parametrize("launch", [base_product, shrink])
def test_a_dropped_wait(launch):
    waits = count(launch, WAIT)
    assert waits > 0
    caught = 0
    for number in range(waits):
        with emulated("sm_90", edit=without(WAIT, number)):
            try:
                launch()
            except Fault:
                caught += 1
    # The last wait of a kernel may have nothing to wait for.
    assert caught >= max(1, waits - 1)


@pytest.mark.parametrize("launch", [attention, gated_product])
def test_the_result_does_not_depend_on_the_order_of_programs(launch):
    with emulated("sm_90") as launcher:
        forwards = launch()
        launcher.backwards = True
        assert torch.equal(launch(), forwards)


def relaxed(ptx: str) -> str:
    """Replace the counter's memory order with a relaxed one."""
    assert ptx.count("gpu.acq_rel") == 1
    return ptx.replace("gpu.acq_rel", "gpu.relaxed")


def not_behind_a_barrier(ptx: str) -> str:
    """Let one warp increment the counter while others still write."""
    head, tail = ptx.split("atom.global")
    last_store = head.rindex("st.global")
    between, found = re.subn(BARRIER, "", head[last_store:])
    assert found
    return f"{head[:last_store]}{between}atom.global{tail}"


@pytest.mark.parametrize("edit", [relaxed, not_behind_a_barrier])
@pytest.mark.parametrize("launch", [attention, gated_product])
def test_partial_results_that_were_not_released(launch, edit):
    # A failed launch does not reset its counters.
    nf4.counters_on.cache_clear()
    with (
        emulated("sm_90", edit=edit),
        pytest.raises(Fault, match=r"race: .*(another|two programs)"),
    ):
        launch()
    nf4.counters_on.cache_clear()


def test_a_weight_that_is_too_short(monkeypatch):
    monkeypatch.setattr(nf4, "check_contiguous", lambda name, values: None)
    monkeypatch.setattr(nf4, "check_length", lambda *arguments: None)
    with emulated("sm_90"), pytest.raises(Fault, match=r"load of \d+ bytes at \d+, out of bounds"):
        base_product(missing_bytes=16)


def test_shared_memory_read_before_it_is_written():
    with (
        emulated("sm_90", edit=lambda ptx: re.sub(r"(@%p\d+ )?cp\.async\.c[ag][^;]*;", "", ptx)),
        pytest.raises(Fault, match="uninitialised"),
    ):
        shrink()


def test_unwritten_scratch_memory_makes_the_result_nan():
    """NaN from the fixture ``poisoned_scratch`` reaches the result."""
    pack = make_pack(64, (40,), HALF)
    table = SegmentTable(max_rows=64, max_row_rank=256, max_components=4, device=DEVICE)
    table.load(next(runs for name, runs, _ in traffic(pack) if name == "mixes"))
    with emulated("sm_90", edit=lambda ptx: re.sub(r"(@%p\d+ )?st\.global[^;]*;", "", ptx)):
        v = segmented_shrink(torch.randn(5, 64).to(HALF), pack.a, pack.slice_ranks, table)
    assert torch.isnan(v).all()
