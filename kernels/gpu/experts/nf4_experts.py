"""The products of all experts of a layer in one launch, by their NF4 codes in registers.

A program takes up to 16 pairs of one expert and a tile of its output columns, and walks the input
features by quantisation block, as ``nf4_matmul`` does. Which pairs it takes it finds itself, from
where the pairs of each expert end: the host knows only how many pairs there are. There are programs
for the worst case; those that find nothing to do end. Every pair goes through the same tensor-core
instruction in the same order, whichever others its expert got.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.expert_routing import Routing
from turret.kernels.gpu.experts.route_rows import MAX_EXPERTS
from turret.kernels.gpu.shared.contract import (
    check_contiguous,
    check_float,
    check_length,
    check_rows,
    check_shape,
)
from turret.kernels.gpu.shared.dots import dot
from turret.kernels.gpu.shared.nf4_codes import code_on, code_pairs
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.nf4_matmul import BLOCK, Nf4Matrix

_TILE = 16
_BLOCK = tl.constexpr(BLOCK)
_HALF = tl.constexpr(BLOCK // 2)
_PAIRS = tl.constexpr(_TILE)


@triton.jit
def nf4_experts_kernel(
    x_ptr,  # [num_rows, in_features]
    rows_ptr,  # [num_pairs] int64: the row of x that each pair reads; None: its own
    ends_ptr,  # [num_experts] int64
    packed_ptr,  # [num_experts, out_features, in_features / 2] uint8
    code_ptr,  # [16] fp32
    absmax_ptr,  # [num_experts, out_features, in_features / 64] fp32
    y_ptr,  # [num_pairs, out_features]
    x_stride,
    in_features,
    out_features,
    num_experts,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
):
    tile = tl.program_id(0)
    numbers = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_ptr + numbers, mask=numbers < num_experts, other=0).to(tl.int32)
    is_after = (numbers > 0) & (numbers < num_experts)
    starts = tl.load(ends_ptr + numbers - 1, mask=is_after, other=0).to(tl.int32)
    tiles = tl.where(numbers < num_experts, (ends - starts + _PAIRS - 1) // _PAIRS, 0)
    before = tl.cumsum(tiles, axis=0) - tiles
    if tile < tl.sum(tiles, axis=0):
        mine = (before <= tile) & (tile < before + tiles)
        expert = tl.sum(tl.where(mine, numbers, 0), axis=0).to(tl.int64)
        first = tl.sum(tl.where(mine, starts + (tile - before) * _PAIRS, 0), axis=0)
        end = tl.sum(tl.where(mine, ends, 0), axis=0)
        pair = first + tl.arange(0, _PAIRS)
        live = pair < end
        row = pair.to(tl.int64)
        if rows_ptr is not None:
            row = tl.load(rows_ptr + pair, mask=live, other=0)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < out_features
        blocks = in_features // _BLOCK
        codes_at = packed_ptr + expert * out_features * blocks * _HALF
        maxima_at = absmax_ptr + expert * out_features * blocks
        first_block = n * blocks
        half = tl.arange(0, _HALF)
        x_at = x_ptr + row[:, None] * x_stride + tl.arange(0, _BLOCK)[None, :]
        acc = tl.zeros((_PAIRS, BLOCK_N), dtype=tl.float32)
        for g in range(blocks):
            block = first_block + g
            absmax = tl.load(maxima_at + block, mask=inside, other=0.0)
            byte_at = codes_at + block[:, None] * _HALF + half[None, :]
            byte = tl.load(byte_at, mask=inside[:, None], other=0)
            even, odd = code_pairs(byte, code_ptr, x_ptr.dtype.element_ty, PTX)
            weight = tl.trans(tl.reshape(tl.join(even, odd), (BLOCK_N, _BLOCK)))
            x = tl.load(x_at + g * _BLOCK, mask=live[:, None], other=0.0)
            product = dot(x, weight, tl.zeros((_PAIRS, BLOCK_N), dtype=tl.float32))
            acc += product * absmax[None, :]
        y_at = y_ptr + pair.to(tl.int64)[:, None] * out_features + n[None, :]
        keep = live[:, None] & inside[None, :]
        tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=keep)


def nf4_experts(
    x: torch.Tensor, weight: Nf4Matrix, routing: Routing, rows: torch.Tensor | None
) -> torch.Tensor:
    """Multiply every pair of a row and an expert by the expert's quantised weight.

    Args:
        x: ``[num_rows, in_features]`` or ``[num_pairs, in_features]``, fp16, bf16 or fp32; rows may
            be strided.
        weight: Those of all experts below each other.
        routing: The pairs.
        rows: The row of ``x`` that each pair reads, ``[num_pairs]`` int64; None for its own.

    Returns:
        ``[num_pairs, out_features]``, dtype of ``x``, one rounding from fp32. A weight is its value
        of ``CODE``, rounded to the dtype of ``x``, times its block's maximum, not rounded.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("x", x)
    check_rows("x", x)
    num_pairs, num_experts = routing.rows.shape[0], routing.ends.shape[0]
    check_shape("x", x, -1 if rows is not None else num_pairs, weight.in_features)
    absmax, size = weight.absmax, weight.out_features * weight.in_features
    if weight.in_features % BLOCK or weight.out_features % num_experts:
        raise ValueError(
            f"a weight of {weight.out_features} × {weight.in_features} for {num_experts} experts;"
            f" columns in blocks of {BLOCK} and rows alike for all are needed"
        )
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"{num_experts} experts; at most {MAX_EXPERTS} are served")
    check_contiguous("packed", weight.packed)
    check_length("packed", weight.packed, size // 2)
    check_contiguous("absmax", absmax)
    check_length("absmax", absmax, size // BLOCK)
    out_features = weight.out_features // num_experts
    tuned = tuning(x.device)
    y = torch.empty(num_pairs, out_features, dtype=x.dtype, device=x.device)
    # The last tile of each expert may be only partly filled.
    tiles = triton.cdiv(num_pairs, _TILE) + min(num_experts, num_pairs)
    nf4_experts_kernel[(tiles, triton.cdiv(out_features, tuned.nf4_block_n))](
        x,
        rows,
        routing.ends,
        weight.packed,
        code_on(x.device),
        absmax,
        y,
        x.stride(0),
        weight.in_features,
        out_features,
        num_experts,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_N=tuned.nf4_block_n,
        PTX=tuned.inline_ptx,
        num_warps=4,
        num_stages=tuned.nf4_stages,
        enable_fp_fusion=True,
    )
    return y
