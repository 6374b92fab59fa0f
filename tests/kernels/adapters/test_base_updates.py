"""``pair_rotation``, ``circulant``, ``modulate`` and their references, against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, HALF, MAX_ERROR, error_ratio, make_pack, traffic
from kernel_traffic import circulant as dense_circulant

from turret.kernels.adapters.circulant import circulant_reference, spectrum
from turret.kernels.adapters.modulated_base import modulated_reference
from turret.kernels.adapters.pair_rotation import pair_rotation_reference, partners
from turret.kernels.gpu.adapters.circulant import circulant
from turret.kernels.gpu.adapters.modulated_base import modulate, modulated_add
from turret.kernels.gpu.adapters.pair_rotation import pair_rotation
from turret.kernels.gpu.tables.row_table import RowTable
from turret.kernels.gpu.tables.segment_table import SegmentTable

INNER, OUT = 72, 160
OUTS = (48,)
SIZES = [(3, 5, 8), (1, 2, 33), (4, 1, 100), (2, 2, 64), (5, 7, 1), (2, 3, 2)]


def make_table(gemv: bool = False) -> SegmentTable:
    return SegmentTable(max_rows=64, max_row_rank=256, max_components=4, device=DEVICE, gemv=gemv)


def turned(sine: torch.Tensor, group: int) -> torch.Tensor:
    """The dense matrix of partners."""
    found = torch.zeros(len(sine), len(sine), dtype=torch.float64)
    for o in range(len(sine)):
        half = group // 2
        found[o, o + half if o % group < half else o - half] = sine[o]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gemv", [False, True])
def test_outputs_are_added_to_their_partners(dtype, gemv):
    pack = make_pack(INNER, OUTS, dtype)
    slots = len(pack.bounds)
    sines = torch.randn(slots, 3 * OUT, device=DEVICE)
    sine = sines[:, OUT : 2 * OUT]
    # Adapters with groups of all sizes, and some without pairs.
    sizes = torch.tensor([(0, 2, 32, 160)[slot % 4] for slot in range(slots)], dtype=torch.int32)
    groups = torch.stack((sizes, sizes), 1).to(DEVICE)[:, 1]
    table = make_table(gemv)
    for name, runs, num_rows in traffic(pack):
        before = torch.randn(num_rows, OUT).to(DEVICE, dtype)
        wide = torch.randn(num_rows, 2 * OUT).to(DEVICE, dtype)
        known, y = wide.clone(), wide[:, 7 : 7 + OUT]
        table.load(runs)
        pair_rotation(before, y, sine, groups, table)
        for run in runs:
            members = [c for c in run.members if sizes[c.slot]]
            rows = slice(run.start, run.end)
            expected = known[rows, 7 : 7 + OUT].double()
            for c in members:
                matrix = turned(sine[c.slot].double().cpu(), int(sizes[c.slot])).to(DEVICE)
                expected = expected + c.weight * before[rows].double() @ matrix.T
            assert error_ratio(y[rows], expected) < MAX_ERROR[dtype], name
            assert members or torch.equal(wide[rows], known[rows]), name
        assert torch.equal(wide[:, :7], known[:, :7])
        assert torch.equal(wide[:, 7 + OUT :], known[:, 7 + OUT :])


@pytest.mark.parametrize("group", [2, 8, 160])
def test_the_reference_exchanges_halves(group):
    sine, before = torch.randn(OUT), torch.randn(5, OUT)
    found = pair_rotation_reference(before, sine, group)
    assert error_ratio(found, before.double() @ turned(sine.double(), group).T) < 1e-7
    assert torch.equal(partners(OUT, group)[partners(OUT, group)], torch.arange(OUT))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
def test_circulant_blocks_are_added(dtype, shape):
    rows, columns, size = shape
    kernel = (torch.randn(3, *shape) / (columns * size) ** 0.5).to(DEVICE, dtype)
    wide = torch.full((6, columns * size + 40), float("nan"), device=DEVICE, dtype=dtype)
    x = wide[:, : columns * size].copy_(torch.randn(6, columns * size))
    whole = torch.randn(6, rows * size + 9).to(DEVICE, dtype)
    before, y = whole.clone(), whole[:, 5 : 5 + rows * size]
    table = RowTable(8, DEVICE)
    chosen = {4: (2, 0.5), 0: (0, 1.0), 5: (2, -1.5)}
    table.load(list(chosen), [s for s, _ in chosen.values()], [w for _, w in chosen.values()])
    circulant(x, y, kernel, table)
    for row in range(6):
        expected = before[row, 5 : 5 + rows * size].double()
        if row in chosen:
            slot, weight = chosen[row]
            matrix = dense_circulant(kernel[slot].double().cpu()).to(DEVICE)
            expected = expected + weight * matrix @ x[row].double()
        assert error_ratio(y[row], expected) < MAX_ERROR[dtype], row
    assert torch.equal(whole[:, :5], before[:, :5])
    assert torch.equal(whole[:, 5 + rows * size :], before[:, 5 + rows * size :])


@pytest.mark.parametrize("shape", SIZES)
def test_the_circulant_reference_equals_float64_and_the_rows_alone(shape):
    kernel = torch.randn(shape)
    x = torch.randn(11, shape[1] * shape[2])
    found = circulant_reference(x, spectrum(kernel), shape[2])
    matrix = dense_circulant(kernel.double())
    assert error_ratio(found, x.double() @ matrix.T) < 1e-6
    for row in range(11):
        alone = circulant_reference(x[row : row + 1], spectrum(kernel), shape[2])
        assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nth", [0, 1])
def test_rows_are_modulated_and_what_the_base_makes_of_them_is_added(dtype, nth):
    pack = make_pack(INNER, OUTS, dtype)
    places = [slot // 2 if slot % 2 else -1 for slot in range(len(pack.bounds))]
    places_ptr = torch.tensor(places, dtype=torch.int32, device=DEVICE)
    a = torch.randn(len(places) // 2, 5, INNER).to(DEVICE, dtype)
    b = torch.randn(len(places) // 2, 5, OUT).to(DEVICE, dtype)
    table, ranks = make_table(gemv=nth == 1), slice(1, 4)
    for name, runs, num_rows in traffic(pack):
        x = torch.randn(num_rows, INNER).to(DEVICE, dtype)
        z = torch.randn(3, num_rows, OUT).to(DEVICE, dtype)
        wide = torch.randn(num_rows, 2 * OUT).to(DEVICE, dtype)
        before, y = wide.clone(), wide[:, 3 : 3 + OUT]
        table.load(runs)
        u = modulate(x, a, ranks, places_ptr, table, nth)
        modulated_add(y, z, b, ranks, places_ptr, table, nth)
        for run in runs:
            members = [c for c in run.members if places[c.slot] >= 0][nth : nth + 1]
            rows = slice(run.start, run.end)
            expected = before[rows, 3 : 3 + OUT].double()
            for c in members:
                left, right = (f[places[c.slot], ranks].double() for f in (a, b))
                own = x[rows].double() * left[:, None]
                assert error_ratio(u[:, rows], own) < MAX_ERROR[dtype], name
                added = (z[:, rows].double() * right[:, None]).sum(0)
                expected = expected + c.weight * added
            assert members or not u[:, rows].any(), name
            assert error_ratio(y[rows], expected) < MAX_ERROR[dtype], name
        assert torch.equal(wide[:, 3 + OUT :], before[:, 3 + OUT :])


def test_the_modulated_reference_equals_float64_in_any_number_of_calls():
    x, a, b = torch.randn(400, INNER), torch.randn(5, INNER), torch.randn(5, OUT)
    weight = torch.randn(OUT, INNER)

    def base(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([row @ weight.T for row in rows.split(1)])

    found = modulated_reference(x, a, b, base)
    expected = x.double() @ (weight.double() * (b.double().T @ a.double())).T
    assert error_ratio(found, expected) < 1e-6
    assert torch.equal(modulated_reference(x[:7], a, b, base), found[:7])


def test_breaches_of_the_contract_are_refused():
    table = make_table()
    x = torch.zeros(2, INNER, device=DEVICE, dtype=HALF)
    sine = torch.zeros(3, INNER, device=DEVICE)
    groups = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="sine is"):
        pair_rotation(x, x.clone(), sine[:, :-1], groups, table)
    with pytest.raises(ValueError, match="groups is"):
        pair_rotation(x, x.clone(), sine, groups[:-1], table)
    with pytest.raises(ValueError, match="y is"):
        circulant(x, x[:, :-1], x.new_zeros(1, 3, 3, 24), RowTable(4, DEVICE))
    a = x.new_zeros(1, 4, INNER)
    with pytest.raises(ValueError, match="z is"):
        modulated_add(x, x.new_zeros(3, 2, INNER), a, slice(0, 2), groups, table, 0)
    with pytest.raises(ValueError, match="a is"):
        modulate(x, a[..., :-1].contiguous(), slice(0, 2), groups, table, 0)
