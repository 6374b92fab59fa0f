"""``constant_attention``: the reference against float64, and each row by itself.

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
from kernel_traffic import error_ratio

from turret.kernels.adapters.constant_attention import Constants, constant_attention_reference
from turret.kernels.cpu import native

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
