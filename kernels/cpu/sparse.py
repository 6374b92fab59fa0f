"""Entries of a weight as ``sparse.c`` reads them: those of 16 outputs side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turret.kernels.cpu.native import functions

_LANES = 16  # of vec.h


@dataclass(frozen=True, slots=True)
class SparseLanes:
    """``S x``, ``S`` a few entries of the weight.

    Attributes:
        values: ``[steps, 16]`` bf16, contiguous like all of them; 0 where an output has no more.
        places: ``[steps, 16]``: inputs from an output's last entry, at first from input 0, as
            uint8; or the inputs themselves as uint16, where that takes fewer bytes.
        starts: Steps of each 16 outputs, ``[groups + 1]`` int32.
        outputs: The outputs in the order of the lanes, ``[out]`` uint8, counted from the first of
            the columns that one unit of work has.
        mean: Entries of an output, about.
    """

    values: torch.Tensor
    places: torch.Tensor
    starts: torch.Tensor
    outputs: torch.Tensor
    mean: int

    @classmethod
    def of(
        cls, values: torch.Tensor, columns: torch.Tensor, row_starts: torch.Tensor
    ) -> SparseLanes:
        """From compressed rows, on the CPU.

        Args:
            values: ``[entries]`` bf16.
            columns: ``[entries]`` uint16.
            row_starts: ``[out + 1]`` int32.
        """
        out = len(row_starts) - 1
        steps, skips = _shape(columns, row_starts)
        lanes = torch.empty(steps, _LANES, dtype=values.dtype)
        places = torch.empty(steps, _LANES, dtype=torch.uint8 if skips else torch.uint16)
        starts = torch.empty(-(-out // _LANES) + 1, dtype=torch.int32)
        outputs = torch.empty(out, dtype=torch.uint8)
        functions().turret_sparse_lanes(
            values.data_ptr(),
            columns.data_ptr(),
            row_starts.data_ptr(),
            out,
            skips,
            *(part.data_ptr() for part in (lanes, places, starts, outputs)),
        )
        return cls(lanes, places, starts, outputs, len(values) // out)

    @property
    def parts(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of the kernel's struct."""
        skips = self.places.dtype == torch.uint8
        places = (self.places, None) if skips else (None, self.places)
        return (self.values, *places, self.starts, self.outputs)


def lanes_bytes(columns: torch.Tensor, row_starts: torch.Tensor) -> int:
    """What ``SparseLanes.of`` takes at most. It looks at no entry."""
    out = len(row_starts) - 1
    return _steps(columns, row_starts, skips=False) * _LANES * 4 + out + 4 * (-(-out // _LANES) + 1)


def _shape(columns: torch.Tensor, row_starts: torch.Tensor) -> tuple[int, bool]:
    """Steps, and whether places are those from the last entry: 3 bytes each and not 4."""
    narrow = _steps(columns, row_starts, skips=True)
    wide = _steps(columns, row_starts, skips=False)
    return (narrow, True) if 0 <= 3 * narrow <= 4 * wide else (wide, False)


def _steps(columns: torch.Tensor, row_starts: torch.Tensor, *, skips: bool) -> int:
    """Of all lanes; negative where skips cannot tell the columns, which do not ascend."""
    found: int = functions().turret_sparse_steps(
        columns.data_ptr(), row_starts.data_ptr(), len(row_starts) - 1, skips
    )
    return found
