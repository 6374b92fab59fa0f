"""The kernel tests on code compiled for sm_90, executed without a GPU."""

from __future__ import annotations

import os

import pytest
from emulation import FAULT_TESTS, KERNEL_TESTS, run_emulated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="beside a GPU's tests"),
]


@pytest.mark.parametrize(
    ("dtype", "tiles"),
    [("bfloat16", "small"), pytest.param("float16", "device", marks=pytest.mark.long)],
)
def test_kernels(dtype, tiles):
    options = ("--emulate=sm_90", f"--emulated-dtype={dtype}", f"--emulated-tiles={tiles}")
    run_emulated(*options, "--every-kernel", *KERNEL_TESTS)


def test_planted_faults():
    run_emulated("--emulated-dtype=bfloat16", FAULT_TESTS)


@pytest.mark.long
def test_a_wide_step():
    """Many turns of every loop with a GPU's own tiles."""
    run_emulated("--emulate=sm_90", "-m", "long", "tests/emulated")
