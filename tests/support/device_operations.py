"""Counts the device operations of torch on meta tensors: launches, copies, memory, waits."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
# Operations that only describe or reserve memory. ``fill_`` is among them, because a fixture of the
# tests fills fresh memory.
NO_LAUNCH = {
    *("view", "_unsafe_view", "reshape", "slice", "select", "split", "split_with_sizes", "unbind"),
    *("detach", "alias", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze"),
    *("as_strided", "empty", "new_empty", "empty_like", "empty_strided", "fill_"),
}
MAKES_MEMORY = {"empty", "new_empty", "empty_like", "empty_strided", "zeros", "full", "arange"}


class Counting(TorchDispatchMode):
    """Counts operations on the device.

    Attributes:
        launches: Names of the operations that launch a kernel.
        copies: The number of copies from the host.
        memory: Names of the operations that allocate device memory.
        waits: Names of the operations that read from the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.memory: list[str] = []
        self.waits: list[str] = []
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        before = {t for t in args if isinstance(t, torch.Tensor)}
        if name == "copy_" and args[0].device != META and args[1].device == META:
            self.waits.append(name)
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (list, tuple)) else [result]
        on_device = [t for t in made if isinstance(t, torch.Tensor) and t.device == META]
        if name == "copy_" and args[1].device != META and args[0].device == META:
            self.copies += 1
        elif not on_device and any(t.device == META for t in before):
            self.waits.append(name)
        elif on_device and name not in NO_LAUNCH:
            self.launches.append(name)
        own = [t for t in on_device if t not in before and t._base is None]
        if own and name not in NO_LAUNCH - MAKES_MEMORY and not name.endswith("_"):
            self.memory.append(name)
        return result
