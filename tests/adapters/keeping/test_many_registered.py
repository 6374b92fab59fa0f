"""Five thousand registered adapters take little time at startup and little memory."""

from __future__ import annotations

import gc
import hashlib
import time
import tracemalloc
from pathlib import Path

from builders.facts import facts_of
from builders.registries import refs, tiny_base

from turret.server.adapters.adapter import Source
from turret.server.adapters.registry.registry import AdapterRegistry
from turret.server.adapters.state_dir import SavedRegistration, StateDir
from turret.server.metrics import Metrics

COUNT = 5000
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
    for number in range(COUNT):
        registration = saved(number)
        # Do not use StateDir.save, because thousands of fsyncs would only take time.
        path = tmp_path / "state" / "adapters" / f"{registration.name}.json"
        path.write_bytes(registration.to_json())
    registry = AdapterRegistry(tmp_path, tiny_base(), 1 << 30, 64, Metrics(), state=state)
    gc.collect()
    tracemalloc.start()
    start = time.monotonic()
    before, _ = tracemalloc.get_traced_memory()
    assert registry.restore() == COUNT
    seconds = time.monotonic() - start
    gc.collect()
    bytes_each = (tracemalloc.get_traced_memory()[0] - before) / COUNT
    tracemalloc.stop()
    print(f"\n{seconds:.2f} s for {COUNT} adapters, {bytes_each:.0f} bytes each")
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
