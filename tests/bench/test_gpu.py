"""The verdict about a GPU, tried without one: all calls on toy shapes, and the table."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from emulation import KERNEL_TESTS

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def run(*args: str, out: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "TRITON_INTERPRET": "1"}
    environment |= {} if out is None else {"OUT": str(out)}
    command = ["bash", "bench/gpu.sh", *args]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@WITHOUT_GPU
def test_dry_run(tmp_path: Path):
    # The fifth call runs a test of the server.
    done = run("--dry", "1", "2", "3", "4", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "interpreter.jsonl").read_text().splitlines()]
    found = {row["scenario"] for row in rows}
    wanted = {
        *("memory read", "nf4_matmul", "paged_attention", "hadamard", "kronecker"),
        *("library product", "low rank", "sample_rows", "prefill"),
        *("step base", "step lora 1 distinct", "step dora 4 distinct", "step loha 4 distinct"),
        *("step lokr 4 distinct", "step lora 4 distinct, ranks mixed"),
    }
    assert wanted <= found
    for row in rows:
        assert {"gpu", "driver", "torch", "triton", "date", "commit"} <= set(row)
        # The row has the time for reading its bytes on an H100 next to the measured time.
        assert 0 < row["floor_ms"] < row["ms"], row
    codes = {file.stem: file.read_text().split()[0] for file in tmp_path.glob("*.exit")}
    commands = ("kernel-tests", "decode", "prefill", "bits", "kernels", "memcheck", "racecheck")
    assert codes == dict.fromkeys(commands, "0")
    assert (tmp_path / "verdict.txt").read_text() in done.stdout


# Figures that keep every promise on a card with half the bandwidth of an H100.
KEPT: dict[tuple[str, str], dict[str, float]] = {
    ("step base", "1 rows, 32 layers"): {"ms": 5.0, "host_ms": 0.2},
    ("step lora 16 distinct", "16 rows, 32 layers"): {"ms": 6.0, "host_ms": 0.2},
    ("step lora 64 distinct", "64 rows, 32 layers"): {"ms": 9.0, "host_ms": 0.2},
    ("step base", "64 rows, 32 layers"): {"ms": 8.0, "host_ms": 0.4},
    ("step base", "256 rows, 32 layers"): {"ms": 30.0, "host_ms": 0.4},
    ("prefill", "4096 tokens"): {"ms": 200.0},
    ("memory read", "1024 MiB"): {"ms": 0.7, "over_floor": 1.2},
}


@pytest.mark.parametrize(
    ("changed", "code", "is_good"),
    [
        ({}, 0, True),
        ({}, 77, True),
        ({}, 124, False),
        ({}, 1, False),
        ({("step base", "1 rows, 32 layers"): {"ms": 9.0, "host_ms": 0.2}}, 0, False),
        ({("step base", "64 rows, 32 layers"): {"ms": 8.0, "host_ms": 0.9}}, 0, False),
        ({("prefill", "4096 tokens"): None}, 0, False),
        ({("step lora 64 distinct", "64 rows, 32 layers"): {"skipped": True}}, 0, True),
    ],
)
def test_the_verdict_follows_the_figures_and_exit_codes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[tuple[str, str], Any],
    code: int,
    is_good: bool,
):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    verdict: Any = importlib.import_module("cuda.verdict").verdict
    with (tmp_path / "card.jsonl").open("w") as file:
        for (scenario, shape), figures in (KEPT | changed).items():
            if figures is not None:
                row = {"gpu": "NVIDIA H100 PCIe", "scenario": scenario, "shape": shape, **figures}
                print(json.dumps(row), file=file)
    (tmp_path / "decode.exit").write_text("0 300\n")
    (tmp_path / "server.exit").write_text(f"{code} 90\n")
    assert verdict(tmp_path, is_dry=False) == (0 if is_good else 1)
    assert ("FAILED" in capsys.readouterr().out) is not is_good


def test_verdict_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first call only compiles and tests."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    verdict: Any = importlib.import_module("cuda.verdict").verdict
    (tmp_path / "kernel-tests.exit").write_text("0 300\n")
    assert verdict(tmp_path, is_dry=False) == 0


@pytest.mark.slow
@WITHOUT_GPU
def test_tuning_prints_a_row_for_the_table():
    done = run("--dry", "--tune")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"interpreter": Tuning(programs=' in done.stdout


@WITHOUT_GPU
@pytest.mark.parametrize("args", [(), ("2",), ("--only", "step")])
def test_without_a_gpu_the_script_suggests_a_dry_run(args: tuple[str, ...]):
    done = run(*args)
    assert done.returncode == 2
    assert "--dry" in done.stderr


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

sys.exit(gpu.main(["--dry", "--only", "one-step", "--results", sys.argv[1]]))
"""
TESTS = """
import pytest

options = ["-c", "/dev/null", "--rootdir", ".", "--noconftest", "-p", "no:cacheprovider"]
options += ["--import-mode=importlib", "-q", "-W", "ignore"]
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
def test_a_step_runs_on_a_bare_machine(tmp_path: Path):
    run_bare(ONE_STEP, str(tmp_path))


@pytest.mark.slow
@WITHOUT_GPU
def test_the_tests_that_the_script_names_run_on_a_bare_machine():
    run_bare(TESTS, "--collect-only", *named_tests())
    # The tests of graphs also run on a bare machine, on fakes.
    run_bare(TESTS, "tests/engine/gpu/test_decode_graphs.py")


def named_tests() -> list[str]:
    """The tests that the first call runs without the server's packages."""
    script = (ROOT / "bench" / "gpu.sh").read_text()
    first = script[script.index("call_1()") : script.index("call_2()")]
    return [word for word in first.split() if word.startswith("tests/") and ".py" in word]


@WITHOUT_GPU
def test_the_tests_that_the_script_names_exist_and_are_not_reference_tests():
    """A missing file would end pytest before its first test."""
    named = named_tests()
    # The tests of every kernel that also run without a GPU.
    kernels = {path for path in KERNEL_TESTS if path.startswith("tests/kernels/")}
    assert kernels < set(named)
    assert len(named) == len(kernels) + 3
    for path in named:
        assert (ROOT / path).is_file(), path
