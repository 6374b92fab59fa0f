"""Tensors that kernels find by an address in another tensor, instead of as an argument."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch

_REACHED: dict[int, weakref.ref[torch.Tensor]] = {}


def address_of(tensor: torch.Tensor) -> int:
    """The address of a tensor's first element, for kernels.

    As long as the tensor lives, the emulator maps its memory at the same address.
    """
    _REACHED[id(tensor)] = weakref.ref(tensor)
    return tensor.data_ptr()


def reached() -> Iterator[torch.UntypedStorage]:
    """The memory of the tensors that are still alive, each once."""
    found: set[int] = set()
    for key, reference in list(_REACHED.items()):
        tensor = reference()
        if tensor is None:
            del _REACHED[key]
        elif (storage := tensor.untyped_storage()).data_ptr() not in found:
            found.add(storage.data_ptr())
            yield storage
