"""The inputs of bench/lifecycle.py, and the bars that its results are compared with."""

from __future__ import annotations

import importlib
import itertools
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from transformers import LlamaConfig

from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.metrics import Metrics
from turret.server.metrics_server import MetricsServer
from turret.server.models.families import read_arch

BENCH = ROOT / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of bench/, which is a folder of scripts."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_a_trace_has_the_gaps_and_popularity_it_was_asked_for(bench: Any) -> None:
    workload = bench("scale.workload")
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


def test_the_watch_sees_the_most_that_each_tier_held(bench: Any) -> None:
    metrics = Metrics()
    server = MetricsServer(metrics, "127.0.0.1:0")
    try:
        with bench("scale.memory_watch").MemoryWatch(server.address, os.getpid()) as watch:
            metrics.adapter_bytes(host=3 << 20, device=2 << 20)
            watch._look()
            metrics.adapter_bytes(host=1 << 20, device=1 << 20)
    finally:
        server.close()
    assert (watch.host_bytes, watch.device_bytes) == (3 << 20, 2 << 20)
    assert watch.rss_bytes > 0
    assert watch.num_samples >= 2


def document(rates: dict[int, float], **changes: Any) -> dict[str, Any]:
    """A document of bench/lifecycle.py with ideal values except for ``changes``."""
    result: dict[str, Any] = {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "x < y", "cores": 2},
        "scenario": {
            "model": "m",
            "ranks": [8],
            "targets": "all",
            "host_bytes": 100,
            "device_bytes": 50,
        },
        "registering": {"registered": max(rates), "seconds": 1.0, "bytes_each": 900},
        "cold": {"penalty_ms": 20.0},
        "interference": {"ratio": 1.0, "ttft_beside_cold_ms": 50.0, "ttft_beside_warm_ms": 50.0},
        "fairness": {"ratio": 0.1},
        "throughput": [
            {"registered": n, "requests_per_second": r, "rounds": [r, r]} for n, r in rates.items()
        ],
        "memory": [
            {"registered": n, "host_bytes_max": held, "device_bytes_max": 50, "rss_bytes_max": rss}
            for n, held, rss in zip(rates, (10, *[99] * 5), (1000, *[1106] * 5), strict=False)
        ],
    }
    for path, value in changes.items():
        part, _, key = path.partition("__")
        if key:
            result[part][key] = value
        else:
            result[part] = value
    return result


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, 0),
        ({"cold__penalty_ms": 61.0}, 1),
        ({"cold__penalty_ms": None}, 1),
        ({"interference__ratio": 1.11}, 1),
        ({"registering__seconds": 61.0, "registering__bytes_each": 2049}, 2),
        ({"scenario__host_bytes": 98, "scenario__device_bytes": 49}, 2),
        ({"fairness__ratio": 3.1}, 1),
        (
            {
                "memory": [
                    {
                        "registered": 10,
                        "host_bytes_max": 10,
                        "device_bytes_max": 1,
                        "rss_bytes_max": 100,
                    },
                    {
                        "registered": 1000,
                        "host_bytes_max": 90,
                        "device_bytes_max": 1,
                        "rss_bytes_max": 197,
                    },
                ]
            },
            1,
        ),
    ],
)
def test_a_bar_that_is_missed_is_named(bench: Any, changes: Any, missed: int) -> None:
    bars = bench("scale.bars").bars_of(
        document({5: 10.0, 10: 10.0, 1000: 9.6, 2000: 9.5}, **changes)
    )
    assert len(bars) == 10
    assert sum(not bar.passed for bar in bars) == missed


@pytest.mark.parametrize(
    ("rates", "missed"),
    [
        ({5: 9.0, 10: 10.0, 1000: 8.9, 2000: 8.6}, [1000]),
        ({5: 10.0, 10: 9.5, 1000: 9.1, 2000: 9.4}, [2000]),
        ({5: 10.0, 10: 10.0, 1000: 9.0, 2000: 9.45, 5000: 1.0}, []),
        ({5: 10.0, 100: 8.9}, [100]),
    ],
)
def test_throughput_must_hold(bench: Any, rates: Any, missed: list[int]) -> None:
    bars = bench("scale.bars").bars_of(document(rates))
    failed = [bar.name for bar in bars if not bar.passed]
    assert len(failed) == len(missed)
    assert all(f" {number} adapters" in name for name, number in zip(failed, missed, strict=True))


@pytest.mark.parametrize(
    ("ranks", "kept", "limit"),
    [([8], 0.944, 0.945), ([16, 64, 8, 32], 0.944, 0.899), ([16], 0.5, None)],
)
def test_the_share_that_s_lora_kept_is_that_of_the_same_ranks(
    bench: Any, ranks: list[int], kept: float, limit: float | None
) -> None:
    rates = {5: 10.0, 10: 10.0, 1000: 10.0, 2000: 10 * kept}
    bars = bench("scale.bars").bars_of(document(rates, scenario__ranks=ranks))
    found = [bar for bar in bars if "requests/s at 2000" in bar.name]
    assert [bar.limit for bar in found] == ([] if limit is None else [limit])
    assert all(bar.passed == (kept >= bar.limit) for bar in found)


def test_quantiles_are_values_that_were_seen(bench: Any) -> None:
    quantile = bench("scale.fairness").quantile
    assert [quantile([3.0, 1.0, 2.0], q) for q in (0.01, 0.5, 0.99)] == [1.0, 2.0, 3.0]
