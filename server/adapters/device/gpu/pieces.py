"""Tensors as few: what lies evenly in memory, or side by side, is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch

_ALIGNMENT = 16
# Largest gap between neighbouring tensors of a block: groups of them begin on cache lines.
_MAX_GAP_BYTES = 64


def by_layers(found: Iterable[tuple[int, torch.Tensor]]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Join the tensors of an adapter's layers where they lie one behind the other.

    Those of an adapter are in one block, equal shapes side by side (``lowering/arena.py``), so that
    as a rule there is one piece, and a device copies it in one go.

    Args:
        found: Layers, rising, and a tensor of each.

    Yields:
        Layers, and their tensors, ``[layers, …]``, on the same memory.
    """
    run: list[tuple[int, torch.Tensor]] = []
    for layer, tensor in found:
        if run and not _continues(run, layer, tensor):
            yield _joined(run)
            run = []
        run.append((layer, tensor))
    if run:
        yield _joined(run)


def _continues(run: list[tuple[int, torch.Tensor]], layer: int, tensor: torch.Tensor) -> bool:
    last_layer, last = run[-1]
    alike = (
        layer == last_layer + 1
        and tensor.shape == last.shape
        and tensor.dtype == last.dtype
        and tensor.is_contiguous()
        and last.is_contiguous()
        and _memory(tensor) == _memory(last) != 0
    )
    step = tensor.storage_offset() - last.storage_offset()
    return alike and step > 0 and all(step == _step(pair) for pair in pairwise(run[-2:]))


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _step(pair: tuple[tuple[int, torch.Tensor], tuple[int, torch.Tensor]]) -> int:
    (_, first), (_, second) = pair
    return int(second.storage_offset()) - int(first.storage_offset())


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of the memory that a tensor's storage occupies."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _joined(run: list[tuple[int, torch.Tensor]]) -> tuple[slice, torch.Tensor]:
    layer, first = run[0]
    step = _step((run[0], run[1])) if len(run) > 1 else first.numel()
    shape = (len(run), *first.shape)
    return slice(layer, layer + len(run)), first.as_strided(shape, (step, *first.stride()))


def blocks_of(
    tensors: Sequence[torch.Tensor],
) -> tuple[list[tuple[torch.Tensor, int]], list[int], int]:
    """The host memory that tensors lie in, to be copied elsewhere in few goes.

    Args:
        tensors: Contiguous.

    Returns:
        Blocks of that memory, ``[bytes]`` uint8, and where each is to begin; where each tensor
        begins then, as aligned as it is here; and how long all is, in bytes.
    """
    offsets = [0] * len(tensors)
    blocks: list[tuple[torch.Tensor, int]] = []
    start = begin = end = 0
    for number in sorted(range(len(tensors)), key=lambda number: tensors[number].data_ptr()):
        tensor = tensors[number]
        if not tensor.numel():
            continue
        place, memory = tensor.data_ptr(), _memory(tensor)
        if not blocks or _memory(blocks[-1][0]) != memory or place > end + _MAX_GAP_BYTES:
            start = -(-(start + end - begin) // _ALIGNMENT) * _ALIGNMENT
            begin = max(memory, place - place % _ALIGNMENT)
            end = begin
        else:
            blocks.pop()
        end = max(end, place + tensor.nbytes)
        offsets[number] = start + place - begin
        blocks.append((_bytes_of(tensor)[begin - memory : end - memory], start))
    return blocks, offsets, start + end - begin
