"""``fusion_gate``: the reference and Triton compared with float64.

Planted faults, and how many of ``test_gates``, ``test_gates_in_fp32`` and
``test_a_step_without_gates_writes_nothing`` fail for each of them (tried by hand):

- first part of v only: 2
- first part of the queries only: 2
- query of slice 0 for all slices: 2
- key dimensions past the first block dropped: 2
- keys of the first component for all: 2
- every query item of an adapter is the first: 2
- position counted from the adapter's first component: 2

Faults in the reference, and the number of all tests here that fail:

- fusion: three ranks per component: 1
- prototypes: signs of similarities kept: 3
- top-k: the last of equal scores kept: 7
- prototypes: no temperature: 3
- top-k: one component too many: 11
"""

from __future__ import annotations

import itertools

import pytest
import torch
from builders.mixes.gated_pack import PLAIN, Fusion, GatedPack, routed_in_float64
from kernel_traffic import DEVICE, HALF, error_ratio

from turret.kernels.fusion_gate import (
    fusion_gate_reference,
    given_gate_reference,
    routing_gate_reference,
)
from turret.kernels.gpu.fusion_gate import fusion_gate, gate_shrink
from turret.kernels.gpu.low_rank import segmented_shrink

INNER, SLICES, D_K = 160, 2, 40
NUM_ROWS = 48
GATED = {
    # Queries of one length and of two, more ranks than a tile, a slice without a gate.
    "fusion": Fusion((8, 16, 5), (40, 40)),
    "narrow": Fusion((8, 8), (24, 7)),
    "half": Fusion((32, 24, 4, 8), (None, 16)),
    "many": Fusion((2,) * 9, (16, 5)),
}
MIXES = [
    [("fusion", 1.0)],
    [("narrow", 0.5), ("plain", 1.0), ("half", -1.0)],
    [("plain", 1.0)],
    [("half", 1.0)],
    [("plain", 0.3), ("half", 1.0), ("fusion", 1.0)],
    [("many", 1.0)],
    [("fusion", 1.0), ("narrow", 1.0), ("half", 1.0)],
    [],
]


def runs_of(pack):
    """Runs of one row each, and segments with fewer and with more rows than a chunk."""
    runs = [pack.run(row, row + 1, mix) for row, mix in enumerate(MIXES)]
    return [*runs, pack.run(12, 15, MIXES[4]), pack.run(15, 40, MIXES[6])]


def mix_of(row):
    return MIXES[4 if 12 <= row < 15 else 6 if row >= 15 else row]


def gates_by(pack, table, x):
    v = segmented_shrink(x, pack.a, pack.slice_ranks, table)
    q = gate_shrink(x, pack.words, table)
    return fusion_gate(q, v, pack.words, table, NUM_ROWS)


def check(pack, x, gates, rows):
    for row in rows:
        for s in range(SLICES):
            column = 0
            for name, _ in mix_of(row):
                if name == PLAIN:
                    column += 1
                    continue
                expected = pack.exact(name, s, x[row])
                if expected is None:
                    # A missing slice has no ranks, so its weights do not matter.
                    column += len(GATED[name].widths)
                    continue
                found = gates[row, s, column : column + len(expected)].cpu()
                assert error_ratio(found, expected) < 1e-4, (row, name, s)
                column += len(expected)


@pytest.fixture(scope="module")
def pack():
    torch.manual_seed(5)
    return GatedPack(INNER, SLICES, GATED, HALF)


def test_gates(pack):
    table = pack.table()
    table.load(runs_of(pack))
    # Memory after every row must not be read.
    wide = torch.full((NUM_ROWS, INNER + 9), float("nan"), device=DEVICE, dtype=HALF)
    x = wide[:, :INNER].copy_(torch.randn(NUM_ROWS, INNER))
    gates = gates_by(pack, table, x)
    check(pack, x, gates, [*range(len(MIXES)), *range(12, 40)])


def test_gates_in_fp32():
    found = GatedPack(64, SLICES, GATED, torch.float32)
    table = found.table()
    table.load(runs_of(found))
    x = torch.randn(NUM_ROWS, 64, device=DEVICE)
    check(found, x, gates_by(found, table, x), range(len(MIXES)))


def test_a_row_has_the_same_bits_alone_and_in_a_table_of_another_size(pack):
    """The bits do not depend on the number of other rows or on the lengths of their mixes."""
    x = torch.randn(NUM_ROWS, INNER).to(DEVICE, HALF)
    table, small = pack.table(), pack.table(NUM_ROWS, max_row_rank=96)
    table.load(runs_of(pack))
    together = gates_by(pack, table, x)
    for row, mix in enumerate(MIXES):
        for alone in (small, pack.table(max_components=32, max_gates=8)):
            alone.load([pack.run(row, row + 1, mix)])
            gates = gates_by(pack, alone, x)
            column = 0
            for member in pack.run(row, row + 1, mix).gated:
                own = slice(member.begin, member.end)
                assert torch.equal(gates[row, :, own], together[row, :, own]), (row, member)
                column = member.end
            assert column <= 16


def test_a_step_without_gates_writes_nothing(pack):
    """A step without gated adapters writes nothing."""
    x = torch.randn(NUM_ROWS, INNER).to(DEVICE, HALF)
    table = pack.table()
    table.load([pack.run(0, 30, [(PLAIN, 1.0)]), pack.run(30, 31, [])])
    gates_by(pack, table, x)
    assert table.buffer[8].item() == 0


def test_steps_over_the_capacity_are_refused(pack):
    mix = [("fusion", 1.0), ("narrow", 1.0)]
    with pytest.raises(ValueError, match="2 gates"):
        pack.table(max_gates=1).load([pack.run(0, 1, mix)])
    with pytest.raises(ValueError, match="64 products with queries"):
        pack.table(1, max_row_query=63).load([pack.run(0, 1, mix)])
    pack.table(1, max_row_query=64).load([pack.run(0, 1, mix)])


def some_similarities(*shape):
    """Similarities of both signs; in some rows, some are equal, or all are 0."""
    found = torch.randn(*shape)
    found[1::4, ..., 1] = -found[1::4, ..., 0]
    found[3::4] = 0.0
    return found


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
def test_reference_ignores_other_rows_and_the_position_of_a_row(num_threads):
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
        # A row of equal similarities keeps the first ones.
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


def test_a_component_of_rank_zero_scores_zero():
    q, v, keys = torch.randn(5, 8), torch.randn(5, 6), torch.randn(6, 8)
    gates = fusion_gate_reference(q, v, keys, [0, 4, 4])
    score = ((v[:, :4].double() @ keys[:4].double()) * q.double()).sum(1)
    assert error_ratio(gates[:, 0], score.sigmoid()) < 1e-5
