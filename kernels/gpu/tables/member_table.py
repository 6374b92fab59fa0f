"""Rows with the adapters of their mixes, on the device: for what is not a projection of a layer.

One int32 buffer of fixed address. How many rows and positions of mixes there are is in it: a launch
does not depend on them, and a captured CUDA graph replays with any later step::

    positions · rows · 0 · 0 | slots | weights (fp32 bits) | firsts      [positions, rows] each

A slot of -1 is none: of a row whose mix is shorter, or of the bare base. ``firsts`` is where the
adapter's ranks begin among those of its row.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from turret.kernels.gpu.tables.staged_buffer import StagedMemory

HEADER = 4
_COLUMNS = 3


class RowMember(NamedTuple):
    """An adapter of a row's mix.

    Attributes:
        slot: Where tables by slot have it.
        weight: Of the mix.
        first: Where its ranks begin among those of its row.
    """

    slot: int
    weight: float
    first: int = 0


# First row, end row, and what they share.
MemberRun = tuple[int, int, Sequence[RowMember]]
_NOBODY = RowMember(-1, 0.0)


class MemberTable:
    """Owns its part of the device memory. Not thread-safe.

    Attributes:
        buffer: Int32 on the device; its address never changes.
        max_rows: Rows at most.
        max_members: Adapters of a row's mix at most.
    """

    def __init__(
        self,
        max_rows: int,
        max_members: int,
        device: torch.device,
        memory: StagedMemory | None = None,
    ) -> None:
        """Allocate, as a part of ``memory`` if that is given."""
        self.max_rows, self.max_members = max_rows, max_members
        memory = StagedMemory(device, 0) if memory is None else memory
        self._part = memory.part(HEADER + _COLUMNS * max_rows * max_members, torch.int32)
        self.buffer = self._part.buffer

    def load(self, runs: Sequence[MemberRun]) -> None:
        """Name the members of every row.

        Args:
            runs: Runs of rows that share a mix: first row, end row, members. Each begins where the
                one before ends, the first one at row 0; rows that are missing have no members.

        Raises:
            ValueError: More rows, or members of a row, than there is room for.
        """
        positions = max((len(mix) for _, _, mix in runs), default=0)
        num_rows = runs[-1][1] if runs else 0
        if num_rows > self.max_rows or positions > self.max_members:
            raise ValueError(
                f"{num_rows} rows of {positions} members; "
                f"{self.max_rows} of {self.max_members} are allocated"
            )
        slots: list[int] = []
        weights: list[float] = []
        firsts: list[int] = []
        for position in range(positions):
            for start, end, mix in runs:
                member = mix[position] if position < len(mix) else _NOBODY
                slots += [member.slot] * (end - start)
                weights += [member.weight] * (end - start)
                firsts += [member.first] * (end - start)
        bits = struct.unpack(f"<{len(weights)}i", struct.pack(f"<{len(weights)}f", *weights))
        self._part.load((positions, num_rows, 0, 0, *slots, *bits, *firsts))
