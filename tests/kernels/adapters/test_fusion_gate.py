"""``fusion_gate``: the reference against float64, Triton against the same.

Planted faults, and how many of the tests here each one fails (tried by hand):

- first part of v only: 2
- every component gated: 2
- position counted from the table's start: 2
- query of slice 0: 2
- key dimensions past the first block dropped: 2
- reference: three ranks per component: 1

Of prototypes:

- signs kept: 6; in the reference 3
- of equals the last: 2; in the reference 7
- no temperature: 4; in the reference 3
- a component too many: 4; in the reference 11
- what is not gated counted among the best: 4
- position instead of slot: 6
- similarities of slice 0: 6
"""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_traffic import DEVICE, HALF, error_ratio, make_pack

from turret.kernels.adapters.fusion_gate import (
    fusion_gate_reference,
    given_gate_reference,
    routing_gate_reference,
)
from turret.kernels.adapters.segments import LongSegment
from turret.kernels.gpu.adapters.fusion_gate import fusion_gate, routing_gate
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


GATED = (0, 0, 1, 0, 1, 1, 1)


def runs_of(pack):
    return [
        LongSegment(0, 1, pack.mix((2, 1.0), (4, 1.0))),
        LongSegment(1, 3, pack.mix((1, 1.0), (5, 1.0), (2, 1.0), (6, 1.0))),
        LongSegment(3, 4, pack.mix((1, 1.0), (3, 1.0))),
        LongSegment(4, 5, pack.mix((6, 1.0))),
        LongSegment(5, 25, pack.mix((4, 1.0), (2, 1.0), (1, -1.0))),
    ]


@pytest.mark.parametrize("gemv", [False, True])
def test_gates(gemv):
    pack = make_pack(INNER, OUTS, HALF)
    keys = torch.randn(pack.a.shape[0], len(OUTS), D_K).to(DEVICE, HALF)
    gated = torch.tensor(GATED, dtype=torch.int32, device=DEVICE)
    runs = runs_of(pack)
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


def routed_in_float64(similarities, top_k, temperature):
    """Of the components of one row, by sorting; of equals the first counts."""
    scores = [abs(float(value)) for value in similarities]
    best = sorted(range(len(scores)), key=lambda k: (-scores[k], k))[:top_k]
    gates = torch.zeros(len(scores), dtype=torch.float64)
    kept = torch.tensor([scores[k] for k in best], dtype=torch.float64)
    gates[best] = (kept / temperature).softmax(0)
    return gates


def some_similarities(*shape):
    """Of both signs, and in some rows some that are equal, or all 0."""
    found = torch.randn(*shape)
    found[1::4, ..., 1] = -found[1::4, ..., 0]
    found[3::4] = 0.0
    return found


@pytest.mark.parametrize("gemv", [False, True])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.3), (16, 2.5)])
def test_gates_by_prototypes(gemv, top_k, temperature):
    pack = make_pack(INNER, OUTS, HALF)
    gated = torch.tensor(GATED, dtype=torch.int32, device=DEVICE)
    table = SegmentTable(max_rows=32, max_row_rank=256, max_components=4, device=DEVICE, gemv=gemv)
    table.load(runs_of(pack))
    similarities = some_similarities(25, len(OUTS), len(GATED))
    gates = routing_gate(similarities.to(DEVICE), gated, table, top_k, temperature).cpu()
    for run in runs_of(pack):
        slots = [member.slot for member in run.members]
        places = [i for i, slot in enumerate(slots) if GATED[slot]]
        for row in range(run.start, run.end):
            for s in range(len(OUTS)):
                expected = torch.ones(len(slots), dtype=torch.float64)
                if places:
                    mine = similarities[row, s, [slots[i] for i in places]]
                    expected[places] = routed_in_float64(mine, top_k, temperature)
                found = gates[row, s, : len(slots)]
                torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_reference_by_prototypes(count):
    for top_k, temperature in ((1, 1.0), (2, 0.3), (16, 2.5)):
        similarities = some_similarities(40, max(count, 2))[:, :count]
        gates = routing_gate_reference(similarities, top_k, temperature)
        for row, found in enumerate(gates):
            expected = routed_in_float64(similarities[row], top_k, temperature)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        for rows in (slice(0, 1), slice(3, 5), slice(7, 40)):
            alone = routing_gate_reference(similarities[rows], top_k, temperature)
            assert torch.equal(alone, gates[rows])


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


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("is_renormalised", [False, True])
def test_gates_by_a_classifier(temperature, top_k, is_renormalised):
    logits = some_similarities(33, 5)
    logits[3] = 0.0
    expected = logits.double()
    if temperature is not None:
        expected = (expected / temperature).softmax(-1)
    if top_k is not None:
        # A row of equal ones keeps the first.
        order = torch.arange(5, dtype=torch.float64) * 1e-12
        kept = (expected - order).topk(top_k).indices
        expected = expected * torch.zeros_like(expected).scatter(1, kept, 1.0)
    if is_renormalised:
        none = expected == 0
        weights = expected.masked_fill(none, float("-inf")).softmax(-1)
        expected = weights.masked_fill(none, 0.0)
    options = {"temperature": temperature, "top_k": top_k, "is_renormalised": is_renormalised}
    found = given_gate_reference(logits, **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    for rows in (slice(7, 8), slice(3, 30)):
        assert torch.equal(given_gate_reference(logits[rows], **options), found[rows])


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
    similarities = torch.zeros(1, len(OUTS), 7, device=DEVICE)
    with pytest.raises(ValueError, match="similarities is"):
        routing_gate(similarities.half(), gated, table, 2, 1.0)
    with pytest.raises(ValueError, match="similarities is"):
        routing_gate(similarities[..., :6], gated, table, 2, 1.0)
    for top_k, temperature in ((0, 1.0), (1, 0.0)):
        with pytest.raises(ValueError, match="above 0"):
            routing_gate(similarities, gated, table, top_k, temperature)
