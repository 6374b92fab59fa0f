"""The product with all experts' weights has the bits of separate products."""

from __future__ import annotations

import itertools

import pytest
import torch

from turret.kernels.expert_routing import Routing, route_reference
from turret.server.models.sources.expert_stacks import dequantize_mxfp4
from turret.server.models.weights import BaseLinear
from turret.server.models.weights.nf4 import Nf4Weight, nf4_linear
from turret.server.models.weights.nf4_experts import Nf4Experts

CPU = torch.device("cpu")
IN, OUT, EXPERTS = 128, (64, 96), 5


def random_mxfp4(out: int, generator: torch.Generator) -> Nf4Weight:
    codes = torch.randint(0, 256, (out, IN // 32, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(119, 125, codes.shape[:2], generator=generator, dtype=torch.uint8)
    made = Nf4Weight.of_mxfp4(dequantize_mxfp4(codes, exponents))
    assert made is not None
    return made


def random_nf4(out: int, generator: torch.Generator) -> Nf4Weight:
    return Nf4Weight.quantize((0.1 * torch.randn(out, IN, generator=generator)).bfloat16())


# The kinds of weights of the experts, in turn.
KINDS = {"nf4": [random_nf4], "mxfp4": [random_mxfp4], "both": [random_nf4, random_mxfp4]}


def make(dtype: torch.dtype, kind: str) -> tuple[Nf4Experts, list[BaseLinear]]:
    generator = torch.Generator().manual_seed(0)
    kinds = itertools.islice(itertools.cycle(KINDS[kind]), EXPERTS)
    weights = [[make_weight(out, generator) for out in OUT] for make_weight in kinds]
    return Nf4Experts(weights, dtype, CPU), [nf4_linear(slices, dtype, CPU) for slices in weights]


def routing_of(rows: int) -> Routing:
    generator = torch.Generator().manual_seed(rows)
    scores = torch.randn(rows, EXPERTS, generator=generator)
    # One expert gets every row, and one gets none.
    scores[:, 1] += 100.0
    scores[:, 3] -= 100.0
    return route_reference(scores, 3, normalizes=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 9, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_has_the_bits_of_its_expert(kind: str, rows: int, dtype: torch.dtype) -> None:
    experts, linears = make(dtype, kind)
    routing = routing_of(rows)
    x = torch.randn(rows, IN).to(dtype)
    found = experts(x, routing, routing.rows)
    pairs = experts(x[routing.rows], routing, None)
    assert torch.equal(found, pairs)
    for pair, (row, expert) in enumerate(zip(routing.rows, routing.experts, strict=True)):
        assert torch.equal(found[pair], linears[int(expert)](x[row : row + 1])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_returns_the_weight_of_the_product(kind: str, dtype: torch.dtype) -> None:
    experts, linears = make(dtype, kind)
    for expert, linear in enumerate(linears):
        parts = [linear.dequantize(0), linear.dequantize(1)]
        assert torch.equal(experts.dequantize(expert), torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_multiplied_exactly(dtype: torch.dtype) -> None:
    """Every value fits into bf16, so only the results are rounded."""
    weight = random_mxfp4(64, torch.Generator().manual_seed(0))
    linear = nf4_linear([weight], dtype, CPU)
    assert torch.equal(linear.dequantize(0), weight.dequantize(torch.float32))
    x = torch.randn(70, IN).to(dtype)
    exact = x.double() @ weight.dequantize(torch.float32).double().T
    error = (linear(x).double() - exact).abs().max() / exact.abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 2.0**-8)
