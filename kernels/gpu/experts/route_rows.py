"""Triton form of ``route_reference``: a program chooses the experts of a row."""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.expert_routing import Routing, sort_pairs
from turret.kernels.gpu.shared.contract import check_float, check_rows, check_shape

MAX_EXPERTS = 1024


@triton.jit
def route_rows_kernel(
    scores_ptr,  # [num_rows, num_experts]
    chosen_ptr,  # [num_rows, per_token] int64
    weights_ptr,  # [num_rows, per_token] fp32
    stride,
    num_experts,
    per_token,
    NORMALIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, BLOCK)
    inside = numbers < num_experts
    at = scores_ptr + row * stride + numbers
    left = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    highest = tl.max(left, axis=0)
    total = tl.sum(tl.where(inside, tl.exp(left - highest), 0.0), axis=0)
    place = tl.arange(0, BLOCK_K)
    chosen = tl.zeros((BLOCK_K,), dtype=tl.int32)
    weights = tl.zeros((BLOCK_K,), dtype=tl.float32)
    is_open = inside
    for j in range(per_token):
        best = tl.max(tl.where(is_open, left, float("-inf")), axis=0)
        # Of equal scores the first wins. A NaN equals nothing: if no score matches, the first open
        # one is taken.
        number = tl.min(tl.where(is_open & (left == best), numbers, num_experts), axis=0)
        first = tl.min(tl.where(is_open, numbers, num_experts - 1), axis=0)
        number = tl.where(number < num_experts, number, first)
        is_open = is_open & (numbers != number)
        chosen = tl.where(place == j, number, chosen)
        weights = tl.where(place == j, tl.exp(best - highest), weights)
    if NORMALIZES:
        total = tl.sum(weights, axis=0)
    to = row * per_token + place
    keep = place < per_token
    tl.store(chosen_ptr + to, chosen.to(tl.int64), mask=keep)
    tl.store(weights_ptr + to, weights / total, mask=keep)


def route_rows(scores: torch.Tensor, per_token: int, *, normalizes: bool) -> Routing:
    """Choose the experts of every row.

    Args:
        scores: ``[num_rows, num_experts]``, fp16, bf16 or fp32; rows may be strided.
        per_token: How many experts a row goes through.
        normalizes: Whether a row's weights are scaled so that their sum is 1.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract, or there are over 1,024 experts.
    """
    check_float("scores", scores)
    check_rows("scores", scores)
    check_shape("scores", scores, -1, -1)
    num_rows, num_experts = scores.shape
    if not 1 <= per_token <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{per_token} of {num_experts} experts; at most {MAX_EXPERTS} are served")
    like = {"device": scores.device}
    chosen = torch.empty(num_rows, per_token, dtype=torch.int64, **like)
    weights = torch.empty(num_rows, per_token, dtype=torch.float32, **like)
    route_rows_kernel[(num_rows,)](
        scores,
        chosen,
        weights,
        scores.stride(0),
        num_experts,
        per_token,
        NORMALIZES=normalizes,
        BLOCK=triton.next_power_of_2(num_experts),
        BLOCK_K=triton.next_power_of_2(per_token),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return sort_pairs(chosen, weights, num_experts)
