"""Project every adapted row onto the rank space of its adapters: ``v = x Aᵀ``.

Semantics, for a row of a segment whose mix holds adapter ``k``, and each slice ``s`` of a fused
projection (q·k·v, gate·up)::

    v[row, lo_k:hi_k, s] = x[row] @ a[lo_k:hi_k, s]ᵀ

Named after Punica's shrink (arXiv 2310.18547, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turret.kernels.adapters.segments import SegmentPlan
from turret.kernels.rows.linear import row_linear


@dataclass(frozen=True, slots=True)
class RankActivations:
    """Rows in rank space.

    Attributes:
        short: ``[num_short, span, num_slices]`` for the plan's rank span; a row's foreign ranks
            hold garbage.
        long: Per long segment, per member of its mix, ``[rows, rank, num_slices]``.
    """

    short: torch.Tensor | None
    long: tuple[tuple[torch.Tensor, ...], ...]


def segmented_shrink_reference(
    x: torch.Tensor, a: torch.Tensor, plan: SegmentPlan
) -> RankActivations:
    """Shrink by torch products; the CPU path as well as the oracle of the Triton kernel.

    Args:
        x: Activations, ``[num_rows, in_features]``.
        a: Packed A matrices of one fused projection, ``[pack_rank, num_slices, in_features]``,
            contiguous, dtype of ``x``: an adapter's ranks are one run of memory for all slices.
            Ranks that no adapter owns are finite.
        plan: Segments of the step.

    Returns:
        Rank activations in the dtype of ``x``, each value rounded once from an fp32 accumulator.
    """
    short = None
    if plan.num_short:
        short = _project(x[: plan.num_short], a[plan.rank_start : plan.rank_end])
    long = tuple(
        tuple(
            _project(x[segment.start : segment.end], a[m.rank_start : m.rank_end])
            for m in segment.members
        )
        for segment in plan.long
    )
    return RankActivations(short, long)


def _project(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    rank, num_slices, in_features = a.shape
    if rank == 0:
        return x.new_empty(x.shape[0], 0, num_slices)
    flat = a.view(rank * num_slices, in_features)
    return row_linear(x, flat, probe=False).view(x.shape[0], rank, num_slices)
