"""Dozens of adapters come and go, and leave nothing in memory or on the disk."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path

from builders.registries import Registries, Waiter, refs, stage_directory

from turret.server.adapters.state_dir import StateDir
from turret.server.metrics import Metrics

COUNT = 60
# Maximum number of remaining objects of one type, such as entries of bounded caches.
MOST_LASTING = 15


def test_unloaded_adapters_leave_nothing_behind(tmp_path: Path) -> None:
    registries, metrics = Registries(tmp_path), Metrics()
    registry = registries(3, state=StateDir(tmp_path / "state", 1 << 30), metrics=metrics)

    def come_and_go(first: int, count: int) -> None:
        """Load, upload, use and unload adapters under new names."""
        for number in range(first, first + count):
            name = f"n{number}"
            if number % 10:
                registry.load(name, "abcd"[number % 4])
            else:
                registry.upload(name, stage_directory(registry, registries.root / "a"))
            mix = registry.acquire(refs([name]))
            if not mix.ensure_host(lambda _: None):
                Waiter(mix).wait()
            registry.release(mix)
            registry.unload(name)

    def census() -> tuple[Counter[str], int, int]:
        gc.collect()
        kinds = Counter(type(one).__qualname__ for one in gc.get_objects())
        files = sum(path.is_file() for path in (tmp_path / "state").rglob("*"))
        return kinds, files, len(os.listdir("/proc/self/fd"))

    come_and_go(0, 20)
    kinds, files, descriptors = census()
    come_and_go(20, COUNT)
    grown = {
        kind: n - kinds[kind] for kind, n in census()[0].items() if n - kinds[kind] > MOST_LASTING
    }
    assert not grown
    assert census()[1:] == (files, descriptors)
    assert registry.host_bytes_used == 0
    assert registry.list() == []
    series = {
        sample.name + str(sample.labels)
        for family in metrics.registry.collect()
        for sample in family.samples
    }
    assert not [one for one in series if "n77" in one]
    registries.close()
