"""Triton kernels of mixtures of experts, compared with references and with each row alone."""

from __future__ import annotations

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, MAX_ERROR, error_ratio
from ptx.addresses import address_of

from turret.kernels.expert_routing import Routing, combine_reference, route_reference
from turret.kernels.gpu.experts import add_expert_updates, combine_experts, nf4_experts, route_rows
from turret.kernels.gpu.tables import RowTable
from turret.kernels.nf4_matmul import MXFP4, NF4, Format, Nf4Matrix


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def weight_of(experts: int, out: int, inner: int, weight_format: Format = NF4) -> Nf4Matrix:
    generator = torch.Generator().manual_seed(1)
    size = experts * out * inner
    packed = torch.randint(0, 256, (size // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(size // weight_format.block, generator=generator) / inner**0.5
    if weight_format == MXFP4:
        absmax = absmax.log2().floor().exp2().to(torch.bfloat16)
    packed, absmax = packed.to(DEVICE), absmax.to(DEVICE)
    return Nf4Matrix(packed, absmax, experts * out, inner, weight_format)


def check(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert error_ratio(found, exact) <= MAX_ERROR[dtype]


def skewed(rows: int, experts: int, per_token: int) -> Routing:
    """Scores for which one expert gets every row, and one gets none."""
    scores = random(rows, experts, seed=rows)
    scores[:, 1] += 50.0
    scores[:, -1] -= 50.0
    return route_rows(scores, per_token, normalizes=True)


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "per_token"), [(8, 2), (7, 3), (128, 8), (3, 3), (1, 1)])
def test_routes_every_row_to_its_likeliest_experts(
    experts: int, per_token: int, dtype: torch.dtype, *, normalizes: bool
) -> None:
    scores = random(19, experts + 1, dtype=dtype)[:, :experts]
    scores[3] = scores[3, :1]  # all equal
    found = route_rows(scores, per_token, normalizes=normalizes)
    expected = route_reference(scores.cpu(), per_token, normalizes=normalizes)
    for name in ("rows", "experts", "ends", "places"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    torch.testing.assert_close(found.weights.cpu(), expected.weights, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scores_that_are_nan_stay_in_bounds() -> None:
    scores = random(3, 5)
    scores[1] = float("nan")
    routing = route_rows(scores, 5, normalizes=True)
    for row in range(3):
        assert sorted(routing.experts[routing.places[row]].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("gathers", "stored"),
    [(True, NF4), (False, NF4), (True, MXFP4), (False, MXFP4), (True, None)],
    ids=["nf4", "nf4 of pairs", "mxfp4", "mxfp4 of pairs", "numbers"],
)
@pytest.mark.parametrize(("rows", "out", "inner"), [(1, 48, 64), (18, 72, 128)])
def test_multiplies_every_pair_by_its_expert(
    rows: int, out: int, inner: int, dtype: torch.dtype, *, gathers: bool, stored: Format | None
) -> None:
    experts = 6
    quantized, routing = weight_of(experts, out, inner, stored or NF4), skewed(rows, experts, 3)
    weight = quantized if stored else quantized.dequantize(dtype)
    x = random(rows, 2 * inner, dtype=dtype)[:, :inner]
    given = x if gathers else x[routing.rows].contiguous()
    reads = routing.rows if gathers else None
    found = nf4_experts(given, weight, routing, reads)
    exact_weight = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)
    dense = exact_weight.view(experts, out, inner).double()
    exact = torch.einsum("poi,pi->po", dense[routing.experts], x[routing.rows].double())
    check(found, exact, dtype)
    for row in {0, rows - 1}:
        alone = Routing(
            torch.zeros_like(routing.rows[:3]),
            *_alone(routing, row, experts),
            torch.arange(3, device=DEVICE)[None],
            routing.weights[row : row + 1],
        )
        own = nf4_experts(x[row : row + 1], weight, alone, alone.rows)
        assert torch.equal(own, found[routing.places[row].sort().values])


def _alone(routing: Routing, row: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of a row's pairs, and their ends."""
    chosen = routing.experts[routing.places[row]].sort().values
    return chosen, torch.searchsorted(chosen, torch.arange(experts, device=DEVICE), right=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_pairs_by_their_weights(dtype: torch.dtype) -> None:
    routing = skewed(11, 5, 3)
    y = random(33, 1100, dtype=dtype)
    expected = combine_reference(y.cpu(), _on_cpu(routing))
    check(combine_experts(y, routing).cpu(), expected, dtype)


def _on_cpu(routing: Routing) -> Routing:
    names = ("rows", "experts", "ends", "places", "weights")
    return Routing(*(getattr(routing, name).cpu() for name in names))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize(("rank", "inner", "out"), [(3, 72, 40), (20, 200, 150)])
def test_adds_every_pairs_update(
    rank: int, inner: int, out: int, dtype: torch.dtype, *, gathers: bool
) -> None:
    rows, experts, slots = 9, 4, 3
    routing = skewed(rows, experts, 2)
    a = (random(slots, experts, rank, inner) / inner**0.5).to(dtype)
    b = (random(slots, experts, rank, out) / rank**0.5).to(dtype)
    table = RowTable(16, DEVICE)
    of_row = [(2, 0.5), (-1, 1.0), (0, -2.0), (1, 1.0), (-1, 0.0), (2, 1.5), (0, 1.0)]
    numbers, weights = zip(*of_row, strict=True)
    table.load(range(len(of_row)), numbers, weights)
    x = random(rows, inner, dtype=dtype)
    given = x if gathers else x[routing.rows].contiguous()
    start = random(2 * rows, out, dtype=dtype, seed=5)
    y = start.clone()
    # Each factor is a separate tensor, so that reads past its end are detected.
    kept = [(a[slot].clone(), b[slot].clone()) for slot in range(slots)]
    factors = torch.tensor([[address_of(t) for t in pair] for pair in kept], device=DEVICE)
    factors[1] = 0
    add_expert_updates(given, y, factors, rank, table, routing, routing.rows if gathers else None)
    exact = start.double()
    for pair in range(2 * rows):
        row, expert = int(routing.rows[pair]), int(routing.experts[pair])
        slot, weight = of_row[row] if row < len(of_row) else (-1, 0.0)
        if slot < 0 or slot == 1:
            assert torch.equal(y[pair], start[pair])
            continue
        v = a[slot, expert].double() @ x[row].double()
        exact[pair] += weight * (v @ b[slot, expert].double())
    check(y, exact, dtype)
