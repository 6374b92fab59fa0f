"""Scale base results per output channel and add biases, row by row.

``y = G ⊙ y + b`` with ``G = 1 + Σ_k w_k (g_k − 1)`` and ``b = Σ_k w_k b_k`` over the row's mix:
DoRA's epilogue (arXiv 2402.09353) and IA3 on outputs (arXiv 2205.05638). Elementwise, so a row's
bits never depend on its batch mates.
"""

from __future__ import annotations

import torch

from turret.kernels.adapters.segments import SegmentPlan


def row_combine(table: torch.Tensor, plan: SegmentPlan, num_rows: int) -> torch.Tensor:
    """Mix the rows of a per-adapter table.

    Args:
        table: ``[num_slots, width]``, fp32: ``g − 1`` or ``b`` of every pack slot (0 where absent).
        plan: Segments of the step.
        num_rows: Rows of the step.

    Returns:
        ``[num_rows, width]``, fp32: ``Σ_k w_k · table[slot_k]``; zero for base rows.
    """
    out = table.new_zeros(num_rows, table.shape[1])
    for short_pass in plan.passes:
        values = table.index_select(0, short_pass.slots) * short_pass.slot_weights
        rows = short_pass.rows
        if rows is None:
            out[: plan.num_short].add_(values)
        else:
            out.index_copy_(0, rows, out.index_select(0, rows).add_(values))
    for segment in plan.long:
        block = out[segment.start : segment.end]
        for member in segment.members:
            block.add_(table[member.slot] * member.weight)
    return out


def row_gain_(y: torch.Tensor, gain_delta: torch.Tensor, plan: SegmentPlan) -> None:
    """``y ← y ⊙ (1 + Σ_k w_k (g_k − 1))`` in place; rows without a gain keep their bits.

    Args:
        y: Bias-free base results, ``[num_rows, width]``.
        gain_delta: ``g − 1`` per slot, ``[num_slots, width]``, fp32.
        plan: Segments of the step.
    """
    y.copy_(y.float() * row_combine(gain_delta, plan, y.shape[0]).add_(1.0))


def row_bias_(y: torch.Tensor, bias: torch.Tensor, plan: SegmentPlan) -> None:
    """``y ← y + Σ_k w_k b_k`` in place, ``bias`` as in ``row_combine``."""
    y.copy_(y.float() + row_combine(bias, plan, y.shape[0]))
