"""Every Triton kernel compiles for GPUs that this machine lacks, within a known budget.

``kernels/registers.json`` lists registers, shared memory, spills and instructions per unit of work,
per version of Triton, kernel and target, at the shapes of Llama-3.1-8B, Qwen2.5-0.5B and
SmolLM2-135M; ``python bench/aot.py --write kernels/registers.json`` writes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import triton
from checkout import ROOT
from emulation import defined_kernels

from turret.kernels.gpu.common import wgmma_stages

# Shared memory of one program. The limit of sm_80 is that of any card that runs its code (8.6 and
# 8.9 have 99 KiB, 8.0 has 163).
MAX_SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
# Kernels of the base's product, alone and combined with other work.
NF4_KERNELS = ("nf4_matmul", "nf4_rotate", "nf4_shrink", "nf4_experts")


@pytest.fixture(scope="module")
def compiled() -> dict:
    """The output of ``bench/aot.py``, in a separate process: in this one Triton interprets."""
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
    """The stored kernels, by version of Triton."""
    return json.loads((ROOT / "kernels" / "registers.json").read_text())


def rows_of(versions: dict, kernel: str = "") -> list[tuple[str, str, dict]]:
    """The name, target and numbers of every form of a kernel."""
    return [
        (f"{version} {name}", target, used)
        for version, kernels in versions.items()
        for name, targets in kernels.items()
        for target, used in targets.items()
        if name.startswith(kernel)
    ]


def over(versions: dict, kernel: str, allowed: Callable[[str], float]) -> dict[str, float]:
    """Forms of a kernel that take more instructions per unit of work than allowed."""
    rows = [row for row in rows_of(versions, f"{kernel}[") if row[1].startswith("sm_")]
    assert rows
    return {
        f"{name} {target}": used["instructions"]
        for name, target, used in rows
        if used["instructions"] > allowed(name)
    }


def nf4_limit(name: str) -> float:
    if "IS_MXFP4=True" in name:
        # A scale is applied for every 32 weights, not 64.
        return 5.6
    if "ROWS=" not in name:
        # A tile of experts has at most 16 pairs.
        return 4.5
    return {"16": 4.5, "32": 5.2, "64": 6.8}[name.split("ROWS=")[1][:2]]


def expand_limit(name: str) -> float:
    """The limit is two and a half times lower than with tiles of 64 columns."""
    # Instructions with those tiles: with gates, with gains and biases, and with neither.
    before = 59.9
    if "no gates" in name:
        before = 84.3
    elif "gates" in name.split("16 |")[0]:
        before = 54.5
    return before / 2.5


@pytest.mark.long
def test_nothing_spills_and_everything_fits(compiled):
    found = {}
    for name, targets in compiled["kernels"].items():
        assert set(targets) == set(MAX_SHARED_BYTES), name
        for target, used in targets.items():
            if used["spills"] or used["shared_bytes"] > MAX_SHARED_BYTES[target]:
                found[f"{name} {target}"] = used
    assert found == {}


@pytest.mark.long
def test_work_per_unit_is_within_bounds(compiled):
    versions = {compiled["triton"]: compiled["kernels"]}
    for kernel in NF4_KERNELS:
        assert over(versions, kernel, nf4_limit) == {}
    assert over(versions, "segmented_expand", expand_limit) == {}


@pytest.mark.long
def test_the_table_is_current(compiled, recorded):
    kernels = recorded.get(compiled["triton"])
    for known in recorded.values():
        assert set(known) <= set(compiled["kernels"]), "run bench/aot.py"
    if kernels is not None:
        for name, targets in compiled["kernels"].items():
            assert targets == kernels[name], name
    assert any(len(known) == len(compiled["kernels"]) for known in recorded.values())


def test_the_table_has_no_spill_and_everything_fits(recorded):
    """Checks the committed table, without compilation."""
    rows = rows_of(recorded)
    assert len(rows) > 800
    assert [(name, target, used) for name, target, used in rows if used["spills"]] == []
    large = [row for row in rows if row[2]["shared_bytes"] > MAX_SHARED_BYTES[row[1]]]
    assert large == []


def test_the_table_covers_the_oldest_and_the_newest_version(recorded):
    """Machines with GPUs have either version; other versions only have to meet the limits."""
    oldest, newest = sorted(recorded, key=lambda version: [int(p) for p in version.split(".")])
    assert oldest == "3.6.0"
    assert set(recorded[oldest]) == set(recorded[newest])


@pytest.mark.parametrize(("version", "stages"), [("3.6.0", 1), ("3.9.0", 4), ("3.10.1", 4)])
def test_copies_do_not_overlap_wgmma_if_triton_omits_the_fence(monkeypatch, version, stages):
    """The emulator rejects the code of Triton 3.6 for sm_90 for this reason."""
    monkeypatch.setattr(triton, "__version__", version)
    assert wgmma_stages(4) == stages


def test_the_table_is_within_the_bounds(recorded):
    for kernel in NF4_KERNELS:
        assert over(recorded, kernel, nf4_limit) == {}
    assert over(recorded, "segmented_expand", expand_limit) == {}
    assert over(recorded, "segmented_shrink", lambda name: 3.5) == {}


def test_a_value_over_its_bound_is_reported():
    """The checks above detect a form that takes too much."""
    row = {"sm_90": {"instructions": 11.1}}
    versions = {"x": {"nf4_matmul[ROWS=64]": row, "nf4_sum[PARTS=2]": {"sm_90": {}}}}
    assert list(over(versions, "nf4_matmul", nf4_limit).values()) == [11.1]


def test_attention_overlaps_loads_of_keys_with_products(recorded):
    """At least two groups of copies stay in flight while the loop over keys waits."""
    rows = [row for row in rows_of(recorded, "paged_attention[") if row[1].startswith("sm_")]
    assert len(rows) >= 8
    assert [row for row in rows if row[2]["copies_under_way"] < 2] == []


def test_every_kernel_is_in_the_table(recorded):
    defined = {name.removesuffix("_kernel") for name in defined_kernels()}
    assert len(defined) > 10
    newest = max(recorded, key=lambda version: [int(part) for part in version.split(".")])
    assert {name.split("[")[0] for name in recorded[newest]} == defined


# ``tests/emulated/test_compiling.py``, in a process without Triton's interpreter.


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
