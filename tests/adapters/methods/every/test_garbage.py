"""An adapter's tensors are freed with the adapter, without the garbage collector.

A cycle of references would keep the weights of unloaded adapters until the next
full collection, which can be minutes away.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from builders.mixes.every_method import TASKS, save_every_method
from method_oracle import twin
from servers.engine_harness import EngineHarness


@contextmanager
def tensors_in_cycles() -> Iterator[list[torch.Size]]:
    """At the end of the context, the list holds the shape of each tensor in a dead cycle."""
    found: list[torch.Size] = []
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += [kept.shape for kept in gc.garbage if issubclass(type(kept), torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def test_no_method_leaves_tensors_in_cycles(tmp_path: Path) -> None:
    names = save_every_method(twin("llama").model, tmp_path)
    async with EngineHarness.start(twin("llama").folder, tmp_path) as harness:
        with tensors_in_cycles() as found:
            for name in names:
                harness.registry.load(name, name, task=TASKS.get(name))
            for name in reversed(names):
                harness.registry.unload(name)
        assert not found
