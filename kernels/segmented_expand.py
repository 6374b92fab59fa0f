"""Add every row's adapter updates to the base result: ``y += Σ_k w_k · v_k B_kᵀ``.

Semantics, per row and per slice ``s`` (columns ``[offset_s, offset_s + out_s)`` of ``y``), over the
components of the row's mix in the request's order::

    y[row, s] += w_k · v[row, lo_k:hi_k, s] @ b_s[lo_k:hi_k]

Named after Punica's expand (arXiv 2310.18547, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.kernels.row_linear import row_addmm_
from turret.kernels.segmented_shrink import RankActivations
from turret.kernels.segments import SegmentPlan, ShortPass


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
    views = y.split([slice_b.shape[1] for slice_b in b], dim=1)
    if v.short is not None and plan.rank_end > plan.rank_start:
        spans = [slice_b[plan.rank_start : plan.rank_end] for slice_b in b]
        for short_pass in plan.passes:
            _expand_short(views, v.short, spans, short_pass, present)
    for segment, components in zip(plan.long, v.long, strict=True):
        for c, activations in zip(segment.components, components, strict=True):
            if c.rank_end == c.rank_start:
                continue
            if c.weight != 1.0:
                activations = (activations * c.weight).to(activations.dtype)
            for s, (view, slice_b) in enumerate(zip(views, b, strict=True)):
                if present[s]:
                    part = slice_b[c.rank_start : c.rank_end]
                    row_addmm_(view[segment.start : segment.end], activations[:, :, s], part)


def _expand_short(
    views: Sequence[torch.Tensor],
    v: torch.Tensor,
    b: Sequence[torch.Tensor],
    short_pass: ShortPass,
    present: tuple[bool, ...],
) -> None:
    rows = short_pass.rows
    selected = v if rows is None else v.index_select(0, rows)
    if not short_pass.plain:
        selected = (selected * short_pass.slot_weights.unsqueeze(1)).to(v.dtype)
    # [num_slices, rows, span]
    selected = selected.permute(2, 0, 1).masked_fill(~short_pass.mask, 0).contiguous()
    for s, (view, slice_b) in enumerate(zip(views, b, strict=True)):
        if not present[s]:
            continue
        if rows is None:
            row_addmm_(view[: v.shape[0]], selected[s], slice_b)
        else:
            part = view.index_select(0, rows)
            row_addmm_(part, selected[s], slice_b)
            view.index_copy_(0, rows, part)
