"""The NF4 product of a run on a CPU, with and without a LoRA, against float64 and PEFT's layer."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

from turret.server.models.weights.nf4 import Nf4Weight
from turret.training import nf4_linear
from turret.training.nf4_linear import FrozenNf4Linear, LoraOnNf4, join_loras, product_dtype

OUT, IN, RANK, SCALING = 192, 576, 8, 2.0
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

    monkeypatch.setattr(nf4_linear, "product_dtype", chosen)
    return request.param


@pytest.mark.parametrize("has_lora", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_float64(
    product: torch.dtype, dtype: torch.dtype, has_bias: bool, has_lora: bool
) -> None:
    module = linear(dtype, has_bias=has_bias)
    x, grad = numbers(*SHAPE, seed=1, dtype=dtype), numbers(*SHAPE[:2], OUT, seed=2, dtype=dtype)
    a, b = numbers(RANK, IN, seed=3), numbers(OUT, RANK, seed=4)
    y = module(x, SCALING, a, b) if has_lora else module(x)
    assert y.dtype == dtype
    y.backward(grad)
    exact_x, exact_a, exact_b = (t.detach().double().requires_grad_() for t in (x, a, b))
    exact = exact_x @ module.dequantize(torch.float32).double().T
    if has_lora:
        exact = exact + SCALING * (exact_x @ exact_a.T) @ exact_b.T
    if has_bias:
        exact = exact + module.bias.double()
    exact.backward(grad.double())
    rounding = 1e-6 if dtype == torch.float32 else 5e-3
    assert error(y, exact) < rounding
    assert error(x.grad, exact_x.grad) < rounding
    if has_lora:
        # The factors' gradients are float32 all the way.
        assert error(a.grad, exact_a.grad) < 1e-6
        assert error(b.grad, exact_b.grad) < 1e-6


def test_only_the_input_and_the_factors_are_saved_for_the_backward_pass() -> None:
    module = linear(torch.bfloat16)
    x = numbers(*SHAPE, seed=1, dtype=torch.bfloat16)
    a, b = numbers(RANK, IN, seed=3), numbers(OUT, RANK, seed=4)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
        assert not kept
        module(x, SCALING, a, b)
    assert [t.numel() for t in kept] == [x.numel(), a.numel(), b.numel(), 21 * RANK]
    assert kept[0].data_ptr() == x.data_ptr()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = linear(torch.bfloat16)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.proj(x, **kwargs)


def adapted(**settings: Any) -> Any:
    torch.manual_seed(5)
    model = Model()
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["proj"], **settings)
    attached = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    torch.nn.init.normal_(layer_of(attached).lora_B["default"].weight)
    return attached


def layer_of(model: Any) -> Any:
    return model.base_model.model.proj


def run(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(6)
    y = model(x)
    model.zero_grad()
    y.float().square().sum().backward()
    return y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
def test_a_joined_lora_matches_peft(settings: dict[str, Any]) -> None:
    theirs = adapted(**settings)
    assert type(layer_of(theirs)) is LoraLinear4bit
    ours = copy.deepcopy(theirs)
    join_loras(ours)
    assert type(layer_of(ours)) is LoraOnNf4
    x = numbers(*SHAPE, seed=1, dtype=torch.bfloat16)
    for is_training in (True, False):
        found, expected = run(ours.train(is_training), x), run(theirs.train(is_training), x)
        for one, other in zip(found, expected, strict=True):
            # PEFT rounds the base, the change and the sum to bfloat16.
            assert error(one, other.double()) < 1e-2
    with ours.disable_adapter():
        assert torch.equal(ours(x), layer_of(ours).base_layer(x))


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
