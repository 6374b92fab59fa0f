"""Random X-LoRAs that PEFT accepts, compared with both passes of PEFT."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import base_of, linear_modules, tiny_llama
from builders.methods import drawing, quiet
from builders.mixes.gates import gated
from builders.mixes.xloras import LORAS, lower_xlora, save_loras, save_xlora
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from turret.server.adapters.operators.gate import Gate
from turret.server.engine.step.batch import first_scalings, scalings

EXAMPLES = 20
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
        operators = lower_xlora(root, "drawn", base_of(plain), numbers).operators
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
