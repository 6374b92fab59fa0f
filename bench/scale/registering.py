"""The cost of registering adapters: the time by RPC, and the time and memory at a restart."""

from __future__ import annotations

import gc
import shutil
import time
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from turret.clients.client import TurretClient
from turret.server.adapters.base import BaseModel, BaseVocabulary
from turret.server.adapters.registry.registry import AdapterRegistry
from turret.server.adapters.state_dir import StateDir
from turret.server.metrics import Metrics

# Concurrent calls: one reads and lowers an adapter while another waits for the disk.
_CALLS = 4


def register(address: str, names: Sequence[str], paths: Sequence[str] | None = None) -> float:
    """Load every adapter, from the directory of its name or another one; returns the seconds."""
    start = time.perf_counter()
    with TurretClient(address) as client, ThreadPoolExecutor(_CALLS) as pool:
        list(pool.map(client.adapters.load, names, paths or names))
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Restored:
    """The cost of a restart, in a process that does nothing else.

    Attributes:
        seconds: The time for reading all registrations.
        bytes_each: The remaining Python memory per adapter, by ``tracemalloc``.
    """

    seconds: float
    bytes_each: float


def restore(state: Path, scratch: Path) -> Restored:
    """Register all adapters of a server's state directory, without reading weights.

    Args:
        state: The directory, which a server may be using.
        scratch: A path that does not exist, for a copy of the registrations.
    """
    shutil.copytree(state / "adapters", scratch / "adapters")
    # An empty base is enough: registrations do not depend on it, and no weights are read here.
    base = BaseModel(
        name="",
        model_type="llama",
        digest="",
        dtype=torch.bfloat16,
        modules={},
        other_modules=frozenset(),
        vocabulary=BaseVocabulary(torch.empty(0, 0), torch.empty(0, 0), is_tied=False),
        num_layers=0,
        hidden_size=0,
        num_kv_heads=0,
        head_dim=0,
    )
    registry = AdapterRegistry(None, base, 1, 1, Metrics(), state=StateDir(scratch, 1))
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    start = time.perf_counter()
    count = registry.restore()
    seconds = time.perf_counter() - start
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    registry.close()
    return Restored(seconds, used / count)
