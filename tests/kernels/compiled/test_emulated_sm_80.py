"""The kernel tests on code compiled for sm_80, executed without a GPU."""

from __future__ import annotations

import os

import pytest
from emulation import KERNEL_TESTS, run_emulated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU runs these tests"),
]


@pytest.mark.parametrize(
    ("dtype", "tiles", "more"),
    [
        pytest.param("bfloat16", "device", ("--every-case",), marks=pytest.mark.long),
        ("float16", "small", ()),
    ],
)
def test_kernels(dtype, tiles, more):
    options = ("--emulate=sm_80", f"--emulated-dtype={dtype}", f"--emulated-tiles={tiles}", *more)
    run_emulated(*options, "--every-kernel", *KERNEL_TESTS)
