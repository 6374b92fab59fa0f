"""Turns the mixes of a step's rows into the segment plan of the packed kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from turret.kernels.segments import Component, LongSegment, SegmentPlan, ShortPass
from turret.server.adapters.device.members import Members, StepMembers


class Place(Protocol):
    """Where the pack holds an adapter."""

    rank_start: int
    rank_end: int
    slot: int


def plan_segments(
    members: StepMembers, places: Mapping[str, Place], device: torch.device
) -> SegmentPlan:
    """Plan a step.

    Args:
        members: Mixes of its rows.
        places: Place of every adapter in them.
        device: Where the metadata goes.
    """
    rows = [components_of(mix, places) for mix in members.short]
    chosen = [c for components in rows for c in components if c.rank_end > c.rank_start]
    low = min((c.rank_start for c in chosen), default=0)
    high = max((c.rank_end for c in chosen), default=0)
    long = tuple(
        LongSegment(start, end, tuple(components_of(mix, places)))
        for start, end, mix in members.long
    )
    return SegmentPlan(len(rows), low, high, _passes(rows, low, high, device), long)


def components_of(mix: Members, places: Mapping[str, Place]) -> list[Component]:
    """The places of a mix's adapters and their weights, in the request's order."""
    found = ((places[key], weight) for key, weight in mix)
    return [Component(p.rank_start, p.rank_end, p.slot, weight) for p, weight in found]


def _passes(
    rows: Sequence[Sequence[Component]], low: int, high: int, device: torch.device
) -> tuple[ShortPass, ...]:
    """One pass per position in the mixes, over the ranks ``[low, high)``."""
    passes = []
    ranks = torch.arange(low, high, device=device)

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    for j in range(max((len(components) for components in rows), default=0)):
        numbers = [i for i, components in enumerate(rows) if len(components) > j]
        chosen = [rows[i][j] for i in numbers]
        start = tensor([c.rank_start for c in chosen]).unsqueeze(1)
        end = tensor([c.rank_end for c in chosen]).unsqueeze(1)
        foreign = (ranks < start) | (ranks >= end)
        passes.append(
            ShortPass(
                rows=None if len(numbers) == len(rows) else tensor(numbers),
                foreign=foreign if bool(foreign.any()) else None,
                slots=tensor([c.slot for c in chosen]),
                slot_weights=torch.tensor([[c.weight] for c in chosen], device=device),
                plain=all(c.weight == 1.0 for c in chosen),
            )
        )
    return tuple(passes)
