"""Random adapters on the device, and the tables that assign rows to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turret.kernels.gpu.tables import RunOfRows, SegmentMember, SegmentTable


@dataclass(frozen=True, slots=True)
class LowRankPack:
    """Adapters of one fused projection side by side; slot 0 is neutral.

    Attributes:
        bounds: The range of ranks of each slot.
        a: ``[pack_rank, slices, in]``.
        b: Per slice ``[pack_rank, out]``.
        slice_ranks: ``[slots, slices]`` int32.
    """

    bounds: tuple[tuple[int, int], ...]
    a: torch.Tensor
    b: tuple[torch.Tensor, ...]
    slice_ranks: torch.Tensor


def bounds_of(ranks: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The ranges of ranks of all slots, beginning with slot 0, which has no ranks."""
    bounds, cursor = [(0, 0)], 0
    for rank in ranks:
        bounds.append((cursor, cursor + rank))
        cursor += rank
    return tuple(bounds)


def make_pack(
    inner: int, outs: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, device: torch.device
) -> LowRankPack:
    """Random adapters with updates about as large as the base result."""
    total = sum(ranks)
    like = {"dtype": dtype, "device": device}
    slice_ranks = torch.tensor([0, *ranks], dtype=torch.int32, device=device)
    return LowRankPack(
        bounds_of(ranks),
        torch.randn(total, len(outs), inner, **like).mul_(inner**-0.5),
        tuple(torch.randn(total, out, **like).mul_(0.1) for out in outs),
        slice_ranks[:, None].expand(-1, len(outs)).contiguous(),
    )


def make_table(
    bounds: Sequence[tuple[int, int]], slot_of_row: Sequence[int], device: torch.device
) -> SegmentTable:
    """The table of a decode step: one row per entry, where slot 0 is the base model alone."""
    widest = max(high - low for low, high in bounds)
    table = SegmentTable(
        max_rows=len(slot_of_row),
        max_row_rank=max(widest, 16),
        max_components=1,
        device=device,
    )
    runs = []
    for row, slot in enumerate(slot_of_row):
        low, high = bounds[slot]
        mix = (SegmentMember(low, high, slot, 1.0),) if slot else ()
        runs.append(RunOfRows(row, row + 1, mix))
    table.load(runs)
    return table


def exact_update(pack: LowRankPack, slot_of_row: Sequence[int], x: torch.Tensor) -> torch.Tensor:
    """``Δ(x)`` per row in float64, ``[rows, sum(out)]``."""
    out = torch.zeros(
        x.shape[0], sum(b.shape[1] for b in pack.b), dtype=torch.float64, device=x.device
    )
    for row, slot in enumerate(slot_of_row):
        low, high = pack.bounds[slot]
        start = 0
        for s, b in enumerate(pack.b):
            v = pack.a[low:high, s].double() @ x[row].double()
            out[row, start : start + b.shape[1]] = v @ b[low:high].double()
            start += b.shape[1]
    return out
