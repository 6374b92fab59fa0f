"""From entries of a weight, in any order, to compressed rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from turret.server.adapters.operators.sparse import Sparse


def sparse_of(
    rows: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Sparse:
    """Sorts entries by place, adds up those of one place and rounds once.

    Args:
        rows: Outputs, ``[n]``, integers.
        columns: Inputs, ``[n]``, integers.
        values: ``[n]``, any float dtype, the scaling in them.
        shape: Shape of the weight; every place is inside it.
        dtype: Serving dtype.
    """
    flat = rows.to(torch.int64) * shape[1] + columns.to(torch.int64)
    places, order = flat.unique(return_inverse=True)
    wide = torch.promote_types(values.dtype, torch.float32)
    summed = torch.zeros(len(places), dtype=wide).index_add_(0, order, values.to(wide))
    outputs = places // shape[1]
    starts = torch.searchsorted(outputs, torch.arange(shape[0] + 1))
    return Sparse(
        values=summed.to(dtype),
        columns=(places % shape[1]).to(torch.int32).to(torch.uint16),
        row_starts=starts.to(torch.int32),
    )


def place_drawer(seed: int) -> Callable[[int, int], torch.Tensor]:
    """Draws places of a module's entries as PEFT does.

    Returns:
        ``(count, size)`` → the first ``size`` of a permutation of ``count`` places, int64. It keeps
        some for modules of the same size, and they go with it: those of a large weight can be half
        a gigabyte.
    """

    @functools.lru_cache(maxsize=8)
    def draw(count: int, size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        # Copy the part that is needed: a permutation of all places can take more than 100 MB.
        return torch.randperm(count, generator=generator)[:size].clone()

    return draw
