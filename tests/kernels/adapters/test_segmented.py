"""``segmented_shrink`` and ``segmented_expand`` on Triton compared with float64.

Planted faults, and the number of tests that fail for each of them (tried by hand):

- shrink: A rows past the adapter's rank read: 2
- shrink: x read past in_features: 13
- shrink: every part begins at 0: 38
- shrink: always slice 0: 40
- shrink: rank tile offset forgotten in the rank count: 2
- expand: only the first part of the reduction: 36
- expand: mix weight dropped: 14
- expand: gain dropped: 2
- expand: gain not weighted: 2
- expand: component offset in v forgotten: 14
- expand: slice rank ignored: 25
- expand: base rows skipped even with a base bias: 3
- expand: gates of slice 0 for all: 2
- expand: rows past the chunk written: 30
- table: chunks of a segment share their place in v: 16
- table: last row of a full tile plus one lost: 4
- shrink: row 0 not stored (scratch is NaN): 39
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_traffic import (
    DEVICE,
    DTYPES,
    HALF,
    MAX_ERROR,
    Pack,
    error_ratio,
    make_pack,
    traffic,
    update_in_float64,
)

from turret.kernels.gpu.low_rank import segmented_expand, segmented_shrink
from turret.kernels.gpu.tables import GatedMembers, RunOfRows, SegmentTable

INNER, OUTS = 100, (70, 33, 5)
NAMES = [name for name, _, _ in traffic(make_pack(8, (8,), HALF))]


def make_table(max_gates: int = 0) -> SegmentTable:
    return SegmentTable(
        max_rows=64,
        max_row_rank=256,
        max_components=4,
        max_gates=max_gates,
        device=DEVICE,
    )


def shape_of(pack: Pack, name: str) -> tuple[list[RunOfRows], int]:
    return next((runs, rows) for found, runs, rows in traffic(pack) if found == name)


def run(pack: Pack, table: SegmentTable, x: torch.Tensor, y: torch.Tensor, **extra) -> torch.Tensor:
    out = y.clone()
    v = segmented_shrink(x, pack.a, pack.slice_ranks, table)
    segmented_expand(out, v, pack.b, pack.slice_ranks, table, **extra)
    return out


def rows_of(runs: list[RunOfRows]) -> list[int]:
    return [row for run in runs if run.members for row in range(run.start, run.end)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapted_rows_match_float64_and_other_rows_are_unchanged(name, dtype):
    pack = make_pack(INNER, OUTS, dtype)
    runs, num_rows = shape_of(pack, name)
    x = torch.randn(num_rows, INNER).to(DEVICE, dtype)
    y = torch.randn(num_rows, sum(OUTS)).to(DEVICE, dtype)
    table = make_table()
    table.load(runs)
    out = run(pack, table, x, y)
    adapted = rows_of(runs)
    others = [row for row in range(num_rows) if row not in adapted]
    assert torch.equal(out[others], y[others])
    if adapted:
        expected = y.double() + update_in_float64(pack, runs, x, OUTS)
        assert error_ratio(out[adapted], expected[adapted]) < MAX_ERROR[dtype]


def test_shrink_is_rank_exact():
    pack = make_pack(INNER, OUTS, HALF)
    x = torch.randn(18, INNER).to(DEVICE, HALF)
    slots = (3, 5, 6, 2)
    table = make_table()
    table.load([RunOfRows(0, 18, pack.mix(*((slot, 1.0) for slot in slots)))])
    v = segmented_shrink(x, pack.a, pack.slice_ranks, table).sum(0)
    widths = [pack.bounds[slot][1] - pack.bounds[slot][0] for slot in slots]
    v = v[: 18 * sum(widths) * len(OUTS)].view(18, sum(widths), len(OUTS))
    for slot, part in zip(slots, v.split(widths, dim=1), strict=True):
        low = pack.bounds[slot][0]
        for s in range(len(OUTS)):
            held = int(pack.slice_ranks[slot, s])
            assert not part[:, held:, s].any(), (slot, s)
            expected = x.double() @ pack.a[low : low + held, s].double().T
            assert held == 0 or error_ratio(part[:, :held, s], expected) < 2e-6, (slot, s)


def test_gain_biases_and_gates():
    pack = make_pack(INNER, OUTS, HALF)
    runs, num_rows = shape_of(pack, "base rows between")
    # Gate all members but the second one of a mix.
    runs = [replace(run, gated=(GatedMembers(0, 1, 0),)) if run.members else run for run in runs]
    x = torch.randn(num_rows, INNER).to(DEVICE, HALF)
    y = torch.randn(num_rows, sum(OUTS)).to(DEVICE, HALF)
    base_bias = torch.randn(sum(OUTS)).to(DEVICE, HALF)
    gates = torch.rand(num_rows, len(OUTS), 4, device=DEVICE)
    # The gates of other members are not computed.
    gates[:, :, 1:] = float("nan")
    table = make_table(max_gates=1)
    table.load(runs)
    out = run(
        pack, table, x, y,
        gain_delta=pack.gain_delta, bias=pack.bias, base_bias=base_bias, gates=gates,
    )  # fmt: skip
    in_slice = torch.tensor([s for s, width in enumerate(OUTS) for _ in range(width)])
    for segment in runs:
        for row in range(segment.start, segment.end):
            gain = torch.ones(sum(OUTS), dtype=torch.float64, device=DEVICE)
            added = base_bias.double()
            for i, c in enumerate(segment.members):
                gain += c.weight * pack.gain_delta[c.slot].double()
                alone = [RunOfRows(row, row + 1, pack.mix((c.slot, 1.0)))]
                delta = update_in_float64(pack, alone, x, OUTS)[row]
                gate = gates[row, in_slice.to(DEVICE), i].double() if i == 0 else 1.0
                added = added + c.weight * gate * (delta + pack.bias[c.slot].double())
            expected = gain * y[row].double() + added
            assert error_ratio(out[row], expected) < MAX_ERROR[HALF], row


def test_gates_of_other_rows_do_not_change_a_rows_bits():
    pack = make_pack(INNER, OUTS, HALF)
    runs, num_rows = shape_of(pack, "decode beside prefill")
    x = torch.randn(num_rows, INNER).to(DEVICE, HALF)
    y = torch.randn(num_rows, sum(OUTS)).to(DEVICE, HALF)
    extra = {"gain_delta": pack.gain_delta, "bias": pack.bias}
    table = make_table(max_gates=1)
    table.load(runs)
    without = run(pack, table, x, y, **extra)
    table.load([*runs[:2], replace(runs[2], gated=(GatedMembers(1, 2, 0),)), *runs[3:]])
    gates = torch.full((num_rows, len(OUTS), 4), float("nan"), device=DEVICE)
    gates[3:40, :, 1] = 0.5
    found = run(pack, table, x, y, **extra, gates=gates)
    assert torch.isfinite(found).all()
    for row in range(num_rows):
        assert torch.equal(found[row], without[row]) == (not 3 <= row < 40), row


def test_base_rows_get_the_base_bias_with_one_rounding():
    pack = make_pack(INNER, OUTS, HALF)
    table = make_table()
    table.load([RunOfRows(0, 20, ())])
    y = torch.randn(21, sum(OUTS)).to(DEVICE, HALF)
    base_bias = torch.randn(sum(OUTS)).to(DEVICE, HALF)
    x = torch.randn(21, INNER).to(DEVICE, HALF)
    out = run(pack, table, x, y, base_bias=base_bias)
    assert torch.equal(out[:20], y[:20] + base_bias)
    assert torch.equal(out[20], y[20])


def test_a_row_has_the_same_bits_in_any_batch():
    pack = make_pack(INNER, OUTS, HALF)
    runs, num_rows = shape_of(pack, "decode beside prefill")
    x = torch.randn(num_rows, INNER).to(DEVICE, HALF)
    y = torch.randn(num_rows, sum(OUTS)).to(DEVICE, HALF)
    table = make_table()
    table.load(runs)
    together = run(pack, table, x, y)
    assert torch.equal(together, run(pack, table, x, y)), "not deterministic"
    for segment in runs:
        for start in range(segment.start, segment.end, 16):
            end = min(start + 16, segment.end)
            table.load([RunOfRows(start, end, segment.members)])
            alone = run(pack, table, x, y)
            assert torch.equal(alone[start:end], together[start:end]), (start, end)


def test_an_equal_mix_is_one_segment_wherever_its_rows_are():
    pack = make_pack(INNER, OUTS, HALF)
    apart = [RunOfRows(i, i + 1, pack.mix((3 + i % 2, 1.0))) for i in range(12)]
    table = make_table()
    table.load(apart)
    assert table.buffer[4].item() == 2, "two chunks"
    assert table.buffer[0].item() == 12


def test_strided_rows():
    pack = make_pack(INNER, OUTS, HALF)
    runs, num_rows = shape_of(pack, "mixes")
    wide_x = torch.full((num_rows, INNER + 9), float("nan"), device=DEVICE, dtype=HALF)
    wide_y = torch.zeros(num_rows, sum(OUTS) + 7, device=DEVICE, dtype=HALF)
    x, y = wide_x[:, 4 : 4 + INNER], wide_y[:, 3 : 3 + sum(OUTS)]
    x.copy_(torch.randn(num_rows, INNER))
    table = make_table()
    table.load(runs)
    v = segmented_shrink(x, pack.a, pack.slice_ranks, table)
    segmented_expand(y, v, pack.b, pack.slice_ranks, table)
    expected = update_in_float64(pack, runs, x, OUTS)
    assert error_ratio(y, expected) < MAX_ERROR[HALF]
    assert not wide_y[:, :3].any()
    assert not wide_y[:, 3 + sum(OUTS) :].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_adapter_that_overflows_does_not_touch_other_rows():
    pack = make_pack(INNER, OUTS, HALF)
    low, high = pack.bounds[3]
    pack.b[1][low:high] = float("inf")
    runs = [RunOfRows(0, 1, pack.mix((3, 1.0))), RunOfRows(1, 2, pack.mix((4, 1.0), (3, 0.0)))]
    x = torch.randn(2, INNER).to(DEVICE, HALF)
    y = torch.randn(2, sum(OUTS)).to(DEVICE, HALF)
    table = make_table()
    table.load(runs)
    out = run(pack, table, x, y)
    assert not torch.isfinite(out[0]).all()
    assert torch.isfinite(out[1]).all()


def test_the_device_buffer_is_reused_without_traces_of_the_last_step():
    pack = make_pack(INNER, OUTS, HALF)
    table = make_table()
    address = table.buffer.data_ptr()
    x = torch.randn(43, INNER).to(DEVICE, HALF)
    y = torch.randn(43, sum(OUTS)).to(DEVICE, HALF)
    for name in ("decode beside prefill", "one row", "empty"):
        runs, _ = shape_of(pack, name)
        table.load(runs)
        out = run(pack, table, x, y)
        expected = y.double() + update_in_float64(pack, runs, x, OUTS)
        assert error_ratio(out, expected) < MAX_ERROR[HALF]
    assert torch.equal(out, y)
    assert table.buffer.data_ptr() == address


def test_steps_over_the_capacity_are_refused():
    pack = make_pack(INNER, OUTS, HALF)
    table = SegmentTable(max_rows=8, max_row_rank=16, max_components=1, device=DEVICE)
    with pytest.raises(ValueError, match="9 rows"):
        table.load([RunOfRows(0, 9, pack.mix((1, 1.0)))])
    with pytest.raises(ValueError, match="rows times ranks"):
        table.load([RunOfRows(0, 2, pack.mix((6, 1.0)))])
    with pytest.raises(ValueError, match="2 components"):
        table.load([RunOfRows(0, 1, pack.mix((1, 1.0), (2, 1.0)))])
