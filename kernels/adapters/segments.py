"""Segment metadata: which rows of a step use which adapters, prepared once per step.

Rows of a step are ordered *short adapted rows* (decode tokens and tiny prefill pieces, many
adapters), then rows of the base model alone, then *long segments* (prefill chunks, one mix each).
Base rows are touched by no operator. Adapters of the step live side by side in a pack: adapter
``k`` owns the ranks ``[lo_k, hi_k)`` of every packed matrix, so the short rows of all adapters are
one wide product whose foreign columns are masked to zero (few, wide calls win on a CPU), while a
long segment multiplies only its own ranks.

A mix is summed member by member in the request's order (*pass* 0, 1, …), never in the
order in which the pack happens to hold the adapters: that keeps results bit-identical in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class ShortPass:
    """The ``j``-th member of the short rows' mixes.

    Attributes:
        rows: Row numbers whose mix has a ``j``-th member, ``[n_j]`` int64, or None for all of them.
        foreign: ``[n_j, span]`` bool, True on the ranks that are not the member's: their values
            are cleared, not multiplied by zero, since another adapter may overflow on these rows
            and ``inf · 0`` would poison them. All True for a member of weight 0. None where
            every row owns the whole span.
        slots: Pack slot of the member, ``[n_j]`` int64 (for gains and biases).
        slot_weights: Mix weight, ``[n_j, 1]`` fp32.
        plain: True where every weight is 1, so that masking alone is exact.
    """

    rows: torch.Tensor | None
    foreign: torch.Tensor | None
    slots: torch.Tensor
    slot_weights: torch.Tensor
    plain: bool


@dataclass(frozen=True, slots=True)
class SegmentMember:
    """One adapter of a long segment's mix: its ranks in the pack, its slot and its weight."""

    rank_start: int
    rank_end: int
    slot: int
    weight: float


@dataclass(frozen=True, slots=True)
class GatedMembers:
    """Members that are the components of one gated adapter; the gpu path has such.

    Attributes:
        begin: Position of the first one in the segment's members.
        end: Position behind the last one. They share a slot.
        asked: Queries or prototypes of the adapter in any module at most.
        told: Where what a first pass has told of the step's first row begins, for an adapter that
            is told its gates.
        told_stride: From there to the next row's.
    """

    begin: int
    end: int
    asked: int
    told: int = 0
    told_stride: int = 0


@dataclass(frozen=True, slots=True)
class LongSegment:
    """A run of rows that share one mix.

    ``as_is`` has a bit for each projection whose base result the mix needs for the rows' own input,
    since a member scales it or exchanges its places; the gpu path reads it where inputs change.
    ``gated`` are the gated adapters among the members. Equal mixes have equal ones of both.
    """

    start: int
    end: int
    members: tuple[SegmentMember, ...]
    as_is: int = 0
    gated: tuple[GatedMembers, ...] = ()


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """All segments of a step. ``num_short`` rows come first; see the module docstring.

    ``[rank_start, rank_end)`` is the span of pack ranks that the short rows' adapters lie in.
    """

    num_short: int = 0
    rank_start: int = 0
    rank_end: int = 0
    passes: tuple[ShortPass, ...] = ()
    long: tuple[LongSegment, ...] = field(default=())

    @property
    def is_base_only(self) -> bool:
        return self.num_short == 0 and not self.long
