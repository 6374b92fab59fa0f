"""The compiled product with a wide bf16 weight, compared with float64 and with each row alone.

Faults planted in the C code, and how many tests failed for each: inputs beyond the last 32 read
(4), two rows of three left (10), every other tile of rows left out (10), truncation to bf16 (2),
rows as far apart as they are long (10), the last output left out (10), a narrow tile's rows swapped
(8).
"""

from __future__ import annotations

import pytest
import torch
from kernel_traffic import error_ratio

from turret.kernels import cpu as native
from turret.kernels.cpu.products import dense_product, serves_dense
from turret.kernels.cpu.row_adapters import ExpertAdapters, ExpertTable
from turret.kernels.expert_routing import route_reference

MAX_ERROR = 4e-3  # one rounding to bf16 makes up to 2.3e-3 of the RMS


@pytest.mark.skipif(
    not serves_dense(torch.empty(0, dtype=torch.bfloat16)), reason="no compiled products here"
)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 8), (7, 32), (64, 33), (129, 95), (1003, 576)]
)
def test_rows_equal_float64_and_the_rows_alone(
    out_features: int, in_features: int, threads: int
) -> None:
    torch.manual_seed(out_features)
    weight = torch.randn(out_features, in_features).bfloat16()
    wide = torch.randn(23, in_features + 8).bfloat16()
    x = wide[:, 8:]
    exact = x.double() @ weight.double().T
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    alone = [dense_product(row[None], weight)[0] for row in x]
    found = [dense_product(x[:count], weight) for count in (1, 2, 3, 4, 5, 16, 22, 23)]
    torch.set_num_threads(before)
    for y in found:
        assert error_ratio(y, exact[: len(y)]) < MAX_ERROR
        assert torch.equal(y, torch.stack(alone[: len(y)]))


def test_unsupported_weights_are_not_served() -> None:
    assert not serves_dense(torch.empty(2, 2))
    assert not serves_dense(torch.empty(2, 2, dtype=torch.bfloat16, device="meta"))


# The compiled low-rank updates of experts, compared with float64 and with each pair alone.


pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
EXPERTS, IN, OUT, ROWS = 6, 96, 150, 20


def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.randn(EXPERTS, rank, IN) / IN**0.5
    return a.bfloat16(), torch.randn(EXPERTS, rank, OUT).bfloat16()


@pytest.mark.parametrize("gathers", [True, False])
def test_updates_match_float64_and_a_pair_alone(*, gathers: bool) -> None:
    torch.manual_seed(0)
    updates = [factors(rank) for rank in (1, 8, 20)]
    tables = [ExpertTable([None, pair]) for pair in updates]
    mixes = [[], [(0, 1.0)], [(1, -0.5), (2, 2.0)], [(2, 0.7), (1, 1.0), (0, 0.1)]]
    of_row = [mixes[row % 4] for row in range(ROWS - 3)]
    rows = [[(tables[k], weight) for k, weight in mix] for mix in of_row]
    routing = route_reference(torch.randn(ROWS, EXPERTS), 2, normalizes=True)
    wide = torch.randn(ROWS, 2 * IN).bfloat16()[:, :IN]
    x = wide if gathers else wide[routing.rows].contiguous()
    reads = routing.rows if gathers else None
    start = torch.randn(2 * ROWS, OUT).bfloat16()
    y = start.clone()
    ExpertAdapters(rows).adapt(1, x, y, routing, reads)
    for pair in range(2 * ROWS):
        row, expert = int(routing.rows[pair]), int(routing.experts[pair])
        expected = start[pair].double()
        for k, weight in of_row[row] if row < len(of_row) else ():
            a, b = (factor[expert].double() for factor in updates[k])
            expected = expected + weight * (a @ wide[row].double()) @ b
        assert (y[pair].double() - expected).abs().max() <= 2.0**-8 * expected.abs().max()
    again = start.clone()
    # The projection in which no adapter has an update.
    ExpertAdapters(rows).adapt(0, x, again, routing, reads)
    assert torch.equal(again, start)
    alone = route_reference(torch.zeros(1, EXPERTS), EXPERTS, normalizes=True)
    for row in range(4):
        own = torch.zeros(EXPERTS, OUT, dtype=torch.bfloat16)
        places = routing.places[row]
        experts = routing.experts[places]
        own[experts] = start[places]
        ExpertAdapters([rows[row]]).adapt(1, wide[row : row + 1], own, alone, alone.rows)
        assert torch.equal(own[experts], y[places])
