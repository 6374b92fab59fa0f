"""The experts of a row, and the sum of their results."""

from __future__ import annotations

import pytest
import torch

from turret.kernels import cpu as native
from turret.kernels.expert_routing import combine_reference, route_reference

DTYPES = [torch.float32, torch.bfloat16]


def scores_of(rows: int, experts: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * experts)
    return (2 * torch.randn(rows, experts, generator=generator)).to(dtype)


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize(("experts", "per_token"), [(8, 2), (5, 3), (128, 8), (3, 3), (1, 1)])
def test_weights_are_those_of_a_softmax(experts: int, per_token: int, *, normalizes: bool) -> None:
    scores = scores_of(17, experts)
    routing = route_reference(scores, per_token, normalizes=normalizes)
    top = scores.double().softmax(1).topk(per_token)
    expected = top.values / top.values.sum(1, keepdim=True) if normalizes else top.values
    torch.testing.assert_close(routing.weights.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(routing.experts[routing.places], top.indices)
    assert torch.equal(
        routing.rows[routing.places], torch.arange(17)[:, None].expand(-1, per_token)
    )


def test_the_pairs_of_an_expert_are_contiguous_in_row_order() -> None:
    routing = route_reference(scores_of(40, 6), 2, normalizes=True)
    assert torch.equal(routing.experts, routing.experts.sort().values)
    found = []
    for expert, pairs in routing.runs:
        assert set(routing.experts[pairs].tolist()) == {expert}
        rows = routing.rows[pairs].tolist()
        assert rows == sorted(rows)
        found += rows
    assert sorted(found) == sorted([*range(40)] * 2)
    assert routing.ends[-1] == 80


def test_experts_with_equal_scores_are_chosen_by_index() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    routing = route_reference(scores, 4, normalizes=True)
    assert routing.experts[routing.places].tolist() == [[1, 3, 2, 4]]


def test_an_expert_without_rows_has_no_run() -> None:
    scores = torch.full((3, 5), -1.0)
    scores[:, 2] = 1.0
    routing = route_reference(scores, 1, normalizes=True)
    assert routing.runs == ((2, slice(0, 3)),)
    assert routing.ends.tolist() == [0, 0, 3, 3, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalizes", [True, False])
def test_a_row_is_routed_the_same_alone_and_in_a_batch(
    dtype: torch.dtype, *, normalizes: bool
) -> None:
    scores = scores_of(33, 7, dtype)
    y = torch.randn(33 * 3, 20).to(dtype)
    routing = route_reference(scores, 3, normalizes=normalizes)
    together = combine_reference(y, routing)
    for row in range(33):
        alone = route_reference(scores[row : row + 1], 3, normalizes=normalizes)
        assert torch.equal(alone.weights[0], routing.weights[row])
        own = y[routing.places[row]][alone.places[0].argsort()]
        assert torch.equal(combine_reference(own, alone)[0], together[row])


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("isa", native.usable_isas())
@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize(("experts", "per_token"), [(64, 8), (21, 5), (3, 3), (1, 1)])
def test_the_compiled_kernel_gives_the_same_bits(
    isa: str, experts: int, per_token: int, monkeypatch: pytest.MonkeyPatch, *, normalizes: bool
) -> None:
    library = native.load(isa)
    monkeypatch.setattr(native, "library", lambda: library)
    scores = scores_of(60, experts, torch.bfloat16)
    scores[20:40] = scores[20:40].round()  # equal scores
    scores[40, ::2], scores[41, -1], scores[42, 0], scores[43] = torch.nan, torch.inf, -torch.inf, 0
    scores[43, ::2] *= -1  # -0
    expected = route_reference(scores, per_token, normalizes=normalizes)
    chosen = torch.empty(60, per_token, dtype=torch.int64)
    weights = torch.empty(60, per_token + experts)
    for row in range(60):
        sizes = experts, per_token, normalizes
        addresses = chosen[row].data_ptr(), weights[row].data_ptr()
        library.turret_choose_experts(scores[row].data_ptr(), *sizes, *addresses)
    assert torch.equal(chosen, expected.experts[expected.places])
    found = weights[:, :per_token].nan_to_num(-1.0)
    assert torch.equal(found, expected.weights.nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    routing = route_reference(scores_of(9, 6), 4, normalizes=False)
    y = torch.randn(36, 24).to(dtype)
    exact = (y.double()[routing.places] * routing.weights.double()[..., None]).sum(1)
    limit = 1e-6 if dtype == torch.float32 else 2.0**-8
    assert (combine_reference(y, routing).double() - exact).abs().max() <= limit * exact.abs().max()
