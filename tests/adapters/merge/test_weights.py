"""The weights that a merge stores, compared with bitsandbytes and with PEFT's merged model."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from builders.methods import load_adapter, make_config, quiet, save_adapter
from method_oracle import serve, twin
from servers.engine_harness import EngineHarness

from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.base import Precision
from turret.server.adapters.merger import KEPT_ERROR
from turret.server.basics.work import Cancellation
from turret.server.models.weights.nf4 import (
    DenseLinear,
    MixedLinear,
    Nf4Weight,
    join_linears,
    nf4_linear,
)

# Qwen2 has biases; q and o are square.
ARCHITECTURE = "qwen2"
METHODS = (
    *("lora", "dora", "loha", "lokr", "ia3", "vera", "hra", "glora"),
    *("oft", "boft", "road", "c3a", "hira", "fourierft", "randlora", "osf", "frod", "miss"),
)
# All methods but FRoD, which adapts only some modules.
EVERYWHERE = [name for name in METHODS if name != "frod"]
SOME = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each method, and the LoRA ``some``, which adapts only a few modules."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, method in enumerate(METHODS):
        config = make_config(method, **({"init_weights": "bat"} if method == "miss" else {}))
        save_adapter(twin(ARCHITECTURE).model, config, folder / method, seed=seed)
    some = make_config("lora", target_modules=SOME)
    save_adapter(twin(ARCHITECTURE).model, some, folder / "some", seed=9)
    return folder


Weights = dict[str, tuple[torch.Tensor, torch.Tensor | None]]


def linears(model: Any) -> Weights:
    return {
        name: (module.weight.detach().float(), module.bias)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


@functools.cache
def merged_by_peft(adapter: Path) -> Weights:
    """PEFT's ``merge_and_unload`` on the fp32 twin: path → weight and bias."""
    model: Any = load_adapter(twin(ARCHITECTURE).model, adapter)
    # FRoD's sparse matrices cause warnings.
    with quiet():
        return linears(model.merge_and_unload())


def merged_mix(root: Path, mix: list[AdapterRef]) -> Weights:
    """``W + Σ w_k (W_k − W)``, with PEFT's ``W_k``."""
    base = linears(twin(ARCHITECTURE).model)
    result = {name: (weight.clone(), bias) for name, (weight, bias) in base.items()}
    for ref in mix:
        for name, (weight, bias) in merged_by_peft(root / ref.name).items():
            total, total_bias = result[name]
            total += ref.weight * (weight - base[name][0])
            own = base[name][1]
            if bias is not None and own is not None and total_bias is not None:
                total_bias = total_bias + ref.weight * (bias - own)
            result[name] = total, total_bias
    return result


def requantized(weight: torch.Tensor) -> torch.Tensor:
    """Quantise to NF4 (block 64, double quantisation) and dequantise, by bitsandbytes alone."""
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return bnb_functional.dequantize_4bit(packed, state)


MIXES = [[AdapterRef(name=name)] for name in METHODS] + [
    [AdapterRef(name="some", weight=-0.5)],
    [AdapterRef(name="lora", weight=0.25), AdapterRef(name="dora", weight=0.75)],
    [AdapterRef(name=name, weight=0.3) for name in METHODS],
]


@pytest.mark.parametrize("precision", ["BF16", "NF4"])
async def test_merging_rounds_the_exact_weights_once(root: Path, precision: Precision) -> None:
    """Checks weights, biases and the report, for every method and for mixes."""
    async with serve(ARCHITECTURE, root, adapters=[*METHODS, "some"]) as server:
        for mix in MIXES:
            names = [ref.name for ref in mix]
            before = server.registry.base.modules
            state = server.merger.merge(mix, precision, Cancellation())
            errors: dict[str, float] = {}
            squares = torch.zeros(3, dtype=torch.float64)
            for path, (exact, bias) in merged_mix(root, mix).items():
                module, own = server.registry.base.modules[path], before[path].dequantize()
                if torch.equal(exact, own):
                    assert torch.equal(module.dequantize(), own), path
                    continue
                stored = requantized(exact) if precision == "NF4" else exact.bfloat16().float()
                # PEFT sums in another order, so the nearest value occasionally differs.
                differs = (module.dequantize() - stored).abs() > 1e-6 * exact.abs().max()
                assert differs.double().mean() < 2e-3, (names, path)
                if bias is not None and module.bias is not None:
                    torch.testing.assert_close(module.bias, bias.detach(), rtol=1e-5, atol=1e-5)
                norms = [t.double().norm() for t in (stored - exact, exact, exact - own)]
                errors[path] = float(norms[0] / norms[1])
                squares += torch.stack(norms) ** 2
            assert state.merge is not None
            report = state.merge.report
            assert dict(report.modules) == pytest.approx(errors, rel=2e-3)
            error, exact_size, update_size = squares.sqrt().tolist()
            assert report.relative_error == pytest.approx(error / exact_size, rel=1e-3)
            assert report.update_error == pytest.approx(error / update_size, rel=1e-3)
            assert report.relative_error < (0.12 if precision == "NF4" else 0.003)
            server.merger.unmerge(Cancellation())


async def test_auto_chooses_nf4_only_if_the_update_survives(root: Path) -> None:
    """An update as large as the weights survives quantisation to 16 levels.

    A small one does not.
    """
    async with serve(ARCHITECTURE, root, adapters=["lora"]) as server:
        for weight, precision, most in ((1.0, "BF16", 0.5), (100.0, "NF4", KEPT_ERROR)):
            mix = [AdapterRef(name="lora", weight=weight)]
            merge = server.merger.merge(mix, None, Cancellation()).merge
            assert merge is not None
            assert (merge.precision, merge.report.update_error < most) == (precision, True)
            server.merger.unmerge(Cancellation())


def contents(linear: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a projection, including quantisation states."""
    found = {k: v for k, v in vars(linear).items() if isinstance(v, torch.Tensor)}
    state = getattr(linear, "_state", None)
    return found if state is None else {**found, "absmax": state.absmax}


def decoder_of(server: EngineHarness) -> Any:
    runner: Any = server.engine._loop._runner
    return runner._executor._decoder


def snapshot(server: EngineHarness) -> list[Any]:
    """Copies of all tensors of the linear layers."""
    found = []
    for layer in decoder_of(server).layers:
        for group in ("qkv", "o", "gate_up", "down"):
            linear = getattr(layer, group)
            tensors = {**contents(linear.base), "bias": linear.bias}
            found.append({k: None if t is None else t.clone() for k, t in tensors.items()})
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["BF16", "NF4"])
async def test_unmerge_restores_every_byte(root: Path, dtype: str, precision: Precision) -> None:
    async with serve(ARCHITECTURE, root, adapters=EVERYWHERE, dtype=dtype) as server:
        before, decoder = snapshot(server), decoder_of(server)
        epochs = [decoder.epoch]
        for _ in range(2):
            for name in EVERYWHERE:
                server.merger.merge([AdapterRef(name=name)], precision, Cancellation())
                epochs.append(decoder.epoch)
                merged = snapshot(server)
                assert len(merged) == len(before)
                assert not any(_equal(a, b) for a, b in zip(merged, before, strict=True))
                server.merger.unmerge(Cancellation())
                epochs.append(decoder.epoch)
        after = snapshot(server)
        assert len(set(epochs)) == len(epochs), "a captured step would read freed weights"
        assert all(_equal(a, b) for a, b in zip(after, before, strict=True))


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if value is not None else other[key] is None
        for key, value in one.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_parts_give_the_same_projection(dtype: torch.dtype) -> None:
    weights = [Nf4Weight.quantize(torch.randn(rows, 128)) for rows in (128, 64, 96)]
    whole = nf4_linear(weights, dtype, torch.device("cpu"))
    joined = join_linears(
        [whole.part(0), nf4_linear(weights[1:2], dtype, torch.device("cpu")), whole.part(2)]
    )
    x = torch.randn(3, 128).to(dtype)
    assert type(joined) is type(whole)
    assert joined.widths == whole.widths
    assert torch.equal(joined(x), whole(x))
    for index in range(3):
        assert torch.equal(joined.dequantize(index), whole.dequantize(index))
        assert torch.equal(whole.part(index)(x), whole(x).split(whole.widths, dim=1)[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_different_formats_are_multiplied_side_by_side(dtype: torch.dtype) -> None:
    weights = [Nf4Weight.quantize(torch.randn(rows, 128)) for rows in (128, 64, 96)]
    whole = nf4_linear(weights, dtype, torch.device("cpu"))
    dense = DenseLinear(torch.randn(64, 128).to(dtype), (64,))
    mixed = join_linears([whole.part(0), dense, whole.part(2)])
    x = torch.randn(3, 128).to(dtype)
    assert isinstance(mixed, MixedLinear)
    assert mixed.widths == whole.widths
    parts = mixed(x).split(mixed.widths, dim=1)
    expected = whole(x).split(whole.widths, dim=1)
    assert torch.equal(parts[0], expected[0])
    assert torch.equal(parts[1], dense(x))
    assert torch.equal(parts[2], expected[2])
    assert torch.equal(mixed.dequantize(1), dense.dequantize(0))
    assert torch.equal(mixed.part(2)(x), expected[2])
    pair = join_linears([dense, copy.copy(dense)])
    assert isinstance(pair, DenseLinear)
    assert torch.equal(pair.part(1)(x), dense(x))
