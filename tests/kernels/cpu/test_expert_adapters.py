"""The compiled low-rank updates of experts, compared with float64 and with each pair alone.

``native_checks.c`` tests the same without Python.
"""

from __future__ import annotations

import pytest
import torch

from turret.kernels.cpu import native
from turret.kernels.cpu.row_adapters import ExpertAdapters, ExpertTable
from turret.kernels.expert_routing import route_reference

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
