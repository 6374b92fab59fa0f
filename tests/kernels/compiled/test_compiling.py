"""``tests/emulated/test_compiling.py``, in a process without Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from checkout import ROOT

pytestmark = pytest.mark.slow


def test_kernels_are_compiled_ahead_as_launches_ask_for_them() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "tests/emulated/test_compiling.py",
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
