"""pytest plugin: kernel tests on the compiled kernels, executed without a GPU.

``pytest -p emulation --emulate sm_90 --emulated-dtype bfloat16 tests/kernels/…``, with
``TRITON_INTERPRET=0`` and ``PYTHONPATH=tests/support`` in the environment (``run_emulated``).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
_FILES = (
    *("nf4_matmul", "between", "one_launch", "sample_rows", "experts_triton"),
    "paged_attention_triton",
)
_ADAPTER_FILES = (*("segmented", "fusion_gate", "by_slot"),)
# The tests that run on compiled kernels: those of each kernel, and of a whole step.
KERNEL_TESTS = (
    *(f"tests/kernels/test_{name}.py" for name in _FILES),
    *(f"tests/kernels/adapters/test_{name}.py" for name in _ADAPTER_FILES),
    "tests/emulated/test_decode_step.py",
)
# These tests select target and tiles themselves.
FAULT_TESTS = "tests/emulated/test_faults.py"


def run_emulated(*arguments: str) -> str:
    """Run pytest in a separate process, in which triton compiles, and return its output.

    Raises:
        AssertionError: A test failed, or none was found.
    """
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(
            (str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", ""))
        ),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "emulation", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-kernel", action="store_true", help="fail if one was not launched")
    parser.addoption("--every-case", action="store_true", help="also those of the other target")
    parser.addoption("--emulate", choices=["sm_80", "sm_90"], default="sm_90")
    parser.addoption("--emulated-tiles", choices=["small", "device"], default="device")
    parser.addoption("--emulated-dtype", choices=["bfloat16", "float16"], default="bfloat16")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    import kernel_traffic
    import torch

    dtype = getattr(torch, str(config.getoption("--emulated-dtype")))
    kernel_traffic.HALF = dtype
    kernel_traffic.DTYPES[:] = [dtype]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests whose results other runs already cover.

    These are tests that are parametrised with fp32, tests of the torch path (kernels are compared
    with float64), and, without ``--every-case``, half of each test's cases, which run on the other
    target.
    """
    import torch

    cases = [
        item
        for item in items
        if torch.float32 not in _parameters(item)
        and not item.name.startswith("test_reference")
        and "torch_path" not in item.name
        and " in C, " not in item.name
        and " in torch, " not in item.name
    ]
    if not config.getoption("--every-case"):
        of_target = int(config.getoption("--emulate") == "sm_90")
        by_test = groupby(cases, lambda item: item.nodeid.split("[")[0])
        cases = [
            item
            for group in [list(found) for _, found in by_test]
            for number, item in enumerate(group)
            # Split into 0, 3, 4, 7 … and 1, 2, 5, 6 …: with every other case, each target would get
            # only one of two values of the last parameter.
            if len(group) == 1 or (number + number // 2) % 2 == of_target
        ]
    items[:] = cases


def _parameters(item: pytest.Item) -> list[object]:
    specification: Any = getattr(item, "callspec", None)
    return [] if specification is None else list(specification.params.values())


@pytest.fixture(autouse=True, scope="session")
def _emulator(request: pytest.FixtureRequest) -> Iterator[None]:
    from ptx.launcher import emulated

    target, tiles = (request.config.getoption(f"--{o}") for o in ("emulate", "emulated-tiles"))
    with emulated(str(target), tiles=str(tiles)) as launcher:
        yield
    if request.config.getoption("--every-kernel"):
        assert defined_kernels() - launcher.launches.keys() == set(), "kernels without a test here"


def defined_kernels() -> set[str]:
    """The names of all kernels that are launched from ``kernels/gpu``."""
    found: set[str] = set()
    for path in (ROOT / "kernels" / "gpu").rglob("*.py"):
        found.update(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    return found
