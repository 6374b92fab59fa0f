"""The product with all experts' weights has the bits of separate products."""

from __future__ import annotations

import pytest
import torch

from turret.kernels.expert_routing import Routing, route_reference
from turret.server.models.weights.base_linear import BaseLinear
from turret.server.models.weights.nf4 import Nf4Weight, nf4_linear
from turret.server.models.weights.nf4_experts import Nf4Experts

CPU = torch.device("cpu")
IN, OUT, EXPERTS = 128, (64, 96), 5


def make(dtype: torch.dtype) -> tuple[Nf4Experts, list[BaseLinear]]:
    generator = torch.Generator().manual_seed(0)
    weights = [
        [
            Nf4Weight.quantize((0.1 * torch.randn(out, IN, generator=generator)).bfloat16())
            for out in OUT
        ]
        for _ in range(EXPERTS)
    ]
    return Nf4Experts(weights, dtype, CPU), [nf4_linear(slices, dtype, CPU) for slices in weights]


def routing_of(rows: int) -> Routing:
    generator = torch.Generator().manual_seed(rows)
    scores = torch.randn(rows, EXPERTS, generator=generator)
    # One expert gets every row, and one gets none.
    scores[:, 1] += 100.0
    scores[:, 3] -= 100.0
    return route_reference(scores, 3, normalizes=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 9, 70])
def test_a_pair_has_the_bits_of_its_expert(rows: int, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    experts, linears = make(dtype)
    routing = routing_of(rows)
    x = torch.randn(rows, IN).to(dtype)
    found = experts(x, routing, routing.rows)
    pairs = experts(x[routing.rows], routing, None)
    torch.set_num_threads(before)
    assert torch.equal(found, pairs)
    for pair, (row, expert) in enumerate(zip(routing.rows, routing.experts, strict=True)):
        assert torch.equal(found[pair], linears[int(expert)](x[row : row + 1])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_is_the_weight_that_is_multiplied(dtype: torch.dtype) -> None:
    experts, linears = make(dtype)
    for expert, linear in enumerate(linears):
        parts = [linear.dequantize(0), linear.dequantize(1)]
        assert torch.equal(experts.dequantize(expert), torch.cat(parts))
