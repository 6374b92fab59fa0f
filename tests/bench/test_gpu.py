"""The whole GPU benchmark works on tiny shapes in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from checkout import ROOT
from emulation import KERNEL_TESTS

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "TRITON_INTERPRET": "1"}
    command = ["bash", "bench/gpu.sh", *args]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.long
@WITHOUT_GPU
def test_dry_run(tmp_path):
    done = run("--dry-run", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "interpreter.jsonl").read_text().splitlines()]
    found = {row["scenario"] for row in rows}
    wanted = {
        *("memory read", "nf4_matmul", "paged_attention", "hadamard", "kronecker"),
        *("library product", "low rank", "sample_rows", "step base, tokens drawn"),
        *("step base", "step lora 1 distinct", "step dora 4 distinct", "step loha 4 distinct"),
        *("step lokr 4 distinct", "step lora 4 distinct, ranks mixed"),
    }
    assert wanted <= found
    for row in rows:
        assert {"gpu", "driver", "torch", "triton", "date", "commit"} <= set(row)
        # The row has the time for reading its bytes on an H100 beside the measured time.
        assert 0 < row["floor_ms"] < row["ms"], row


@pytest.mark.slow
@WITHOUT_GPU
def test_tuning_prints_a_row_for_the_table():
    done = run("--dry-run", "--tune")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"interpreter": Tuning(programs=' in done.stdout


@WITHOUT_GPU
def test_without_a_gpu_the_script_suggests_a_dry_run():
    done = run()
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


# Dependencies of the server other than torch, triton and numpy, which a machine with a GPU may
# lack.
BARE = """
import importlib.abc
import sys

NOT_HERE = {
    *("bitsandbytes", "gguf", "google", "grpc", "grpc_health", "grpc_status", "huggingface_hub"),
    *("llguidance", "prometheus_client", "rich", "safetensors", "starlette", "tokenizers"),
    *("transformers", "uvicorn"),
}

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NOT_HERE:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NotInstalled())
"""
ONE_STEP = """
sys.path.insert(0, "bench")
import gpu

sys.exit(gpu.main(["--dry-run", "--only", "one step"]))
"""
COLLECT = """
import pytest

options = ["-c", "/dev/null", "--rootdir", ".", "--noconftest", "-p", "no:cacheprovider"]
options += ["--import-mode=importlib", "--collect-only", "-q", "-W", "ignore"]
sys.exit(pytest.main([*options, *sys.argv[1:]]))
"""


def run_bare(program: str, *args: str) -> None:
    """Run a program that can import only torch, triton and numpy (and pytest)."""
    environment: dict[str, Any] = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = f"src{os.pathsep}tests/support"
    command = [sys.executable, "-c", BARE + program, *args]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@WITHOUT_GPU
def test_a_step_runs_on_a_bare_machine():
    run_bare(ONE_STEP)


@pytest.mark.slow
@WITHOUT_GPU
def test_the_tests_it_names_run_on_a_bare_machine():
    run_bare(COLLECT, *named_tests())


def named_tests() -> list[str]:
    script = (ROOT / "bench" / "gpu.sh").read_text()
    return [word for word in script.split() if word.startswith("tests/") and ".py" in word]


@WITHOUT_GPU
def test_the_tests_it_names_are_there_and_are_no_reference_tests():
    """A missing file would end pytest before its first test."""
    named = named_tests()
    # The tests of every kernel that also run without a GPU.
    kernels = {path for path in KERNEL_TESTS if path.startswith("tests/kernels/")}
    assert kernels < set(named)
    assert len(named) == len(kernels) + 3
    for path in named:
        assert (ROOT / path).is_file(), path
