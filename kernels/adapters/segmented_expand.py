"""Add every row's adapter updates to the base result: ``y += Σ_k w_k · v_k B_kᵀ``.

Semantics, per row and per slice ``s`` (columns ``[offset_s, offset_s + out_s)`` of ``y``), over the
members of the row's mix in the request's order::

    y[row, s] += w_k · v[row, lo_k:hi_k, s] @ b_s[lo_k:hi_k]

The pack's ranks are walked in *windows*, runs that start at multiples of ``rank_window(dtype)``: an
adapter that fits into a window lies in one, a larger one begins with one. Each window is one
product, short enough to be summed in one go whatever else is in it.

Named after Punica's expand (arXiv 2310.18547, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from turret.kernels.adapters.segmented_shrink import RankActivations
from turret.kernels.adapters.segments import SegmentPlan, ShortPass
from turret.kernels.rows.linear import max_reduction, row_addmm_


def rank_window(dtype: torch.dtype) -> int:
    """Ranks per window, see above; whoever places adapters in a pack has to respect it."""
    return max_reduction(dtype)


def _windows(start: int, end: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """The parts of ranks ``[start, end)`` by window; none if there are no ranks (weight 0)."""
    size = rank_window(dtype)
    while start < end:
        stop = min(start - start % size + size, end)
        yield start, stop
        start = stop


def segmented_expand_reference(
    y: torch.Tensor,
    v: RankActivations,
    b: Sequence[torch.Tensor],
    plan: SegmentPlan,
    present: tuple[bool, ...],
) -> None:
    """Expand in place by torch products; the CPU path as well as the Triton kernel's oracle.

    Args:
        y: Base results (gain and bias already applied), ``[num_rows, sum(out_s)]``, contiguous.
        v: Result of ``segmented_shrink`` for the same plan.
        b: Packed B matrices, per slice ``[pack_rank, out_s]``, dtype of ``y``, scaling folded in.
        plan: Segments of the step.
        present: Per slice, whether any adapter of the step has it.
    """
    views = y.split([slice_b.shape[1] for slice_b in b], dim=1) if len(b) > 1 else (y,)
    if v.short is not None:
        for short_pass in plan.passes:
            for start, end in _windows(plan.rank_start, plan.rank_end, y.dtype):
                low, high = start - plan.rank_start, end - plan.rank_start
                foreign = short_pass.foreign
                spans = [slice_b[start:end] for slice_b in b]
                _expand_short(
                    views,
                    v.short[:, low:high],
                    None if foreign is None else foreign[:, low:high],
                    spans,
                    short_pass,
                    present,
                )
    for segment, by_member in zip(plan.long, v.long, strict=True):
        for m, activations in zip(segment.members, by_member, strict=True):
            if m.weight != 1.0:
                activations = (activations * m.weight).to(activations.dtype)
            for start, end in _windows(m.rank_start, m.rank_end, y.dtype):
                part = activations[:, start - m.rank_start : end - m.rank_start]
                for s, (view, slice_b) in enumerate(zip(views, b, strict=True)):
                    if present[s]:
                        rows = view[segment.start : segment.end]
                        row_addmm_(rows, part[:, :, s], slice_b[start:end])


def _expand_short(
    views: Sequence[torch.Tensor],
    v: torch.Tensor,
    foreign: torch.Tensor | None,
    b: Sequence[torch.Tensor],
    short_pass: ShortPass,
    present: tuple[bool, ...],
) -> None:
    """Add one pass in one window: ``v`` ``[num_short, window, num_slices]``, the rest alike."""
    rows = short_pass.rows
    selected = v if rows is None else v.index_select(0, rows)
    if not short_pass.plain:
        selected = (selected * short_pass.slot_weights.unsqueeze(1)).to(v.dtype)
    # [num_slices, rows, window]
    selected = selected.permute(2, 0, 1)
    if foreign is not None:
        selected = selected.clone(memory_format=torch.contiguous_format).masked_fill_(foreign, 0)
    else:
        selected = selected.contiguous()
    for s, (view, slice_b) in enumerate(zip(views, b, strict=True)):
        if not present[s]:
            continue
        if rows is None:
            row_addmm_(view[: v.shape[0]], selected[s], slice_b)
        else:
            part = view.index_select(0, rows)
            row_addmm_(part, selected[s], slice_b)
            view.index_copy_(0, rows, part)
