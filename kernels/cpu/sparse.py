"""Entries of a weight as ``sparse.c`` reads them: by 16 outputs and 64 inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turret.kernels.cpu.native import LANES, functions

_BLOCK = 64  # of sparse.c
_BEHIND = 64  # elements that the kernel reads past the last entry


@dataclass(frozen=True, slots=True)
class SparseBlocks:
    """``S x``, ``S`` a few entries of the weight.

    A step has 32 slots, two for each of 16 outputs, for entries with inputs of one block of 64.

    Attributes:
        values: ``[entries + 64]`` bf16: those of the slots that have one, a step after another.
        places: ``[entries + 64]`` uint8: where in its block an entry's input is.
        masks: ``[steps]`` int32: bit ``s`` is set where slot ``s``, of output ``s % 16``, has an
            entry.
        skips: ``[steps]`` uint16: blocks from the step before, at first from block 0.
        starts: Steps and entries before each 16 outputs, ``[groups + 1, 2]`` int32.
        outputs: The outputs in the order of the lanes, ``[out]`` uint8, counted from the first of
            the columns that one unit of work has.
        mean: Entries of an output, about.
    """

    values: torch.Tensor
    places: torch.Tensor
    masks: torch.Tensor
    skips: torch.Tensor
    starts: torch.Tensor
    outputs: torch.Tensor
    mean: int

    @classmethod
    def of(
        cls, values: torch.Tensor, columns: torch.Tensor, row_starts: torch.Tensor
    ) -> SparseBlocks:
        """Convert compressed rows, on the CPU.

        Args:
            values: ``[entries]`` bf16.
            columns: ``[entries]`` uint16.
            row_starts: ``[out + 1]`` int32.
        """
        made = _filled(values, columns, row_starts)
        if made is None:
            order = _by_block(columns, row_starts)
            made = _filled(values[order], _taken(columns, order), row_starts)
        assert made is not None
        return made

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tensors in the order of the kernel's struct."""
        return (self.values, self.places, self.masks, self.skips, self.starts, self.outputs)


def blocks_bytes(columns: torch.Tensor, row_starts: torch.Tensor) -> int:
    """Number of bytes that ``SparseBlocks.of`` takes."""
    out = len(row_starts) - 1
    steps = _steps(columns, row_starts)
    if steps < 0:
        steps = _steps(_taken(columns, _by_block(columns, row_starts)), row_starts)
    return 3 * (len(columns) + _BEHIND) + 6 * steps + out + 8 * (-(-out // LANES) + 1)


def _filled(
    values: torch.Tensor, columns: torch.Tensor, row_starts: torch.Tensor
) -> SparseBlocks | None:
    """Fill the arrays; None if the inputs of some output are not in the order of blocks."""
    entries, out = len(values), len(row_starts) - 1
    # There are at most as many steps as entries; pages that are never written take no memory.
    filled = (
        torch.zeros(entries + _BEHIND, dtype=values.dtype),
        torch.zeros(entries + _BEHIND, dtype=torch.uint8),
        torch.empty(entries, dtype=torch.int32),
        torch.empty(entries, dtype=torch.uint16),
        torch.empty(-(-out // LANES) + 1, 2, dtype=torch.int32),
        torch.empty(out, dtype=torch.uint8),
    )
    steps = functions().turret_sparse_fill(
        values.data_ptr(),
        columns.data_ptr(),
        row_starts.data_ptr(),
        out,
        *(part.data_ptr() for part in filled),
    )
    if steps < 0:
        return None
    kept, places, masks, skips, starts, outputs = filled
    masks, skips = masks[:steps].clone(), skips[:steps].clone()
    return SparseBlocks(kept, places, masks, skips, starts, outputs, entries // out)


def _taken(columns: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    # torch cannot index uint16 tensors.
    return columns.to(torch.int32)[order].to(torch.uint16)


def _steps(columns: torch.Tensor, row_starts: torch.Tensor) -> int:
    """Count the steps; negative if the inputs of some output are not in the order of blocks."""
    found: int = functions().turret_sparse_steps(
        columns.data_ptr(), row_starts.data_ptr(), len(row_starts) - 1
    )
    return found


def _by_block(columns: torch.Tensor, row_starts: torch.Tensor) -> torch.Tensor:
    """The stable order of the entries by row and block, ``[entries]`` int64."""
    rows = torch.repeat_interleave(row_starts.to(torch.int64).diff())
    most = 1 << 10  # blocks
    return torch.argsort(rows * most + columns.to(torch.int64) // _BLOCK, stable=True)
