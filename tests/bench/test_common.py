"""The arithmetic and the inputs of the benchmarks."""

from __future__ import annotations

import importlib
import itertools
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import (
    base_of,
    linear_modules,
    logits,
    lower_adapter,
    tiny_llama,
    with_operators,
)
from builders.bases.tiny_models import save_tiny_model
from checkout import ROOT
from transformers import AutoModelForCausalLM, OlmoeConfig

from turret.clients.client import TurretClient
from turret.kernels.cpu import library
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.models.families import read_arch
from turret.training.base_model import find_base

BENCH = ROOT / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of bench/, which is a folder of scripts."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_rates_count_the_tokens_after_the_first(bench: Any):
    batch = bench("common.requests")
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


def test_a_shape_is_a_model_with_random_weights(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shapes, floor = bench("common.shapes"), bench("common.floor")
    sizes = shapes._sizes(64, 96, 2, 4, 2, 49152) | {"num_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setattr(shapes, "ROOT", tmp_path)
    monkeypatch.setitem(shapes.SHAPES, "tiny", lambda: OlmoeConfig(**sizes))
    folder = shapes.write_model("tiny")
    base = find_base(folder)
    assert base.arch.experts is not None
    assert base.tokenizer.encode("time people way", add_special_tokens=False)
    weights = shapes.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert 0.018 < float(weights["model.embed_tokens.weight"].float().std()) < 0.022

    def read(requests: int) -> float:
        parts = floor.step_bytes(base.arch, requests=requests, loras=0, rank=1, context=0)
        return parts["base matmuls"] / (0.5 + 2 / 64)

    # One row reads two of four experts, and many rows read all.
    expert = 3 * 64 * 96
    assert read(1000) - read(1) == pytest.approx(2 * 2 * expert)


def test_the_floor_counts_the_bytes_that_a_step_must_read(bench: Any):
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
    """Adapters of one rank and of default sizes change the logits enough, but not too much."""
    model = save_tiny_model("llama", tmp_path / "model")
    made = bench("common.adapters")
    write = made.Writer(tmp_path, find_base(model))
    names = [*write.mixed(11, 3), *write.defaults(7)]
    plain_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base = replace(base_of(plain_model), head_dim=32)
    plain = logits(plain_model)
    moves = {}
    for name in names:
        operators = lower_adapter(tmp_path, base, name).operators
        if operators.soft_prompt is None:
            moved = logits(with_operators(plain_model, [(operators, 1.0)]))
            moves[name] = float((moved - plain).norm() / plain.norm())
        else:
            assert operators.soft_prompt.num_positions == 3
    assert 0.01 < min(moves.values()) <= max(moves.values()) < 1.5, moves


def test_many_adapters_differ_and_share_files(bench: Any, tmp_path: Path):
    model = save_tiny_model("llama", tmp_path / "model")
    write = bench("common.adapters").Writer(tmp_path / "root", find_base(model))
    names = write.many_loras(10, (4, 2), ("q_proj",), 3)
    root = AdapterRoot(tmp_path / "root")
    read = [read_checkpoint(root, name, max_elements=1 << 20) for name in names]
    assert len({checkpoint.digest for checkpoint in read}) == 10
    assert [checkpoint.config["r"] for checkpoint in read[:4]] == [4, 2, 4, 4]
    files = {(tmp_path / "root" / n / "adapter_model.safetensors").stat().st_ino for n in names}
    assert len(files) == 3


def test_a_trace_has_the_requested_gaps_and_popularity(bench: Any) -> None:
    workload = bench("common.traces")
    asked = workload.Workload(num_requests=20_000, rate=8.0, cv=3.0)
    trace = workload.draw(asked, [f"{number}" for number in range(100)])
    times = [0.0, *(arrival.seconds for arrival in trace)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(3.0, rel=0.05)
    assert {len(arrival.prompt) for arrival in trace} == set(range(16, 65))
    assert {arrival.new_tokens for arrival in trace} == set(range(8, 33))
    counts = Counter(arrival.adapter for arrival in trace)
    total = sum(1 / rank for rank in range(1, 101))
    for rank in (1, 2, 10):
        share = counts[f"{rank - 1}"] / len(trace)
        assert share == pytest.approx(1 / rank / total, rel=0.1)


@pytest.mark.parametrize("script", ["lifecycle", "live_fleet", "prompts", "training"])
def test_every_script_starts(bench: Any, script: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench(script).main(["--help"])
    assert stopped.value.code == 0


# The share is at least 0.5 on an idle machine, but tests run in parallel.
LEAST_SHARE = 0.15


@pytest.mark.long
@pytest.mark.skipif(library() is None, reason="there is no C compiler")
def test_one_request_keeps_its_share_beside_a_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    neighbours = importlib.import_module("neighbours")
    common = importlib.import_module("common.session")
    args = common.make_parser("", 1).parse_args(["--force", "--no-save"])
    with common.session("neighbours", args) as run:
        loras = run.write.loras(1, 8)
        with run.serving(loras) as server, TurretClient(server.address) as client:
            source = neighbours.PromptSource(client, 64)
            neighbours.decode_rate(source, server.address, loras, 8)
            alone = neighbours.decode_rate(source, server.address, loras)
            with neighbours.busy_loop():
                beside = neighbours.decode_rate(source, server.address, loras)
    assert beside > LEAST_SHARE * alone
