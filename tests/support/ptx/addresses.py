"""Tensors that kernels find by an address in another tensor, not as an argument."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch

_REACHED: dict[int, weakref.ref[torch.Tensor]] = {}


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor's first element lies, for kernels to find.

    While the tensor lives, the emulator maps the memory that it is part of at the same address.
    """
    _REACHED[id(tensor)] = weakref.ref(tensor)
    return tensor.data_ptr()


def reached() -> Iterator[torch.UntypedStorage]:
    """The memory of those tensors that still live, each once."""
    found: set[int] = set()
    for key, reference in list(_REACHED.items()):
        tensor = reference()
        if tensor is None:
            del _REACHED[key]
        elif (storage := tensor.untyped_storage()).data_ptr() not in found:
            found.add(storage.data_ptr())
            yield storage
