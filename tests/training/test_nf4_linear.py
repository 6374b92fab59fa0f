"""The NF4 product of a run on a CPU, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit

from turret.server.models.weights.nf4 import Nf4Weight
from turret.training import base_model
from turret.training.base_model import FrozenNf4Linear, product_dtype

OUT, IN = 192, 576
SHAPE = (3, 7, IN)


def linear(dtype: torch.dtype, *, has_bias: bool = False) -> FrozenNf4Linear:
    generator = torch.Generator().manual_seed(0)
    module = Linear4bit(IN, OUT, bias=has_bias, compute_dtype=dtype)
    weight = Nf4Weight.quantize(torch.randn(OUT, IN, generator=generator) / 24)
    stats = weight.state.as_dict(packed=True)
    module.weight = Params4bit.from_prequantized(weight.packed, stats, device="cpu", module=module)
    weight.state.dtype = dtype
    if has_bias:
        module.bias = torch.nn.Parameter(torch.randn(OUT, generator=generator).to(dtype))
    before = weight.dequantize(torch.float32)
    FrozenNf4Linear.freeze(module)
    assert isinstance(module, FrozenNf4Linear)
    assert torch.equal(module.dequantize(torch.float32), before)
    return module.requires_grad_(False)


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).requires_grad_()


def error(found: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    assert found is not None
    assert exact is not None
    assert found.shape == exact.shape
    found, exact = found.detach().double(), exact.detach()
    return float((found - exact).norm() / exact.norm())


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["by float32", "by bfloat16"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype in which bfloat16 activations are multiplied; a processor has one of the two."""

    def chosen(dtype: torch.dtype) -> torch.dtype:
        return request.param if dtype == torch.bfloat16 else torch.float32

    monkeypatch.setattr(base_model, "product_dtype", chosen)
    return request.param


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_float64(
    product: torch.dtype, dtype: torch.dtype, has_bias: bool
) -> None:
    module = linear(dtype, has_bias=has_bias)
    x, grad = numbers(*SHAPE, seed=1, dtype=dtype), numbers(*SHAPE[:2], OUT, seed=2, dtype=dtype)
    y = module(x)
    assert y.dtype == dtype
    y.backward(grad)
    exact_x = x.detach().double().requires_grad_()
    exact = exact_x @ module.dequantize(torch.float32).double().T
    if has_bias:
        exact = exact + module.bias.double()
    exact.backward(grad.double())
    rounding = 1e-6 if dtype == torch.float32 else 5e-3
    assert error(y, exact) < rounding
    assert error(x.grad, exact_x.grad) < rounding


def test_nothing_is_saved_for_the_backward_pass() -> None:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(torch.bfloat16)(numbers(*SHAPE, seed=1, dtype=torch.bfloat16))
    assert not kept


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_bfloat16_products_are_used_where_they_are_faster(
    capabilities: dict[str, Any], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    product_dtype.cache_clear()
    try:
        assert product_dtype(torch.bfloat16) == expected
        assert product_dtype(torch.float32) == torch.float32
    finally:
        product_dtype.cache_clear()
