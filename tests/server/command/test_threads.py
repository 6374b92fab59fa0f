"""The number of computing threads: affinity, quotas of cgroups, flags."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

from turret.server.command.threads import available_cpus


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "100000 100000"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("", {}, None),
    ],
)  # fmt: skip
def test_a_quota_limits_the_threads(
    tmp_path: Path, own: str, files: dict[str, str], cpus: int | None
) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    expected = len(os.sched_getaffinity(0)) if cpus is None else cpus
    assert available_cpus(tmp_path, tmp_path / "own") == expected


def test_training_sleeps_while_it_waits_and_steps_back() -> None:
    code = (
        "import os\nfrom turret.server.command.threads import use_threads\n"
        "before = os.nice(0)\nuse_threads(1, is_background=True, niceness=5)\nimport torch\n"
        "print(torch.get_num_threads(), os.nice(0) - before, os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.stdout.split() == ["1", "5", "passive"]
