"""Random soft tokens, prefixes, rows, pooled LoRAs and fusions, compared with PEFT's.

Fusions are compared with the paper's formula on dense matrices. The engine's own tests cover the
use of all of these.
"""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import (
    base_of,
    linear_modules,
    lower_adapter,
    lower_with_components,
    tiny_llama,
)
from builders.methods import ALL, drawing, load_adapter, make_config, quiet, save_adapter
from builders.mixes.fusions import fusion_oracle, save_fusion
from builders.mixes.gates import gated
from builders.mixes.xloras import LORAS, save_loras, save_xlora
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from turret.server.adapters.base import BaseModel
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.gate import Gate
from turret.server.engine.step import first_scalings, scalings

EXAMPLES = 20
DRAWING = drawing(EXAMPLES)
Draw = Callable[[st.SearchStrategy[Any]], Any]
VOCAB = 96
COMPONENTS = ("a", "b", "c")


@functools.cache
def model() -> tuple[LlamaForCausalLM, BaseModel]:
    built = tiny_llama()
    return built, base_of(built)


def prompt_tuning(draw: Draw) -> dict[str, Any]:
    return {"num_virtual_tokens": draw(st.integers(1, 40))}


def p_tuning(draw: Draw) -> dict[str, Any]:
    kind = draw(st.sampled_from(["MLP", "LSTM"]))
    # An MLP always has two layers.
    layers = draw(st.integers(1, 3)) if kind == "LSTM" else 2
    keys = {"encoder_reparameterization_type": kind, "encoder_num_layers": layers}
    return {**prompt_tuning(draw), **keys, "encoder_hidden_size": draw(st.integers(1, 40))}


def cpt(draw: Draw) -> dict[str, Any]:
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30))
    kinds = draw(st.sampled_from([1, 2, 3, 4]))
    masks = {"cpt_mask": [1] * len(tokens), "cpt_tokens_type_mask": [kinds] * len(tokens)}
    return {"cpt_token_ids": tokens, **masks}


def prefix_tuning(draw: Draw) -> dict[str, Any]:
    keys = {"prefix_projection": draw(st.booleans())}
    return {**prompt_tuning(draw), **keys, "encoder_hidden_size": draw(st.integers(1, 40))}


def cartridge(draw: Draw) -> dict[str, Any]:
    tokens = draw(st.integers(1, 40))
    return {"num_virtual_tokens": tokens, "num_frozen_tokens": draw(st.integers(0, tokens - 1))}


def lowered(method: str, keys: dict[str, Any], seed: int) -> tuple[Any, AdapterOperators]:
    """A saved adapter as read by PEFT and by turret."""
    plain, base = model()
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(plain, make_config(method, **keys), Path(folder) / "a", seed=seed)
        oracle: Any = load_adapter(plain, Path(folder) / "a", share=True)
        return oracle, lower_adapter(Path(folder), base).operators


@pytest.mark.parametrize("method", [prompt_tuning, p_tuning, cpt], ids=lambda one: one.__name__)
def test_drawn_soft_tokens_match_those_that_peft_prepends(
    method: Callable[[Draw], dict[str, Any]],
) -> None:
    @DRAWING
    @given(data=st.data(), seed=st.integers(0, 99))
    @torch.no_grad()
    def check(data: st.DataObject, seed: int) -> None:
        oracle, operators = lowered(method.__name__, method(data.draw), seed)
        assert operators.soft_prompt is not None
        found = operators.soft_prompt.soft_tokens
        with quiet():
            (expected,) = oracle.get_prompt(batch_size=1)
        assert found is not None
        torch.testing.assert_close(found.float(), expected.float(), rtol=1e-6, atol=1e-6)
        assert found.abs().max() > 1e-3

    check()


@pytest.mark.parametrize("method", [prefix_tuning, cartridge], ids=lambda one: one.__name__)
def test_drawn_prefixes_match_the_keys_and_values_of_pefts_cache(
    method: Callable[[Draw], dict[str, Any]],
) -> None:
    @DRAWING
    @given(data=st.data(), seed=st.integers(0, 99))
    @torch.no_grad()
    def check(data: st.DataObject, seed: int) -> None:
        oracle, operators = lowered(method.__name__, method(data.draw), seed)
        assert operators.soft_prompt is not None
        prefix = operators.soft_prompt.prefix
        assert prefix is not None
        with quiet():
            cache = oracle.get_prompt(batch_size=1)
        assert len(cache.layers) == len(prefix.keys) == len(prefix.values)
        for layer, keys, values in zip(cache.layers, prefix.keys, prefix.values, strict=True):
            for found, expected in ((keys, layer.keys), (values, layer.values)):
                assert torch.equal(found, expected[0].transpose(0, 1))
                assert found.abs().max() > 1e-3

    check()


@DRAWING
@given(
    ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=VOCAB, unique=True),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_drawn_rows_match_pefts_embedding(ids: list[int], seed: int) -> None:
    oracle, operators = lowered("trainable_tokens", {"token_indices": ids}, seed)
    assert operators.tokens is not None
    rows = operators.tokens.embedding
    assert rows is not None
    assert rows.ids is not None
    assert rows.ids.tolist() == sorted(ids)
    every = torch.arange(VOCAB)
    expected = oracle.get_input_embeddings()(every)
    found = model()[0].get_input_embeddings()(every).index_copy(0, rows.ids, rows.values)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, plain = tmp_path_factory.mktemp("components"), model()[0]
    save_adapter(plain, make_config("lora", target_modules=ALL[:5]), root / "a", seed=1)
    save_adapter(plain, make_config("lora", r=9, target_modules=ALL[3:]), root / "b", seed=2)
    save_adapter(plain, make_config("vera"), root / "c", seed=3)
    return root


@torch.no_grad()
def check_fusion(root: Path, names: list[str], targets: list[str], d_k: int, seed: int) -> float:
    """Compare every module's change with the formula's; returns the largest change."""
    plain, base = model()
    save_fusion(plain, root, "fusion", names, targets, d_k=d_k, seed=seed)
    fused = lower_with_components(root, "fusion", base, names)
    oracle, _ = fusion_oracle(plain, root, "fusion")
    assert {path.rpartition(".")[2] for path in fused.operators.modules} == set(targets)
    largest = 0.0
    for path, operators in fused.operators.modules.items():
        gate = operators.get(Gate)
        assert gate is not None
        linear = linear_modules(plain)[path]
        generator = torch.Generator().manual_seed(len(path))
        x = torch.randn(5, linear.in_features, generator=generator, dtype=torch.float64)
        weight, bias = linear.weight.double(), linear.bias
        own = torch.nn.functional.linear(x, weight, None if bias is None else bias.double())
        change = oracle.get_submodule(path)(x) - own
        error = float((gated(gate, x) - change).abs().max())
        assert error < 2e-6 * float(change.abs().max()), (path, error)
        largest = max(largest, float(change.abs().max()))
    return largest


def test_drawn_fusions_match_the_formula(components: Path) -> None:
    moved: list[float] = []

    @DRAWING
    @given(
        names=st.lists(st.sampled_from(COMPONENTS), min_size=2, unique=True),
        targets=st.lists(st.sampled_from(ALL[3:5]), min_size=1, unique=True),
        d_k=st.integers(1, 40),
        seed=st.integers(0, 99),
    )
    def check(names: list[str], targets: list[str], d_k: int, seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(shutil.copytree(components, Path(folder) / "root"))
            moved.append(check_fusion(root, names, targets, d_k, seed))

    check()
    assert len(moved) >= EXAMPLES
    assert min(moved) > 1e-3


# Random X-LoRAs that PEFT accepts, compared with both passes of PEFT.


NUM_TOKENS = 9
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loras")
    save_loras(tiny_llama(attention_bias=True), root)
    return root


def drawn(data: st.DataObject) -> dict[str, Any]:
    names = data.draw(st.lists(st.sampled_from(sorted(LORAS)), min_size=2, unique=True))
    keys = {
        "xlora_depth": st.integers(1, 4),
        "xlora_size": st.sampled_from([1, 5, 16, 33]),
        "xlora_dropout_p": st.sampled_from([0.0, 0.2]),
        "layerwise_scalings": st.booleans(),
        "enable_softmax": st.booleans(),
        "enable_softmax_topk": st.booleans(),
        "softmax_temperature": st.sampled_from([0.3, 1.0, 2.5]),
        "top_k_lora": st.sampled_from([None, *range(1, len(names) + 1)]),
        "scaling_pass_value": st.sampled_from([0.0, 0.0, 0.3, -0.5]),
        "global_scaling_weight": st.sampled_from([1.0, 0.5, -1.7]),
    }
    return {"loras": names, **{key: data.draw(values) for key, values in keys.items()}}


class Passes:
    """The values in PEFT's two passes over some tokens, in float64.

    Attributes:
        states: The inputs of the classifier, ``[tokens, hidden]``.
        calls: By module, the input and the change of the output in each pass.
    """

    def __init__(self, made: Any, paths: list[str]) -> None:
        exact = copy.deepcopy(made).double()
        exact.base_model.internal_xlora_classifier.dtype = torch.float64
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        model = exact.base_model.lora_model.model
        for path in paths:
            module = model.get_submodule(path)
            if hasattr(module, "lora_A"):
                module.register_forward_hook(self._taker(path))
        classifier = exact.base_model.internal_xlora_classifier
        classifier.register_forward_pre_hook(self._take_states, with_kwargs=True)
        with quiet(), torch.no_grad():
            exact(input_ids=torch.arange(NUM_TOKENS)[None] * 5)

    def _take_states(self, _: Any, __: Any, told: Any) -> None:
        self.states: Tensor = told["result"].hidden_states[-1][0]

    def _taker(self, path: str) -> Any:
        def take(module: Any, args: Any, output: Tensor) -> None:
            change = output - module.base_layer(args[0])
            self.calls[path].append((args[0][0], change[0]))

        return take


@torch.no_grad()
def check_passes(loras: Path, keys: dict[str, Any]) -> float:
    """Compare every module's change in both passes with PEFT's; returns the largest change."""
    plain = tiny_llama(attention_bias=True)
    paths = list(linear_modules(plain))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(loras, Path(folder) / "root"))
        passes = Passes(save_xlora(plain, root, "drawn", **keys), paths)
        numbers = [str(number) for number in range(len(keys["loras"]))]
        operators = lower_with_components(root, "drawn", base_of(plain), numbers).operators
    router = operators.router
    assert router is not None
    first: Tensor | None = None
    if router.first_pass is not None:
        first = first_scalings(router, NUM_TOKENS, CPU)
    given_rows = (first, scalings(router, passes.states.float()))
    assert passes.calls.keys() == operators.modules.keys()
    largest = 0.0
    for path, calls in passes.calls.items():
        gate = operators.modules[path].get(Gate)
        assert gate is not None
        for told, (x, change) in zip(given_rows, calls, strict=True):
            if told is None:
                assert change.abs().max() == 0, path
                continue
            bound = 2e-6 * max(1.0, float(told.abs().max()))
            error = float((gated(gate, x, told) - change).abs().max())
            assert error < bound * float(x.abs().max()) + 1e-6 * float(change.abs().max()), (
                keys,
                path,
                error,
            )
            largest = max(largest, float(change.abs().max()))
    return largest


def test_drawn_routers_match_pefts(loras: Path) -> None:
    moved: list[float] = []

    @drawing(EXAMPLES)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        moved.append(check_passes(loras, drawn(data)))

    check()
    assert len(moved) >= EXAMPLES
    # The adapters must have an effect.
    assert min(moved) > 1e-3
