"""The files in deploy/ name things that exist."""

from __future__ import annotations

import json
import re

from checkout import ROOT

from turret.server.cli import build_parser
from turret.server.config import ListenConfig
from turret.server.metrics import Metrics

DEPLOY = ROOT / "deploy"


def test_dashboard_asks_for_metrics_that_exist():
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    text = " ".join(target["expr"] for p in dashboard["panels"] for target in p["targets"])
    asked = set(re.findall(r"turret_\w+", text))
    known = set()
    for family in Metrics().registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        known |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    assert len(asked) >= 10
    assert asked <= known


def test_prometheus_scrapes_the_default_address():
    assert f'"{ListenConfig().metrics_address}"' in (DEPLOY / "prometheus.yml").read_text()


def test_image_runs_commands_that_exist():
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    found = re.search(r"^CMD (\[.+\])$", dockerfile, re.MULTILINE)
    assert found is not None
    command = json.loads(found[1])
    args = build_parser(command[0]).parse_args(command)
    assert args.address == "0.0.0.0:50051"
    health = re.search(r"CMD turret (health .+) \$", dockerfile)
    assert health is not None
    assert build_parser("health").parse_args(health[1].split()).address == "127.0.0.1:50051"
