"""Fixtures for all tests: fixed seeds, poisoned scratch memory and a real server process."""

from __future__ import annotations

import os

# Set this before torch is imported: tests run in parallel, and waiting threads would spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Set this before triton is imported: without a GPU, kernels run in its interpreter.
if not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Keep the quantised test models out of the user's cache.
os.environ["XDG_CACHE_HOME"] = os.path.abspath(os.path.join(__file__, "../../build/test-cache"))

import logging
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from interpreter import adapt_interpreter
from servers.server_under_test import ServerUnderTest, start_server

from turret.lazy_torch import torch as lazy_torch

# Modules whose scratch memory must be written before it is read.
_POISONED = ("turret.kernels.", "turret.server.models.decoding.decoder")


class _PoisonedTorch:
    """The torch module, except that uninitialised memory is full of NaN."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def empty(self, *args: Any, **keywords: Any) -> Any:
        return self._fill(self._torch.empty(*args, **keywords))

    def empty_like(self, *args: Any, **keywords: Any) -> Any:
        return self._fill(self._torch.empty_like(*args, **keywords))

    def _fill(self, tensor: Any) -> Any:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


# A shell's background job ignores interrupts, and its child processes would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak-seconds", type=float, default=12.0, help="how long test_churn.py keeps traffic up"
    )
    parser.addoption(
        "--chaos-kills", type=int, default=5, help="how often test_kills.py kills its server"
    )
    parser.addoption(
        "--fuzz-seconds", type=float, default=20.0, help="how long test_beside.py sends anything"
    )


def pytest_collection_finish() -> None:
    """Prepare torch once the tests' modules, and thus their dependencies, are loaded."""
    adapt_interpreter()


@pytest.fixture
def soak_seconds(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--soak-seconds") or 0.0)


@pytest.fixture
def chaos_kills(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--chaos-kills") or 0)


@pytest.fixture
def fuzz_seconds(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--fuzz-seconds") or 0.0)


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a kernel that reads an unwritten element of ``torch.empty`` return NaN."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith(_POISONED) and getattr(module, "torch", None) in (torch, lazy_torch):
            monkeypatch.setattr(module, "torch", _PoisonedTorch(torch))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seed the global generators, so that every run draws the same numbers."""
    random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Undo the log settings of commands that run in this process."""
    loggers = [logging.getLogger(), logging.getLogger("turret")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
    logging.captureWarnings(capture=False)


@pytest.fixture
def coarse_tiles() -> Iterator[None]:
    """Large tiles for kernels in the interpreter; see ``gpu_path.COARSE``."""
    from gpu_path import coarse_tiles

    with coarse_tiles():
        yield


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    """``turret serve`` on the bundled model; tests put adapters into its ``adapter_root``."""
    with start_server(tmp_path_factory.mktemp("live-server")) as server:
        yield server


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Saves a tiny model of an architecture; derived files are written alongside it."""
    from builders.bases.tiny_models import save_tiny_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda architecture, **changes: save_tiny_model(
        architecture, tmp_path / "model", **changes
    )


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a tiny llama.

    Derived files are written alongside it, where EngineHarness looks.
    """
    from builders.bases.tiny_models import save_tiny_model

    folder = tmp_path_factory.mktemp("tiny_llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield save_tiny_model("llama", folder / "model")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test on one thread, and on several."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """The preempted sequences, each with the number of tokens that it had generated.

    Requests are admitted even if blocks will run out later.
    """
    from turret.server.engine.scheduling.scheduler import Scheduler

    found: list[tuple[Any, int]] = []
    preempt = Scheduler._preempt

    def counted(self: Scheduler, sequence: Any, now: float) -> None:
        found.append((sequence, sequence.num_generated))
        preempt(self, sequence, now)

    monkeypatch.setattr(Scheduler, "_preempt", counted)
    monkeypatch.setattr(Scheduler, "_will_run_out", lambda *_: False)
    return found
