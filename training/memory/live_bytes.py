"""Counts the memory that tensors take while code runs, also on the meta device, where none does."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made within the block and still referenced, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tree_leaves((args, kwargs))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # Some methods read a value (VB-LoRA tests for infinity); a scalar needs no memory.
            return args[0].new_zeros((), device="cpu").item()
        result = func(*args, **(kwargs or {}))
        known = {id(t.untyped_storage()) for t in inputs if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), known)
        return result

    def _count(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        # A view, or an in-place operation, answers with the storage of an input.
        if storage in self._known or id(storage) in inputs:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size
