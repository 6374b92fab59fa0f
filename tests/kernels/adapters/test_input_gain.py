"""``input_gain`` against float64 over traffic shapes.

Planted faults, and how many of the tests here each one fails (tried by hand):

- the mix weight dropped: 8
- only the first component: 8
- slot of the first component for all: 8
- ``x`` multiplied where nothing changes: 5
- only the first block of columns: 9
- all rows taken: 4
- bit 0 for every projection: 2
- the first slice's gains for all: 4
- every slice's rows in the first slice's place: 4
"""

from __future__ import annotations

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, HALF, MAX_ERROR, error_ratio, make_pack, traffic

from turret.kernels.adapters.segments import LongSegment
from turret.kernels.gpu.adapters.input_gain import BOUND_ROWS, FREE_ROWS, input_gain
from turret.kernels.gpu.tables.segment_table import SegmentTable

INNER = 200
OUTS = (48,)


def make_table(gemv: bool = False) -> SegmentTable:
    return SegmentTable(max_rows=64, max_row_rank=256, max_components=4, device=DEVICE, gemv=gemv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gemv", "slices"), [(False, 1), (False, 3), (True, 2)])
def test_rows_are_scaled_by_their_mix(dtype, gemv, slices):
    pack = make_pack(INNER, OUTS, dtype)
    deltas = torch.randn(len(pack.bounds), slices + 1, INNER, device=DEVICE)
    deltas[0] = 0.0
    # One slice's stride is another's than its width.
    delta = deltas[:, 1:]
    table = make_table(gemv)
    for name, runs, num_rows in traffic(pack):
        x = torch.randn(num_rows, INNER).to(DEVICE, dtype)
        table.load(runs)
        out = input_gain(x, delta, table)
        assert out.shape == (slices, num_rows, INNER)
        for run in runs:
            total = torch.zeros(slices, 1, INNER, dtype=torch.float64, device=DEVICE)
            for c in run.members:
                total += c.weight * delta[c.slot].double()[:, None]
            expected = x[run.start : run.end].double() * total
            for found, own in zip(out[:, run.start : run.end], expected, strict=True):
                assert not run.members or error_ratio(found, own) < MAX_ERROR[dtype], name
                assert run.members or not found.any(), name


def test_an_infinite_activation_stays_out_of_rows_without_a_gain():
    pack = make_pack(INNER, OUTS, HALF)
    delta = torch.zeros(len(pack.bounds), INNER, device=DEVICE)
    delta[2, :7] = 1.0
    table = make_table()
    table.load([run for name, runs, _ in traffic(pack) if name == "distinct" for run in runs])
    x = torch.full((6, INNER), float("inf"), device=DEVICE, dtype=HALF)
    out = input_gain(x, delta[:, None], table)[0]
    assert not out[[0, 2, 3, 4, 5]].any()
    assert torch.isinf(out[1, :7]).all()
    assert not out[1, 7:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bit", [0, 3])
def test_whole_inputs_of_some_rows_and_changes_of_the_others(dtype, bit):
    """Rows are taken by their projection's bit; the others keep the bits of their input."""
    pack = make_pack(INNER, OUTS, dtype)
    delta = torch.randn(len(pack.bounds), INNER, device=DEVICE)
    delta[0] = 0.0
    table = make_table()
    mixes = [pack.mix((1, 1.0)), pack.mix((2, -0.5), (1, 1.0)), pack.mix((3, 1.0)), ()]
    bound = [1 << bit, 0, 0xFF ^ 1 << bit, 0]
    segments = enumerate(zip(mixes, bound, strict=True))
    table.load([LongSegment(5 * i, 5 * i + 5, mix, as_is) for i, (mix, as_is) in segments])
    x = torch.randn(20, INNER).to(DEVICE, dtype)
    x[15:] = float("inf")
    (whole,) = input_gain(x, delta[:, None], table, taken=FREE_ROWS, bit=bit, whole=True)
    (changes,) = input_gain(x, delta[:, None], table, taken=BOUND_ROWS, bit=bit)
    for i, mix in enumerate(mixes):
        rows = slice(5 * i, 5 * i + 5)
        gain = sum(
            (c.weight * delta[c.slot].double() for c in mix),
            torch.zeros(INNER, dtype=torch.float64, device=DEVICE),
        )
        if i in (1, 2):
            exact = x[rows].double() * (1 + gain)
            assert error_ratio(whole[rows], exact) < MAX_ERROR[dtype]
        else:
            assert torch.equal(whole[rows], x[rows])
        if i == 0:
            assert error_ratio(changes[rows], x[rows].double() * gain) < MAX_ERROR[dtype]
        else:
            assert not changes[rows].any()


def test_breaches_of_the_contract_are_refused():
    table = make_table()
    x = torch.zeros(2, INNER, device=DEVICE, dtype=HALF)
    delta = torch.zeros(3, 1, INNER, device=DEVICE)
    with pytest.raises(ValueError, match="delta is"):
        input_gain(x, delta[..., :-1], table)
    with pytest.raises(ValueError, match="float32"):
        input_gain(x, delta.half(), table)
    with pytest.raises(ValueError, match="stride"):
        input_gain(x.t().contiguous().t(), delta, table)
