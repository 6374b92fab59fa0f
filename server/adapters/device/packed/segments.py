"""Turns the mixes of a step's rows into the segment plan of the packed kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from turret.kernels.adapters.segments import LongSegment, SegmentMember, SegmentPlan, ShortPass
from turret.server.adapters.device.members import Members, StepMembers
from turret.server.adapters.device.packed.placement import Place


def plan_segments(
    members: StepMembers, places: Mapping[str, Place], device: torch.device
) -> SegmentPlan:
    """Plan a step.

    Args:
        members: Mixes of its rows.
        places: Place of every adapter in them.
        device: Where the metadata goes.
    """
    rows = [segment_members(mix, places) for mix in members.short]
    chosen = [m for found in rows for m in found if m.rank_end > m.rank_start]
    low = min((m.rank_start for m in chosen), default=0)
    high = max((m.rank_end for m in chosen), default=0)
    long = tuple(
        LongSegment(start, end, tuple(segment_members(mix, places)))
        for start, end, mix in members.long
    )
    return SegmentPlan(len(rows), low, high, _passes(rows, low, high, device), long)


def segment_members(mix: Members, places: Mapping[str, Place]) -> list[SegmentMember]:
    """The places of a mix's adapters and their weights, in the request's order."""
    found = ((places[key], weight) for key, weight in mix)
    return [SegmentMember(p.rank_start, p.rank_end, p.slot, weight) for p, weight in found]


def _passes(
    rows: Sequence[Sequence[SegmentMember]], low: int, high: int, device: torch.device
) -> tuple[ShortPass, ...]:
    """One pass per position in the mixes, over the ranks ``[low, high)``."""
    passes = []
    ranks = torch.arange(low, high, device=device)

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    for j in range(max((len(found) for found in rows), default=0)):
        numbers = [i for i, found in enumerate(rows) if len(found) > j]
        chosen = [rows[i][j] for i in numbers]
        start = tensor([m.rank_start for m in chosen]).unsqueeze(1)
        end = tensor([m.rank_end for m in chosen]).unsqueeze(1)
        foreign = (ranks < start) | (ranks >= end)
        passes.append(
            ShortPass(
                rows=None if len(numbers) == len(rows) else tensor(numbers),
                foreign=foreign if bool(foreign.any()) else None,
                slots=tensor([m.slot for m in chosen]),
                slot_weights=torch.tensor([[m.weight] for m in chosen], device=device),
                plain=all(m.weight == 1.0 for m in chosen),
            )
        )
    return tuple(passes)
