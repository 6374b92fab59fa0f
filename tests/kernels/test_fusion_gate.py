"""``fusion_gate``: the reference against float64, Triton against the same.

Planted faults, and how many of the tests here each one fails (tried by hand):

- first part of v only: 2
- every component gated: 2
- position counted from the table's start: 2
- query of slice 0: 2
- key dimensions past the first block dropped: 2
- reference: three ranks per component: 1
"""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_traffic import DEVICE, HALF, error_ratio, make_pack

from turret.kernels.adapters.fusion_gate import fusion_gate_reference
from turret.kernels.adapters.segments import LongSegment
from turret.kernels.gpu.adapters.fusion_gate import fusion_gate
from turret.kernels.gpu.adapters.segmented_shrink import segmented_shrink
from turret.kernels.gpu.tables.segment_table import SegmentTable

INNER, OUTS, D_K = 60, (24, 12), 40


def gates_in_float64(pack, runs, x, q, keys, gated):
    """Per row, slice and component, by loops; 1 where a component is not gated."""
    gates = torch.ones(x.shape[0], len(OUTS), 4, dtype=torch.float64, device=DEVICE)
    for run in runs:
        for row in range(run.start, run.end):
            for s in range(len(OUTS)):
                scores = {}
                for i, c in enumerate(run.members):
                    if gated[c.slot]:
                        n = int(pack.slice_ranks[c.slot, s])
                        v = pack.a[c.rank_start : c.rank_start + n, s].double() @ x[row].double()
                        key = keys[c.rank_start : c.rank_start + n, s].double().T @ v
                        scores[i] = q[row, s].double() @ key
                if scores:
                    values = torch.stack(list(scores.values())).softmax(0)
                    gates[row, s, list(scores)] = values
    return gates


@pytest.mark.parametrize("gemv", [False, True])
def test_gates(gemv):
    pack = make_pack(INNER, OUTS, HALF)
    keys = torch.randn(pack.a.shape[0], len(OUTS), D_K).to(DEVICE, HALF)
    gated = torch.tensor([0, 0, 1, 0, 1, 1, 1], dtype=torch.int32, device=DEVICE)
    runs = [
        LongSegment(0, 1, pack.mix((2, 1.0), (4, 1.0))),
        LongSegment(1, 3, pack.mix((1, 1.0), (5, 1.0), (2, 1.0), (6, 1.0))),
        LongSegment(3, 4, pack.mix((1, 1.0), (3, 1.0))),
        LongSegment(4, 5, pack.mix((6, 1.0))),
        LongSegment(5, 25, pack.mix((4, 1.0), (2, 1.0), (1, -1.0))),
    ]
    table = SegmentTable(max_rows=32, max_row_rank=256, max_components=4, device=DEVICE, gemv=gemv)
    table.load(runs)
    x = torch.randn(25, INNER).to(DEVICE, HALF)
    q = torch.randn(25, len(OUTS), D_K, device=DEVICE) * 0.3
    v = segmented_shrink(x, pack.a, pack.slice_ranks, table)
    gates = fusion_gate(q, v, keys, gated, table)
    expected = gates_in_float64(pack, runs, x, q, keys, gated)
    for run in runs:
        count = len(run.members)
        rows = slice(run.start, run.end)
        assert error_ratio(gates[rows, :, :count], expected[rows, :, :count]) < 1e-4


def test_reference():
    indptr = [0, 3, 11, 27]
    q, v = torch.randn(9, D_K), torch.randn(9, 27) * 0.2
    keys = torch.randn(27, D_K)
    gates = fusion_gate_reference(q, v, keys, indptr)
    scores = torch.stack(
        [
            ((v[:, lo:hi].double() @ keys[lo:hi].double()) * q.double()).sum(1)
            for lo, hi in itertools.pairwise(indptr)
        ],
        dim=1,
    )
    assert error_ratio(gates, scores.softmax(1)) < 1e-5
    for count in (1, 2, 3, 8):
        assert torch.equal(fusion_gate_reference(q[:count], v[:count], keys, indptr), gates[:count])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_reference_ignores_other_rows_and_the_row_s_place(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for d_k in (1, 3, 8, 16, 40, 100):
            for ranks in ([4, 8], [8, 0, 4], [1, 1], [3, 5, 7], [16] * 4, [64, 128], [1] * 9):
                indptr = [0, *itertools.accumulate(ranks)]
                q, v = torch.randn(300, d_k), torch.randn(300, indptr[-1])
                keys = torch.randn(indptr[-1], d_k) * 0.1
                whole = fusion_gate_reference(q, v, keys, indptr)
                for start, count in itertools.product((0, 1, 5), (1, 2, 7, 9, 33, 64, 66, 200)):
                    rows = slice(start, start + count)
                    got = fusion_gate_reference(q[rows], v[rows], keys, indptr)
                    assert torch.equal(got, whole[rows]), (d_k, ranks, start, count)
    finally:
        torch.set_num_threads(before)


def test_a_component_without_ranks_scores_zero():
    q, v, keys = torch.randn(5, 8), torch.randn(5, 6), torch.randn(6, 8)
    gates = fusion_gate_reference(q, v, keys, [0, 4, 4])
    score = ((v[:, :4].double() @ keys[:4].double()) * q.double()).sum(1)
    assert error_ratio(gates[:, 0], score.sigmoid()) < 1e-5


def test_breaches_of_the_contract_are_refused():
    pack = make_pack(INNER, OUTS, HALF)
    table = SegmentTable(max_rows=4, max_row_rank=8, max_components=1, device=DEVICE)
    x = torch.zeros(1, INNER, device=DEVICE, dtype=HALF)
    v = segmented_shrink(x, pack.a, pack.slice_ranks, table)
    q = torch.zeros(1, len(OUTS), D_K, device=DEVICE)
    keys = torch.zeros(8, len(OUTS), D_K, device=DEVICE, dtype=HALF)
    gated = torch.zeros(7, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="q is"):
        fusion_gate(q.half(), v, keys, gated, table)
    with pytest.raises(ValueError, match="q is"):
        fusion_gate(q[:, :1], v, keys, gated, table)
    with pytest.raises(ValueError, match="int32"):
        fusion_gate(q, v, keys, gated.long(), table)
