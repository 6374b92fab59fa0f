"""``input_blocks``, ``gained_add`` and the torch reference against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, HALF, MAX_ERROR, error_ratio, make_pack, traffic

from turret.kernels.adapters.input_blocks import input_blocks_reference
from turret.kernels.gpu.adapters.input_blocks import ALL, gained_add, input_blocks
from turret.kernels.gpu.tables.segment_table import SegmentTable

INNER = 120
OUTS = (48,)


def make_table(gemv: bool = False) -> SegmentTable:
    return SegmentTable(max_rows=64, max_row_rank=256, max_components=4, device=DEVICE, gemv=gemv)


def places_of(num_slots: int) -> torch.Tensor:
    """Every second adapter of the pack has blocks."""
    found = [slot // 2 if slot % 2 else -1 for slot in range(num_slots)]
    return torch.tensor(found, dtype=torch.int32, device=DEVICE)


def dense(blocks: torch.Tensor) -> torch.Tensor:
    count = INNER // blocks.shape[1]
    return torch.block_diag(*blocks.double().expand(count, -1, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "size"), [(15, 8), (1, 40), (3, 40), (120, 1)])
def test_rows_are_turned_by_their_mix(dtype, count, size):
    pack = make_pack(INNER, OUTS, dtype)
    places = places_of(len(pack.bounds))
    blocks = torch.randn(len(pack.bounds) // 2, count, size, size) / size**0.5
    blocks = blocks.to(DEVICE, dtype)
    table = make_table(gemv=size == 8)
    for name, runs, num_rows in traffic(pack):
        x = torch.randn(num_rows, INNER).to(DEVICE, dtype)
        before = torch.randn(num_rows, INNER).to(DEVICE, dtype)
        table.load(runs)
        for nth in (ALL, 0, 1):
            u = before.clone()
            input_blocks(x, u, blocks, places, table, nth)
            for run in runs:
                members = [c for c in run.members if places[c.slot] >= 0]
                members = members if nth == ALL else members[nth : nth + 1]
                rows = slice(run.start, run.end)
                expected = before[rows].double()
                for c in members:
                    change = x[rows].double() @ dense(blocks[int(places[c.slot])])
                    expected = expected + c.weight * change
                assert error_ratio(u[rows], expected) < MAX_ERROR[dtype], (name, nth)
                assert members or torch.equal(u[rows], before[rows]), (name, nth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nth", [0, 1])
def test_a_product_is_added_under_the_gain_of_its_member(dtype, nth):
    pack = make_pack(INNER, OUTS, dtype)
    places = places_of(len(pack.bounds))
    deltas = torch.randn(len(pack.bounds), 3 * INNER, device=DEVICE)
    delta = deltas[:, INNER : 2 * INNER]
    table = make_table()
    for name, runs, num_rows in traffic(pack):
        z = torch.randn(num_rows, INNER).to(DEVICE, dtype)
        wide = torch.randn(num_rows, 2 * INNER).to(DEVICE, dtype)
        before, y = wide.clone(), wide[:, 40 : 40 + INNER]
        table.load(runs)
        gained_add(y, z, delta, places, table, nth)
        for run in runs:
            members = [c for c in run.members if places[c.slot] >= 0][nth : nth + 1]
            rows = slice(run.start, run.end)
            expected = before[rows, 40 : 40 + INNER].double()
            for c in members:
                expected = expected + (1 + delta[c.slot].double()) * z[rows].double()
            assert error_ratio(y[rows], expected) < MAX_ERROR[dtype], name
        untouched = torch.ones(2 * INNER, dtype=torch.bool)
        untouched[40 : 40 + INNER] = False
        assert torch.equal(wide[:, untouched], before[:, untouched])


@pytest.mark.parametrize(("count", "size"), [(15, 8), (1, 40), (120, 1), (8, 15)])
def test_the_reference_equals_float64_and_the_rows_alone(count, size):
    blocks = torch.randn(count, size, size) / size**0.5
    x = torch.randn(17, INNER)
    found = input_blocks_reference(x, blocks)
    assert error_ratio(found, x.double() @ dense(blocks)) < 1e-6
    for row in range(17):
        alone = input_blocks_reference(x[row : row + 1], blocks)
        assert torch.equal(alone[0], found[row])


def test_breaches_of_the_contract_are_refused():
    table, places = make_table(), places_of(3)
    x = torch.zeros(2, INNER, device=DEVICE, dtype=HALF)
    blocks = torch.zeros(2, 15, 8, 8, device=DEVICE, dtype=HALF)
    with pytest.raises(ValueError, match="do not make"):
        input_blocks(x, x.clone(), blocks[:, :3].contiguous(), places, table)
    with pytest.raises(ValueError, match="blocks is"):
        input_blocks(x, x.clone(), blocks.float(), places, table)
    with pytest.raises(ValueError, match="u is"):
        input_blocks(x, x[:, :-1], blocks, places, table)
    with pytest.raises(ValueError, match="gain_delta is"):
        gained_add(x, x.clone(), torch.zeros(3, INNER, device=DEVICE)[:, :-1], places, table, 0)
