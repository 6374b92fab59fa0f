"""Which rows of a step use which adapters of a pack: what the gpu path's segment table is made of.

Adapters of the step live side by side in a pack: adapter ``k`` owns the ranks ``[lo_k, hi_k)`` of
every packed matrix.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SegmentMember:
    """One adapter of a mix: its ranks in the pack, its slot and its weight."""

    rank_start: int
    rank_end: int
    slot: int
    weight: float


@dataclass(frozen=True, slots=True)
class GatedMembers:
    """Members that are the components of one gated adapter.

    Attributes:
        begin: Position of the first one in the segment's members.
        end: Position behind the last one. They share a slot.
        asked: Length of the adapter's longest query.
    """

    begin: int
    end: int
    asked: int


@dataclass(frozen=True, slots=True)
class LongSegment:
    """A run of rows that share one mix.

    ``gated`` are the gated adapters among the members; equal mixes have equal ones.
    """

    start: int
    end: int
    members: tuple[SegmentMember, ...]
    gated: tuple[GatedMembers, ...] = ()
