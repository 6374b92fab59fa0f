"""An adapter's operators in one block of memory: no gaps between them, and all of it goes back.

Hundreds of tensors of all sizes that come and go with thousands of adapters leave the heap full of
holes. A block is a mapping of its own, which the system takes back whole when the adapter leaves.
Those of one shape lie side by side in the order of the layers, so that a store whose matrices hold
all layers takes them by one copy.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping, Sequence

from turret.lazy_torch import torch
from turret.server.adapters.checkpoint.finite import all_finite
from turret.server.adapters.operators.adapter_operators import ModuleOperators

# Every group of tensors begins on a cache line.
_ALIGNMENT = 64


def in_one_block(
    modules: Mapping[str, ModuleOperators],
) -> tuple[dict[str, ModuleOperators], bool]:
    """Copies the tensors of all modules into a block.

    Args:
        modules: By module path, on the CPU; tensors may be views of anything.

    Returns:
        The same operators, and whether every value is finite.
    """
    # Files list tensors by name, which puts layer 10 before layer 2.
    tensors = [tensor for name in sorted(modules, key=_place) for tensor in modules[name].tensors()]
    copies, is_finite = _copies(list({id(tensor): tensor for tensor in tensors}.values()))
    after: dict[str, ModuleOperators] = {}
    for name, module in modules.items():
        after[name] = module.with_tensors(copies[id(tensor)] for tensor in module.tensors())
    return after, is_finite


def _place(name: str) -> list[int | str]:
    """Orders modules: by kind, then by layer."""
    parts = re.split(r"(\d+)", name)
    return [*parts[::2], *map(int, parts[1::2])]


def _copies(tensors: Sequence[torch.Tensor]) -> tuple[dict[int, torch.Tensor], bool]:
    """Copies by ``id`` of the original; tensors of one dtype and shape are copied in one call."""
    groups: dict[tuple[torch.dtype, torch.Size], list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            groups.setdefault((tensor.dtype, tensor.shape), []).append(tensor)
    sizes = [len(group) * group[0].nbytes for group in groups.values()]
    block = _map_memory(sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))
    copies = {id(tensor): torch.empty_like(tensor) for tensor in tensors if not tensor.numel()}
    start, is_finite = 0, True
    for (dtype, shape), group in groups.items():
        size = len(group) * group[0].nbytes
        place = block[start : start + size].view(dtype).view(len(group), *shape)
        torch.stack(group, out=place)
        is_finite = is_finite and all_finite(place)
        copies.update((id(t), copy) for t, copy in zip(group, place.unbind(), strict=True))
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
    return copies, is_finite


def _map_memory(num_bytes: int) -> torch.Tensor:
    """Memory of its own, ``[num_bytes]`` uint8, given back with the last view of it."""
    if not num_bytes or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # With huge pages, touching 7 MB for the first time takes 1.1 ms instead of 3 ms.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
