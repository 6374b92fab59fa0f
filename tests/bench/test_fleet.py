"""The simulated fleet routes as the ingress does, and loses nothing."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from checkout import ROOT

NAMES = [f"adapter{number}" for number in range(200)]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("fleet")


@pytest.fixture
def model(bench: Any) -> Any:
    return importlib.import_module("scale.fleet_model")


@pytest.fixture
def workload(bench: Any) -> Any:
    return importlib.import_module("scale.workload")


def replicas(model: Any, count: int) -> list[Any]:
    return [model.Replica(number, model.Costs(), room=10) for number in range(count)]


def test_a_mix_stays_and_a_lost_replica_moves_no_others(model: Any) -> None:
    route, fleet = model.by_mix(4), replicas(model, 4)
    before = {name: route(name, fleet).number for name in NAMES}
    assert before == {name: route(name, fleet).number for name in NAMES}
    assert min(Counter(before.values()).values()) > 20
    after = {name: route(name, fleet[1:]).number for name in NAMES}
    assert all(after[name] == place for name, place in before.items() if place != 0)
    assert 0 not in after.values()


def test_a_popular_mix_spills_over(model: Any) -> None:
    route, fleet = model.by_mix(2), replicas(model, 2)
    for number in range(48):
        route("hot", fleet).waiting.append(number)
    assert sorted(replica.load for replica in fleet) == [12, 36]


@pytest.mark.parametrize("routing", ["by_mix", "evenly"])
def test_every_request_ends_though_a_replica_is_lost(
    model: Any, workload: Any, routing: str
) -> None:
    trace = workload.draw(workload.Workload(300, 20.0), NAMES)
    # Two minutes without a request, in which everything that came can end.
    late = workload.draw(workload.Workload(1, 1.0, seed=3), NAMES)[0]
    late = workload.Arrival(trace[-1].seconds + 120.0, late.adapter, late.prompt, late.new_tokens)
    for kill_at in (None, 5.0):
        route = getattr(model, routing)(3)
        run = model.simulate([*trace, late], 3, route, room=10, kill_at=kill_at)
        assert len(run.ends) == 300
        assert all(job.first is not None for job in run.jobs[:-1])


def test_it_runs_and_draws(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--replicas", "1", "4", "--seconds", "10", "--adapters", "300", "--room", "20"]
    assert (
        bench.main([*flags, "--svg", str(tmp_path / "a.svg"), "--json", str(tmp_path / "a.json")])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert (tmp_path / "a.svg").read_text().startswith("<svg")


def test_the_plot_says_what_its_axes_are(bench: Any) -> None:
    shares = {"cold_share": 0.5, "slo_share": 1.0, "p99_seconds": 0.2, "p99_killed_seconds": None}
    rows = [
        bench.Row(replicas=2, route=route, requests_per_second=8.0, **shares)
        for route in bench.ROUTES
    ]
    svg = ElementTree.fromstring(bench.draw_svg(rows, "a caption"))
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("replicas") == 2
