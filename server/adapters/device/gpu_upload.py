"""Copies an adapter's operators to the device by one transfer, and does not wait for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from turret.kernels.gpu.tables.staged_buffer import upload
from turret.server.adapters.operators import AdapterOperators

# Every tensor in the transfer begins at a multiple of this: a view needs its dtype's alignment.
_ALIGNMENT = 16


def on_device(operators: AdapterOperators, device: torch.device) -> AdapterOperators:
    """The operators of the modules as views of one buffer on the device.

    Hundreds of small tensors would be hundreds of transfers. The soft prompt stays where it is.
    """
    tensors = [tensor for module in operators.modules.values() for tensor in module.tensors()]
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
    moved = (_view(there, *place) for place in zip(offsets, tensors, strict=True))
    modules = {name: part.with_tensors(moved) for name, part in operators.modules.items()}
    return replace(operators, modules=modules)


def _view(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    return buffer[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
