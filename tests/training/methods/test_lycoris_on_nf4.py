"""LoHa and LoKr on 4-bit modules: gradients and the dense formula, checkpoints and PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from builders.methods import load_adapter, make_config
from method_oracle import check_score, oracle_logprobs, prompt_of, twin
from peft import get_peft_model
from servers.engine_harness import EngineHarness, make_request
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from turret.training.lycoris import (
    Nf4LohaLinear,
    Nf4LokrLinear,
    hadamard_product,
    kronecker_product,
)

F64 = torch.float64


def random(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def loha_factors(out: int, wide: int, rank: int) -> list[torch.Tensor]:
    shapes = [(out, rank), (rank, wide), (out, rank), (rank, wide)]
    return [random(*shape, dtype=F64, seed=i) for i, shape in enumerate(shapes)]


def lokr_factors(rank: int | None) -> list[torch.Tensor]:
    """Factors for 12 inputs as 3·4, and 10 outputs as 2·5."""
    w2 = [(5, 4)] if rank is None else [(5, rank), (rank, 4)]
    shapes = [(2, 3), *w2]
    return [random(*shape, dtype=F64, seed=i) for i, shape in enumerate(shapes)]


def dense_loha(x, w1a, w1b, w2a, w2b):
    return x @ (1.5 * (w1a @ w1b) * (w2a @ w2b)).T


def dense_lokr(x, w1, *w2):
    return x @ (1.5 * torch.kron(w1, w2[0] @ w2[1] if len(w2) == 2 else w2[0])).T


def check_against_dense(product, dense, x: torch.Tensor, factors: list[torch.Tensor]) -> None:
    found, expected = product(x, *factors), dense(x, *factors)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = random(*expected.shape, seed=9).detach()
    both = [torch.autograd.grad((y * weights).sum(), [x, *factors]) for y in (found, expected)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_products_and_gradients_are_those_of_the_dense_formula():
    def loha(x, *factors):
        return hadamard_product(x, *factors, scaling=1.5)

    def lokr(x, w1, *w2):
        return kronecker_product(x, w1, w2, 1.5)

    x = random(2, 9, 12)
    for out in (12, 10):
        check_against_dense(loha, dense_loha, x, loha_factors(out, 12, 2))
    for rank in (None, 1, 3):
        check_against_dense(lokr, dense_lokr, x, lokr_factors(rank))


class LargestResult(TorchDispatchMode):
    """Records the largest number of elements in a result of any operation."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes() // 8)
        return result


def test_the_dense_update_is_never_built():
    out, wide, tokens = 160, 144, 8
    x = random(tokens, wide)
    cases = [
        # The largest tensor has r² (in + out) elements, compared with in · out = 23040.
        (lambda *f: hadamard_product(x, *f, scaling=1.0), loha_factors(out, wide, 3), 9 * out),
        (
            lambda w1, *w2: kronecker_product(x, w1, w2, 1.0),
            [random(2, 2), random(80, 4), random(4, 72)],
            tokens * out,
        ),
    ]
    for product, factors, most in cases:
        with LargestResult() as watched:
            product(*factors).sum().backward()
        assert watched.largest <= most < out * wide


def nf4_model(folder: Path) -> Any:
    """The tiny model with bitsandbytes' linear modules."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # The packed CPU product has no gradient.
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False)


def trained(model: Any, steps: int) -> list[torch.Tensor]:
    """Train for some steps; returns the trained tensors' gradients of the last step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    tokens = torch.tensor([prompt_of(24, 5)])
    grads: list[torch.Tensor] = []
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = None
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads = [p.grad.clone() for p in parameters]
        for parameter in parameters:
            parameter.grad *= 0.02 / parameter.grad.abs().max().clamp_min(1e-9)
        optimizer.step()
    return grads


VARIANTS = {
    "loha": {"r": 4},
    "lokr": {"r": 2},
    "lokr-whole": {"r": 64, "alpha": 80},
    "lokr-both": {"r": 1, "decompose_both": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
async def test_peft_and_the_server_read_adapters_trained_on_nf4(variant: str, tmp_path: Path):
    base = twin("llama")
    method = variant.partition("-")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = get_peft_model(nf4_model(base.folder), make_config(method, **VARIANTS[variant]))
        kind = Nf4LohaLinear if method == "loha" else Nf4LokrLinear
        assert sum(isinstance(module, kind) for module in model.modules()) == 14
        trained(model, steps=4)
        model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    # PEFT's own layers on the same dequantised weights.
    oracle = load_adapter(base.model, tmp_path / "adapter")
    for name, parameter in oracle.named_parameters():
        parameter.requires_grad_("hada_" in name or "lokr_" in name)
    grads, expected = trained(model, steps=1), trained(oracle, steps=1)
    assert len(grads) == len(expected) >= 28
    for one, other in zip(grads, expected, strict=True):
        # bitsandbytes rounds the dequantised weight slightly differently in float32.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    oracle = load_adapter(base.model, tmp_path / "adapter")
    prompt = prompt_of(19, 1)
    effect = oracle_logprobs(oracle, prompt) - oracle_logprobs(base.model, prompt)
    assert effect.abs().max() > 0.05
    async with EngineHarness.start(base.folder, tmp_path, adapters=["adapter"]) as harness:
        answer = await harness.run(make_request(prompt, "adapter", score=True))
        check_score(answer, oracle, prompt, variant)


def test_the_layers_are_used_on_4_bit_modules_only():
    model = nn.ModuleDict({"q_proj": Linear4bit(64, 128, bias=False), "k_proj": nn.Linear(64, 32)})
    adapted = get_peft_model(model, make_config("loha", r=2, task_type=None))
    kinds = {name.split(".")[-1]: type(m) for name, m in adapted.named_modules()}
    assert kinds["q_proj"] is Nf4LohaLinear
    assert kinds["k_proj"] is not Nf4LohaLinear


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_dropout_drops_outputs_only_in_training(method: str):
    base = nn.ModuleDict({"q_proj": Linear4bit(64, 128, bias=False, compute_dtype=torch.float32)})
    base.to("cpu")
    config = make_config(method, r=2, task_type=None, init_weights=False, rank_dropout=0.5)
    layer: Any = get_peft_model(base, config).get_submodule("base_model.model.q_proj")
    x = random(5, 64, dtype=torch.float32)
    update = layer.eval()._get_delta_activations("default", torch.eye(64)).T
    layer.train()
    whole = layer._get_delta_activations("default", x)
    layer.eval()
    torch.testing.assert_close(layer._get_delta_activations("default", x), x @ update.T)
    dropped = (whole == 0).all(0)
    assert 30 < int(dropped.sum()) < 98
    kept = (~dropped).float().mean() if method == "loha" else 1.0
    torch.testing.assert_close(whole[:, ~dropped], (x @ update.T)[:, ~dropped] / kept)
