"""The kernel tests on code compiled for sm_90, executed without a GPU."""

from __future__ import annotations

import os

import pytest
from emulation import FAULT_TESTS, KERNEL_TESTS, run_emulated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU runs these tests"),
]


@pytest.mark.parametrize(
    ("dtype", "tiles", "more"),
    [
        ("bfloat16", "small", ()),
        pytest.param("bfloat16", "small", ("--every-case",), marks=pytest.mark.long),
        pytest.param("float16", "device", (), marks=pytest.mark.long),
    ],
)
def test_kernels(dtype, tiles, more):
    options = ("--emulate=sm_90", f"--emulated-dtype={dtype}", f"--emulated-tiles={tiles}", *more)
    run_emulated(*options, "--every-kernel", *KERNEL_TESTS)


def test_planted_faults():
    run_emulated("--every-case", FAULT_TESTS)


@pytest.mark.long
def test_a_wide_step():
    """Many iterations of every loop, with a GPU's tiles."""
    run_emulated("--emulate=sm_90", "--every-case", "-m", "long", "tests/emulated")
