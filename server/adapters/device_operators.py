"""An adapter's operators on the device: one transfer, nothing waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from turret.kernels.gpu.staged_buffer import upload
from turret.server.adapters.operators import AdapterOperators

# Of every tensor in the transfer; a view needs its dtype's alignment.
_ALIGNMENT = 16


def on_device(operators: AdapterOperators, device: torch.device) -> AdapterOperators:
    """The operators of the modules as views of one buffer on the device.

    Hundreds of small tensors would be hundreds of transfers. The soft prompt stays where it is.
    """
    tensors: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    _map(dict(operators.modules), collect)
    if all(tensor.device == device for tensor in tensors):
        return operators
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    host = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, offset in zip(tensors, offsets, strict=True):
        _view(host, offset, tensor).copy_(tensor)
    there = upload(host, device)
    places = iter(offsets)
    return replace(
        operators,
        modules=_map(dict(operators.modules), lambda tensor: _view(there, next(places), tensor)),
    )


def _view(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    return buffer[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


def _map(part: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure with every tensor changed, in the order of fields and keys."""
    if isinstance(part, torch.Tensor):
        return change(part)
    if isinstance(part, tuple):
        return tuple(_map(item, change) for item in part)
    if isinstance(part, dict):
        return {key: _map(value, change) for key, value in part.items()}
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{f.name: _map(getattr(part, f.name), change) for f in fields(part)})
    return part
