"""The choice of the device and the number of threads."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from said import says

from turret.server import build
from turret.server.basics.machine import (
    available_cpus,
    keep_compiled_in,
    missing_for_triton,
    see_only,
)
from turret.server.build import _choose_device
from turret.server.config import ModelConfig
from turret.server.errors import InvalidRequestError


def choose(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    visible: str | None,
    there: bool = True,
    capability: tuple[int, int] = (9, 0),
):
    """The chosen device, and the devices that this process sees."""
    # Set the variable first, so that the server's change is undone as well.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    seen: list[str | None] = []

    def is_available() -> bool:
        seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return there

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    see_only(wanted)
    return _choose_device(ModelConfig(device=wanted)), seen


@pytest.mark.parametrize(
    ("wanted", "visible", "left"),
    [
        ("cuda", None, None),
        ("auto", "4,5", "4,5"),
        ("cuda:0", None, "0"),
        ("cuda:3", None, "3"),
        ("cuda:1", "4, 5", "5"),
        ("cuda:1", "GPU-aa,GPU-bb", "GPU-bb"),
    ],
)
def test_only_the_chosen_device_is_visible_as_device_0(
    monkeypatch: pytest.MonkeyPatch, wanted: str, visible: str | None, left: str | None
):
    device, seen = choose(monkeypatch, wanted, visible)
    assert device == torch.device("cuda", 0)
    assert set(seen) == {left}, "before torch looks for the first time"


def test_a_missing_device_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InvalidRequestError, check=says("DEVICE_NOT_VISIBLE", visible="4,5")):
        choose(monkeypatch, "cuda:2", "4,5")
    with pytest.raises(InvalidRequestError, check=says("NO_CUDA_DEVICE", device="cuda:7")):
        choose(monkeypatch, "cuda:7", None, there=False)
    assert choose(monkeypatch, "auto", None, there=False)[0] == torch.device("cpu")
    assert choose(monkeypatch, "cpu", None)[0] == torch.device("cpu")


def test_a_gpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Otherwise, Triton would raise only in the first step, after the model was read."""
    monkeypatch.setattr(build, "missing_for_triton", lambda: "a C compiler")
    for wanted in ("auto", "cuda"):
        with pytest.raises(InvalidRequestError, check=says("KERNELS_NEED", missing="a C compiler")):
            choose(monkeypatch, wanted, None)
    assert choose(monkeypatch, "cpu", None)[0] == torch.device("cpu")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert missing_for_triton().startswith("a C compiler (gcc or clang")
    assert "and Python's C headers" in missing_for_triton()
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CC", "cc")
    assert missing_for_triton() == ""


def test_triton_writes_to_a_writable_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Services and containers often have no writable home directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    set_before: dict[str, str] = {"TRITON_CACHE_DIR": "elsewhere"}
    keep_compiled_in(tmp_path, set_before)
    assert set_before == {"TRITON_CACHE_DIR": "elsewhere"}
    kept: list[Path] = []
    monkeypatch.setattr(build, "keep_compiled_in", kept.append)
    choose(monkeypatch, "cuda", None)
    choose(monkeypatch, "cpu", None)
    assert kept == [tmp_path / "turret" / "triton"]


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_a_gpu_that_triton_does_not_support_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], caplog: pytest.LogCaptureFixture
):
    device, _ = choose(monkeypatch, "auto", None, capability=capability)
    assert device == torch.device("cpu")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    for wanted in ("cuda", "cuda:0"):
        with pytest.raises(InvalidRequestError) as refused:
            choose(monkeypatch, wanted, None, capability=capability)
        assert [path for path, _ in refused.value.violations] == ["device"]
    assert choose(monkeypatch, "auto", None, capability=(8, 0))[0] == torch.device("cuda", 0)


_FIRST_QUESTION = """
import os, torch
seen = []
def count():
    seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return 0
torch.cuda.is_available = lambda: count() > 0
torch._C._cuda_getDeviceCount = count
import turret.server.cli
from turret.server.app import _build
from turret.server.config import Config, ModelConfig
from turret.server.errors import InvalidRequestError
from turret.server.adapters.state_dir import NoStateDir
from turret.server.metrics import Metrics
try:
    _build(Config(model=ModelConfig(device="cuda:1")), Metrics(), NoStateDir())
except InvalidRequestError as error:
    assert [path for path, _ in error.violations] == ["device"], error
print(seen)
"""


def test_the_first_library_to_query_devices_sees_the_chosen_one(tmp_path: Path):
    """Libraries query devices when they are imported, and CUDA reads the variable only once."""
    environ = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_QUESTION],
        env=environ, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert seen
    assert set(seen) == {"1"}


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
        "import os\nfrom turret.server.basics.machine import use_threads\n"
        "before = os.nice(0)\nuse_threads(1, is_background=True, niceness=5)\nimport torch\n"
        "print(torch.get_num_threads(), os.nice(0) - before, os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.stdout.split() == ["1", "5", "passive"]
