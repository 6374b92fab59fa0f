"""The benchmarks' arithmetic and inputs, and the existence of the functions that they measure."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from builders.adapters import (
    base_of,
    linear_modules,
    logits,
    lower_adapter,
    read_adapter,
    tiny_llama,
    with_operators,
)
from checkout import ROOT

from turret.server.adapters.device.store import KERNELS
from turret.server.adapters.methods import METHODS, method_for
from turret.server.adapters.operators.low_rank import ExpertLowRank
from turret.server.adapters.operators.modulated_base import ModulatedBase
from turret.server.models.families import read_arch

BENCH = ROOT / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of bench/, which is a folder of scripts."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_rates_count_the_tokens_after_the_first(bench: Any):
    batch = bench("common.batch")
    # The second request's first token arrives after three tokens of the first request.
    answers = [
        batch.Answer((1, 2, 3, 4, 5), (1.0, 1.5, 2.0, 2.5, 3.0), 0),
        batch.Answer((1, 2, 3, 4, 5), (2.0, 2.5, 3.0, 3.5, 4.0), 0),
    ]
    timing = batch.BatchTiming.of(answers)
    assert (timing.first_seconds, timing.total_seconds, timing.mean_first_seconds) == (
        2.0,
        4.0,
        1.5,
    )
    assert timing.decode_rate == 8 / 2.0
    assert timing.late_rate == 6 / 2.0


def test_the_floor_counts_what_a_step_must_read(bench: Any):
    floor = bench("common.floor")
    model = tiny_llama()
    arch = read_arch(model.config)
    linear = linear_modules(model)
    parts = floor.step_bytes(arch, requests=3, loras=2, rank=4, context=10)
    assert parts["base matmuls"] == sum(m.weight.numel() for m in linear.values()) * (0.5 + 2 / 64)
    assert parts["adapters"] == 2 * sum(2 * 4 * sum(m.weight.shape) for m in linear.values())
    # Three requests with ten tokens each, and two layers of keys and values with 2 heads of 16 in
    # bf16.
    assert parts["attention"] == 3 * 10 * 2 * 2 * 2 * 16 * 2
    assert parts["head"] == 2 * model.lm_head.weight.numel()
    rate = floor.read_bandwidth()
    assert 1e8 < rate < 1e13


def test_random_adapters_of_every_method_load(bench: Any, tmp_path: Path):
    model = tiny_llama()
    modules = linear_modules(model)
    norms = {name: module.weight.detach().norm(dim=1) for name, module in modules.items()}
    made = bench("common.adapters")
    names = made.write_random_methods(
        tmp_path, 12, arch=read_arch(model.config), base_model="tiny", rank=3, norms=norms
    )
    assert names[0] == "mixed-00-lora"
    assert names[-1] == "mixed-11-lora"
    base = base_of(model)
    lowered = {name: lower_adapter(tmp_path, base, name) for name in names}
    written = {method_for(read_adapter(tmp_path, name)).name for name in names}
    assert written == set(made.MIXED_METHODS) - {"rslora"} <= METHODS.keys()
    # The benchmark measures operators. The other methods have no further ones: gates belong to
    # learned fusions of registered adapters, which these files cannot name, and biases are just
    # added.
    operators = {kind.name for kind in KERNELS.keys() | {ModulatedBase}} - {ExpertLowRank.name}
    used = {
        part.name
        for adapter in lowered.values()
        for module in adapter.operators.modules.values()
        for part in module.operators
    }
    # Newer operators are not measured there, because the rates are compared with earlier results.
    later = {"input_blocks", "sparse", "pairs", "circulant", "dense", "modulated"}
    assert used == operators - {"gate", "bias"} - later
    plain = logits(model)
    for name, adapter in lowered.items():
        if adapter.operators.soft_prompt is None:
            assert adapter.operators.modules.keys() == modules.keys()
            moved = logits(with_operators(model, [(adapter.operators, 1.0)]))
            assert 0.01 < (moved - plain).norm() / plain.norm() < 1.5, name
        else:
            assert adapter.operators.soft_prompt.num_positions == 3


def test_every_timed_part_exists(bench: Any):
    parts = bench("steps").PARTS
    assert len(parts) > 5
    for part in parts:
        owner, attribute = part.locate()
        assert callable(getattr(owner, attribute))
