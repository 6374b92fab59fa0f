"""Every Triton kernel compiles for GPUs that are not here, within a known budget.

``kernels/registers.json`` lists registers, shared memory and spills per kernel and target at the
shapes of Llama-3.1-8B, Qwen2.5-0.5B and SmolLM2-135M; ``python bench/aot.py`` writes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from checkout import ROOT

# Shared memory of one program: sm_80 has 163 KiB, gfx942 64 KiB.
MAX_SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}


@pytest.fixture(scope="module")
def compiled() -> dict:
    """The compiler's output; in a process of its own, because here triton is an interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "bench/aot.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((ROOT / "kernels" / "registers.json").read_text())


@pytest.mark.slow
def test_nothing_spills_and_everything_fits(compiled):
    over = {}
    for name, targets in compiled["kernels"].items():
        assert set(targets) == set(MAX_SHARED_BYTES), name
        for target, used in targets.items():
            if used["spills"] or used["shared_bytes"] > MAX_SHARED_BYTES[target]:
                over[f"{name} {target}"] = used
    assert over == {}


@pytest.mark.slow
def test_the_table_is_current(compiled, recorded):
    assert list(compiled["kernels"]) == list(recorded["kernels"]), "run bench/aot.py"
    if compiled["triton"] == recorded["triton"]:
        assert compiled["kernels"] == recorded["kernels"]


def test_the_table_holds_no_spill(recorded):
    """The committed one, without compiling anything."""
    rows = [used for targets in recorded["kernels"].values() for used in targets.values()]
    assert len(rows) > 200
    assert not any(used["spills"] for used in rows)


def test_every_kernel_is_in_the_table(recorded):
    defined = set()
    for path in (ROOT / "kernels" / "gpu").glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("def ") and line.split("(")[0].endswith("_kernel"):
                defined.add(line.split("(")[0].removeprefix("def ").removesuffix("_kernel"))
    assert len(defined) > 10
    assert {name.split("[")[0] for name in recorded["kernels"]} == defined
