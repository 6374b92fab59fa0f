"""Registries of four small real adapters, and helpers to observe them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from builders.adapters import base_of, lora_config, tiny_llama
from builders.methods import save_adapter

from turret.server.adapters.adapter import AdapterRef, HostResult, Mix, Source
from turret.server.adapters.base import BaseModel
from turret.server.adapters.loader import LoadedAdapter
from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import StagedUpload, StateDir, UploadedFile
from turret.server.errors import TurretError
from turret.server.metrics import Metrics

NAMES = ("a", "b", "c", "d")
WAIT_SECONDS = 10.0


@functools.cache
def tiny_base() -> BaseModel:
    return base_of(tiny_llama())


@functools.cache
def _checkpoints() -> tempfile.TemporaryDirectory[str]:
    """Four adapters of the same size but different weights, and ``big`` of twice the rank."""
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    for seed, name in enumerate(NAMES):
        save_adapter(tiny_llama(), lora_config(), Path(directory.name) / name, seed=seed)
    save_adapter(tiny_llama(), lora_config(r=8), Path(directory.name) / "big")
    return directory


@functools.cache
def adapter_bytes() -> int:
    """Host bytes of one small adapter."""
    registry = AdapterRegistry(Path(_checkpoints().name), tiny_base(), 1 << 30, 64)
    size = registry.load("a", "a").bytes_host
    registry.close()
    return size


class Registries:
    """Creates registries on a separate adapter root, and closes them."""

    def __init__(self, directory: Path) -> None:
        self.root = Path(shutil.copytree(_checkpoints().name, directory / "root"))
        self._made: list[AdapterRegistry] = []

    def __call__(
        self,
        room: float = 100,
        *,
        load: str = "",
        metrics: Metrics | None = None,
        state: StateDir | None = None,
        keep_generations: int = 0,
    ) -> AdapterRegistry:
        """Create a registry with room for ``room`` small adapters, and load some by letter."""
        host_bytes = int(room * adapter_bytes())
        registry = AdapterRegistry(
            self.root,
            tiny_base(),
            host_bytes,
            64,
            metrics,
            state=state,
            keep_generations=keep_generations,
        )
        self._made.append(registry)
        for name in load:
            registry.load(name, name)
        return registry

    def close(self) -> None:
        for registry in self._made:
            registry.close()


Start = Callable[..., AdapterRegistry]


def refs(names: str | list[str]) -> list[AdapterRef]:
    """A reference to each name. Each letter of a string is the name of an adapter."""
    return [AdapterRef(name=name) for name in names]


class Waiter:
    """Requests residency and remembers the answer."""

    def __init__(self, mix: Mix) -> None:
        self.mix = mix
        self._answers: list[HostResult] = []
        self._answered = threading.Event()
        self.was_resident = mix.ensure_host(self._answer)

    def _answer(self, result: HostResult) -> None:
        self._answers.append(result)
        self._answered.set()

    @property
    def is_answered(self) -> bool:
        return self._answered.is_set()

    def wait(self) -> HostResult:
        assert self._answered.wait(WAIT_SECONDS), "no answer"
        assert len(self._answers) == 1
        assert self._answers[0].mix is self.mix
        return self._answers[0]


class Gate:
    """Stops background reads until it is opened, and counts them."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._reload = registry._leases._reload
        self._open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.reads: list[str] = []
        registry._leases._reload = self._read

    def _read(self, name: str, source: Source, digest: str) -> LoadedAdapter:
        self.reads.append(source.path)
        self.entered.release()
        assert self._open.wait(WAIT_SECONDS)
        return self._reload(name, source, digest)

    def open(self) -> None:
        self._open.set()


def resident(registry: AdapterRegistry) -> str:
    return "".join(r.name for r in registry.list() if r.residency == "host")


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run ``call`` in a thread; the list receives its result or its error."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(call())
        except TurretError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def until(condition: Callable[[], bool]) -> None:
    """Wait until another thread has reached a state for which there is no event."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def stage_directory(registry: AdapterRegistry, directory: Path) -> StagedUpload:
    """A finished upload of an adapter directory."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    contents = {name: (directory / name).read_bytes() for name in names}
    staged = registry.stage([UploadedFile(name, len(data)) for name, data in contents.items()])
    for name, data in contents.items():
        staged.write(name, data)
    staged.finish()
    return staged
