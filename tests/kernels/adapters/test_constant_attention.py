"""``constant_attention``: reference and kernel against float64, and each row by itself.

Planted faults, and how many of the tests here each one fails (tried by hand):

- positions that only fill up are seen: 6
- the row's maximum not taken off: 8
- halves instead of ones behind the values: 8
- keys of the first head for all: 6
- heads and rows exchanged: 6
- a library's product: 6
"""

from __future__ import annotations

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, HALF, MAX_ERROR, error_ratio
from ptx.addresses import address_of

from turret.kernels.adapters.constant_attention import Constants, constant_attention_reference
from turret.kernels.cpu import native
from turret.kernels.gpu.adapters.constant_attention import CONSTANT_WORDS, constant_attention
from turret.kernels.gpu.tables.member_table import MemberTable, RowMember

SHAPES = [(1, 2, 1, 16), (10, 6, 2, 32), (16, 4, 4, 64), (37, 9, 3, 24)]


@pytest.fixture(params=["native", "torch"])
def _formulation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)


@pytest.mark.usefixtures("_formulation")
@pytest.mark.parametrize(("positions", "heads", "kv_heads", "head_dim"), SHAPES)
def test_rows_get_the_formula_whatever_is_beside_them(
    positions: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    torch.manual_seed(positions)
    q = torch.randn(70, heads, head_dim)
    keys, values = torch.randn(2, positions, kv_heads, head_dim) * 2
    # As large as scores get, either way: without the row's maximum e to their power would be none.
    q[3] *= 100
    keys[..., 0], q[4], q[4, :, 0] = 3.0, 0.1, -200.0
    found = constant_attention_reference(q, Constants.of(keys, values))
    per_head = heads // kv_heads
    wide = [x.double().repeat_interleave(per_head, 1) for x in (keys, values)]
    weights = torch.einsum("rhd,phd->rhp", q.double(), wide[0]).softmax(-1)
    expected = torch.einsum("rhp,phd->rhd", weights, wide[1])
    assert error_ratio(found, expected) < 1e-5
    for rows in (slice(0, 1), slice(3, 4), slice(5, 38), slice(1, 70)):
        alone = constant_attention_reference(q[rows], Constants.of(keys, values))
        assert torch.equal(alone, found[rows])


def test_bytes_are_counted_as_they_are() -> None:
    constants = Constants.of(*torch.randn(2, 17, 3, 20))
    assert constants.keys.nbytes + constants.values.nbytes == Constants.num_bytes(17, 3, 20)


# Slot 2 has no constants in this layer.
MIXES = (
    *([], [(0, 1.0)], [(1, -0.5)], [(2, 1.0)], [(1, 0.5), (0, 0.75)]),
    *([(2, 1.0), (0, 2.0)], [(0, 0.25)], []),
)


class OnTriton:
    """Constants of two adapters, of which one takes several turns of the loop, and a step."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.kv_heads = kv_heads
        shape = (len(MIXES), heads, head_dim)
        # Rows of queries may have something between them.
        wide = torch.full((len(MIXES), heads + 1, head_dim), float("nan"))
        self.q = wide.to(DEVICE, dtype)[:, :heads]
        self.q.copy_(torch.randn(shape))
        # As large as scores get: without the row's maximum e to their power would be none.
        self.q[1] *= 30
        self.attended = torch.randn(shape).to(DEVICE, dtype)
        self.parts = [
            tuple(torch.randn(2, count, kv_heads, head_dim).to(DEVICE, dtype)) for count in (5, 37)
        ]
        self.words = torch.zeros(3, CONSTANT_WORDS, dtype=torch.int64)
        for slot, (keys, values) in enumerate(self.parts):
            words = [address_of(keys), address_of(values), len(keys), 0]
            self.words[slot] = torch.tensor(words)
        self.words = self.words.to(DEVICE)

    def run(self, rows: range) -> torch.Tensor:
        attended = self.attended[rows.start : rows.stop].clone()
        table = MemberTable(16, 2, DEVICE)
        mixes = [[RowMember(*member) for member in MIXES[row]] for row in rows]
        table.load([(number, number + 1, mix) for number, mix in enumerate(mixes)])
        q = self.q[rows.start : rows.stop]
        constant_attention(q, attended, self.kv_heads, self.words, table)
        return attended

    def exact(self, row: int) -> torch.Tensor:
        total, q = self.attended[row].double(), self.q[row].double()
        for slot, weight in MIXES[row]:
            if slot == 2:
                continue
            per_head = len(q) // self.kv_heads
            keys, values = (x.double().repeat_interleave(per_head, 1) for x in self.parts[slot])
            shares = torch.einsum("hd,phd->hp", q, keys).softmax(-1)
            total = total + weight * torch.einsum("hp,phd->hd", shares, values)
        return total


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 1, 16), (6, 2, 64), (3, 3, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_triton(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    case = OnTriton(heads, kv_heads, head_dim, dtype)
    found = case.run(range(len(MIXES)))
    for row, mix in enumerate(MIXES):
        if not any(slot < 2 for slot, _ in mix):
            assert torch.equal(found[row], case.attended[row])
        assert error_ratio(found[row], case.exact(row)) < MAX_ERROR[dtype]
        assert torch.equal(case.run(range(row, row + 1))[0], found[row])


def test_breaches_are_refused() -> None:
    case = OnTriton(6, 2, 16, HALF)
    q, attended, words = case.q, case.attended, case.words
    table = MemberTable(16, 2, DEVICE)
    for arguments, message in (
        ((q, attended.float(), 2, words), "attended"),
        ((q, attended[1:], 2, words), "attended"),
        ((q.transpose(1, 2), attended.transpose(1, 2).contiguous(), 2, words), "q has strides"),
        ((q, attended, 4, words), "6 heads do not share 4"),
        ((q, attended, 2, words[:, 1:]), "words"),
        ((q, attended, 2, words.float()), "words"),
    ):
        with pytest.raises(ValueError, match=message):
            constant_attention(*arguments, table)
