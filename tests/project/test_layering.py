"""Imports between packages follow the contracts of pyproject.toml ([tool.importlinter])."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

# An import that breaks a contract, and the contract.
FORBIDDEN = {
    ("kernels/rows.py", "from turret.server import errors"): "packages",
    ("server/engine/engine.py", "from turret.server.rpc import interceptor"): "server",
    (
        "server/adapters/lowering.py",
        "from turret.server.adapters import registry",
    ): "adapters",
    ("fleet/follower.py", "from turret.fleet import replica"): "fleet",
    ("fleet/replica.py", "import ray"): "the fleet's state machines need no Ray",
    ("clients/client.py", "import torch"): "servers and clients need no torch",
    ("server/api/call.py", "import grpc"): "only the gRPC server needs grpc",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without symbolic links and namespace packages, which the linter does not follow."""
    copy = tmp_path_factory.mktemp("layering")
    skipped = shutil.ignore_patterns("__pycache__", "*.so", "static")
    shutil.copytree(ROOT / "src" / "turret", copy / "turret", ignore=skipped)
    for folder in (copy / "turret").iterdir():
        if folder.is_dir():
            (folder / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def broken(package: Path) -> set[str]:
    """The contracts that the linter reports as broken."""
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    result = subprocess.run(
        [*lint, "--no-cache"],
        cwd=package,
        env={"PYTHONPATH": str(package), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = {
        line.rpartition(" BROKEN")[0] for line in result.stdout.splitlines() if " BROKEN" in line
    }
    assert (result.returncode == 0) == (found == set()), result.stdout + result.stderr
    if found:
        print(result.stdout)
    return found


def test_imports_follow_the_layers(package: Path) -> None:
    assert broken(package) == set()


def test_a_forbidden_import_is_found(package: Path) -> None:
    before = {}
    for name, line in FORBIDDEN:
        path = package / "turret" / name
        before[path] = path.read_text()
        path.write_text(f"{before[path]}\n{line}\n")
    assert broken(package) == set(FORBIDDEN.values())
    for path, text in before.items():
        path.write_text(text)


def test_root_folders_are_not_packages() -> None:
    """A ``kernels/__init__.py`` would shadow Hugging Face's package of that name."""
    assert sorted(ROOT.glob("*/__init__.py")) == []


def test_folders_below_them_are_packages() -> None:
    """Without an ``__init__.py`` a folder would be missing from the wheel."""
    links = [path.resolve() for path in (ROOT / "src" / "turret").iterdir() if path.is_symlink()]
    folders = {path.parent for top in links for path in top.rglob("*.py")} - set(links)
    assert {folder for folder in folders if not (folder / "__init__.py").exists()} == set()
