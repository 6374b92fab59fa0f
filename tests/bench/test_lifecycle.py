"""The inputs of bench/lifecycle.py: traces and adapters."""

from __future__ import annotations

import importlib
import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from transformers import LlamaConfig

from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.models.families import read_arch

BENCH = ROOT / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of bench/, which is a folder of scripts."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_a_trace_has_the_gaps_it_was_asked_for(bench: Any, cv: float) -> None:
    workload = bench("scale.workload")
    asked = workload.Workload(num_requests=20_000, rate=8.0, cv=cv)
    trace = workload.draw(asked, ["a"])
    times = [0.0, *(arrival.seconds for arrival in trace)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.05)
    assert {len(arrival.prompt) for arrival in trace} == set(range(16, 65))
    assert {arrival.new_tokens for arrival in trace} == set(range(8, 33))
    assert trace == workload.draw(asked, ["a"])


def test_many_adapters_differ_and_share_files(bench: Any, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    many = bench("scale.many_loras")
    names = many.write_many_loras(tmp_path / "root", 40, arch=read_arch(config), base_model="tiny")
    root = AdapterRoot(tmp_path / "root")
    read = [read_checkpoint(root, name, max_elements=1 << 20) for name in names]
    assert len({checkpoint.digest for checkpoint in read}) == 40
    assert [checkpoint.config["r"] for checkpoint in read[:5]] == [16, 64, 8, 32, 16]
    files = {(tmp_path / "root" / n / "adapter_model.safetensors").stat().st_ino for n in names}
    assert len(files) == 16
