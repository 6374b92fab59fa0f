"""Dozens of adapters come and go, and leave nothing in memory or on the disk."""

from __future__ import annotations

import gc
import hashlib
import os
import time
import tracemalloc
from collections import Counter
from pathlib import Path

from builders.facts import facts_of
from builders.registries import Registries, Waiter, refs, stage_directory, tiny_base

from turret.server.adapters.adapter import Source
from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import SavedRegistration, StateDir
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


# Five thousand registered adapters take little time at startup and little memory.


REGISTERED = 5000
MAX_BYTES_EACH = 2048
MAX_SECONDS = 60.0
TARGETS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def saved(number: int) -> SavedRegistration:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return SavedRegistration(
        name=f"customer-{number:05}-support-v2",
        uuid=digest[:32],
        generation=1 + number % 3,
        pinned=False,
        source=Source(f"customers/{number:05}/support-v2"),
        facts=facts_of(
            digest,
            ranks=(8 << number % 4,),
            target_modules=TARGETS,
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
            bytes_disk=4_900_000 + number,
            bytes_host=4_800_000 + number,
        ),
    )


def test_registering_is_quick_and_small(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state", 1)
    for number in range(REGISTERED):
        registration = saved(number)
        # Do not use StateDir.save, because thousands of fsyncs would only take time.
        path = tmp_path / "state" / "adapters" / f"{registration.name}.json"
        path.write_bytes(registration.to_json())
    registry = AdapterRegistry(tmp_path, tiny_base(), 1 << 30, 64, Metrics(), state=state)
    gc.collect()
    tracemalloc.start()
    start = time.monotonic()
    before, _ = tracemalloc.get_traced_memory()
    assert registry.restore() == REGISTERED
    seconds = time.monotonic() - start
    gc.collect()
    bytes_each = (tracemalloc.get_traced_memory()[0] - before) / REGISTERED
    tracemalloc.stop()
    print(f"\n{seconds:.2f} s for {REGISTERED} adapters, {bytes_each:.0f} bytes each")
    assert seconds < MAX_SECONDS
    assert bytes_each < MAX_BYTES_EACH
    # All adapters are registered, and none is in memory.
    records = registry.list()
    assert [record.generation for record in records[:4]] == [1, 2, 3, 1]
    assert records[17].facts.digest == saved(17).facts.digest
    mix = registry.acquire(refs([records[4999].name]))
    assert mix.members[0][0].operators is None
    registry.release(mix)
    assert registry.host_bytes_used == 0
    registry.close()
