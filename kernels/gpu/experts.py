"""Mixtures of experts: the routing of rows, the experts' products and updates, and their sum."""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.expert_routing import Routing, sort_pairs
from turret.kernels.gpu.common import (
    CODES,
    add_codes,
    check_addresses,
    check_contiguous,
    check_float,
    check_length,
    check_rows,
    check_shape,
    code_words,
    codes_on,
    dot,
    pointer_to,
    tuning,
)
from turret.kernels.gpu.tables import ROW_HEADER, RowTable
from turret.kernels.nf4_matmul import BLOCK, MXFP4, NF4, Nf4Matrix

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
        # The first of equal scores wins. A NaN equals nothing: if no score matches, take the first
        # open one.
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
        per_token: The number of experts that process a row.
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


# The products of all experts of a layer in one launch, which decodes 4-bit weights in registers.
#
# A program computes a tile of output columns for up to 16 pairs of one expert, and goes through the
# input features by quantisation block, as ``nf4_matmul`` does. A program finds its pairs from the
# ends of the experts' pairs, because the host knows only the total number of pairs. Enough programs
# for the worst case are launched; those without work end at once. Every pair goes through the same
# tensor-core instructions in the same order, regardless of the other pairs of its expert.

_TILE = 16
_PAIRS = tl.constexpr(_TILE)


@triton.jit
def nf4_experts_kernel(
    x_ptr,  # [num_rows, in_features]
    rows_ptr,  # [num_pairs] int64: the row of x that each pair reads; None: its own
    ends_ptr,  # [num_experts] int64
    packed_ptr,  # [num_experts, out_features, in_features / 2] uint8; or in_features numbers
    codes_ptr,  # as in add_codes
    absmax_ptr,  # [num_experts, out_features, in_features / BLOCK]; None: packed has numbers
    y_ptr,  # [num_pairs, out_features]
    x_stride,
    in_features,
    out_features,
    num_experts,
    BLOCK: tl.constexpr,  # inputs that share a scale
    IS_MXFP4: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
        blocks = in_features // BLOCK
        first_block = expert * out_features * blocks + n * blocks
        x_at = x_ptr + row * x_stride
        words = code_words(codes_ptr)
        acc = tl.zeros((BLOCK_N, _PAIRS), dtype=tl.float32)
        for g in range(blocks):
            block = first_block + g
            if absmax_ptr is None:
                whole = tl.arange(0, BLOCK)
                x = tl.load(x_at[:, None] + g * BLOCK + whole[None, :], mask=live[:, None], other=0)
                weight_at = packed_ptr + block[:, None] * BLOCK + whole[None, :]
                weight = tl.load(weight_at, mask=inside[:, None], other=0.0)
                acc = dot(weight, tl.trans(x), acc)
            else:
                absmax = tl.load(absmax_ptr + block, mask=inside, other=0.0).to(tl.float32)
                product = tl.zeros((BLOCK_N, _PAIRS), dtype=tl.float32)
                for begin in tl.static_range(0, BLOCK, CODES):
                    product = add_codes(
                        product, packed_ptr + block * (BLOCK // 2) + begin // 2,
                        x_at + g * BLOCK + begin, inside, live, codes_ptr, words, IS_MXFP4,
                    )  # fmt: skip
                acc += product * absmax[:, None]
        y_at = y_ptr + pair.to(tl.int64)[:, None] * out_features + n[None, :]
        keep = live[:, None] & inside[None, :]
        tl.store(y_at, tl.trans(acc).to(y_ptr.dtype.element_ty), mask=keep)


def nf4_experts(
    x: torch.Tensor, weight: Nf4Matrix | torch.Tensor, routing: Routing, rows: torch.Tensor | None
) -> torch.Tensor:
    """Multiply every pair of a row and an expert by the expert's weight.

    Args:
        x: ``[num_rows, in_features]`` or ``[num_pairs, in_features]``, fp16, bf16 or fp32; rows may
            be strided.
        weight: The weights of all experts, stacked by rows: quantised, or ``[num_experts ·
            out_features, in_features]`` in the dtype of ``x``.
        routing: The pairs.
        rows: The row of ``x`` that each pair reads, ``[num_pairs]`` int64; None if each pair has
            its own.

    Returns:
        ``[num_pairs, out_features]``, dtype of ``x``, one rounding from fp32. A quantised weight is
        the value of its code, rounded to the dtype of ``x``, times the scale of its block, which is
        not rounded.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("x", x)
    check_rows("x", x)
    num_pairs, num_experts = routing.rows.shape[0], routing.ends.shape[0]
    if isinstance(weight, torch.Tensor):
        check_float("weight", weight, x.dtype)
        (all_out, in_features), packed, absmax = weight.shape, weight, None
        weight_format = NF4
    else:
        all_out, in_features = weight.out_features, weight.in_features
        packed, absmax, weight_format = weight.packed, weight.absmax, weight.format
    check_shape("x", x, -1 if rows is not None else num_pairs, in_features)
    if in_features % BLOCK or all_out % num_experts:
        raise ValueError(
            f"a weight of {all_out} × {in_features} for {num_experts} experts;"
            f" columns in blocks of {BLOCK} and rows alike for all are needed"
        )
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"{num_experts} experts; at most {MAX_EXPERTS} are served")
    check_contiguous("packed", packed)
    if absmax is not None:
        check_length("packed", packed, all_out * in_features // 2)
        check_contiguous("absmax", absmax)
        check_length("absmax", absmax, all_out * in_features // weight_format.block)
    out_features = all_out // num_experts
    tuned = tuning(x.device)
    y = torch.empty(num_pairs, out_features, dtype=x.dtype, device=x.device)
    # The last tile of each expert may be only partly filled.
    tiles = triton.cdiv(num_pairs, _TILE) + min(num_experts, num_pairs)
    nf4_experts_kernel[(tiles, triton.cdiv(out_features, tuned.nf4_block_n))](
        x,
        rows,
        routing.ends,
        packed,
        codes_on(x.device, x.dtype, weight_format),
        absmax,
        y,
        x.stride(0),
        in_features,
        out_features,
        num_experts,
        BLOCK=weight_format.block,
        IS_MXFP4=weight_format == MXFP4,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_N=tuned.nf4_block_n,
        num_warps=2,
        num_stages=tuned.nf4_stages,
        enable_fp_fusion=True,
        **tuned.registers(255),
    )
    return y


# Low-rank updates of experts: ``y_p += w · B_e (A_e x_p)`` for pairs of a row and an expert.
#
# Two launches, shrink and expand, use a program per pair and tile: the factors of a pair belong to
# its row's adapter and its own expert, so pairs rarely share factors. The order of a pair's sums
# does not depend on other pairs. Factors are found by their addresses, so an adapter takes no more
# memory than its own bytes.

_HEADER = tl.constexpr(ROW_HEADER)
_BLOCK_R, _BLOCK_K, _BLOCK_N = 16, 128, 128


@triton.jit
def _address_of(factors_ptr, WHICH: tl.constexpr, table_ptr, row, capacity):
    """The address of A (0) or B (1) of a row's adapter; 0 if there is none."""
    is_in = row < tl.load(table_ptr)
    slot = tl.load(table_ptr + _HEADER + capacity + row, mask=is_in, other=-1).to(tl.int64)
    return tl.load(factors_ptr + 2 * slot + WHICH, mask=slot >= 0, other=0)


@triton.jit
def expert_shrink_kernel(
    x_ptr,  # [num_rows, in_features]
    reads_ptr,  # [num_pairs] int64: the row of x that each pair reads; None: its own
    rows_ptr,  # [num_pairs] int64: the row whose adapter the pair uses
    experts_ptr,  # [num_pairs] int64
    factors_ptr,  # [num_slots, 2] int64: addresses of A, [num_experts, rank, in_features], and B
    v_ptr,  # [num_pairs, rank] fp32
    table_ptr,
    x_stride,
    in_features,
    rank,
    capacity,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    address = _address_of(factors_ptr, 0, table_ptr, tl.load(rows_ptr + pair), capacity)
    if address != 0:
        a_ptr = pointer_to(address, x_ptr)
        read = pair
        if reads_ptr is not None:
            read = tl.load(reads_ptr + pair)
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        k = tl.arange(0, BLOCK_K)
        factor = tl.load(experts_ptr + pair) * rank
        a_at = a_ptr + (factor + r)[:, None] * in_features + k[None, :]
        x_at = x_ptr + read * x_stride + k
        acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        for start in range(0, in_features, BLOCK_K):
            keep = start + k < in_features
            x = tl.load(x_at + start, mask=keep, other=0.0).to(tl.float32)
            a = tl.load(a_at + start, mask=(r < rank)[:, None] & keep[None, :], other=0.0)
            acc += a.to(tl.float32) * x[None, :]
        tl.store(v_ptr + pair * rank + r, tl.sum(acc, axis=1), mask=r < rank)


@triton.jit
def expert_expand_kernel(
    v_ptr,  # [num_pairs, rank] fp32
    rows_ptr,  # [num_pairs] int64
    experts_ptr,  # [num_pairs] int64
    factors_ptr,  # [num_slots, 2] int64: addresses of A and B, [num_experts, rank, out_features]
    y_ptr,  # [num_pairs, out_features]
    table_ptr,
    y_stride,
    out_features,
    rank,
    capacity,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + pair)
    address = _address_of(factors_ptr, 1, table_ptr, row, capacity)
    if address != 0:
        b_ptr = pointer_to(address, y_ptr)
        weight = tl.load(table_ptr + _HEADER + 2 * capacity + row).to(tl.float32, bitcast=True)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < out_features
        factor = tl.load(experts_ptr + pair) * rank
        delta = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            v = tl.load(v_ptr + pair * rank + r, mask=r < rank, other=0.0)
            b_at = b_ptr + (factor + r)[:, None] * out_features + n[None, :]
            b = tl.load(b_at, mask=(r < rank)[:, None] & inside[None, :], other=0.0)
            delta += tl.sum(v[:, None] * b.to(tl.float32), axis=0)
        y_at = y_ptr + pair * y_stride + n
        y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_at, (y + weight * delta).to(y_ptr.dtype.element_ty), mask=inside)


def add_expert_updates(
    x: torch.Tensor,
    y: torch.Tensor,
    factors: torch.Tensor,
    rank: int,
    table: RowTable,
    routing: Routing,
    rows: torch.Tensor | None,
) -> None:
    """Add the experts' low-rank updates to ``y`` in place, with one rounding to its dtype.

    Args:
        x: ``[num_rows, in_features]`` or ``[num_pairs, in_features]``, fp16, bf16 or fp32; rows may
            be strided.
        y: ``[num_pairs, out_features]``, dtype of ``x``; rows may be strided.
        factors: Addresses by slot, ``[num_slots, 2]`` int64, contiguous: of A, ``[num_experts,
            rank, in_features]``, and of B, ``[num_experts, rank, out_features]``. Both have the
            dtype of ``x``, are contiguous, and begin at multiples of 16 bytes. The addresses of a
            slot without an update are 0.
        rank: The rank of all experts' factors.
        table: The slot and weight of every row from the first on, with slot -1 for rows without an
            update; rows after the table's last one have no update.
        routing: The pairs.
        rows: The row of ``x`` that each pair reads, ``[num_pairs]`` int64; None if each pair has
            its own.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract. The memory at the addresses is not
            checked, because that would synchronise.
    """
    num_pairs, in_features, out_features = routing.rows.shape[0], x.shape[1], y.shape[1]
    _check(x, y, factors, num_pairs, gathers=rows is not None)
    v = torch.empty(num_pairs, rank, dtype=torch.float32, device=x.device)
    expert_shrink_kernel[(num_pairs, triton.cdiv(rank, _BLOCK_R))](
        x,
        rows,
        routing.rows,
        routing.experts,
        factors,
        v,
        table.buffer,
        x.stride(0),
        in_features,
        rank,
        table.capacity,
        BLOCK_R=_BLOCK_R,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
        enable_fp_fusion=True,
    )
    expert_expand_kernel[(num_pairs, triton.cdiv(out_features, _BLOCK_N))](
        v,
        routing.rows,
        routing.experts,
        factors,
        y,
        table.buffer,
        y.stride(0),
        out_features,
        rank,
        table.capacity,
        BLOCK_R=_BLOCK_R,
        BLOCK_N=_BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _check(
    x: torch.Tensor, y: torch.Tensor, factors: torch.Tensor, num_pairs: int, *, gathers: bool
) -> None:
    for name, tensor in (("x", x), ("y", y)):
        check_float(name, tensor, x.dtype)
        check_rows(name, tensor)
    check_shape("y", y, num_pairs, -1)
    check_shape("x", x, -1 if gathers else num_pairs, -1)
    check_addresses("factors", factors, 2)


# Triton form of ``combine_reference``: the weighted sum of the results of a row's experts.

_COLUMNS = 1024


@triton.jit
def combine_experts_kernel(
    y_ptr,  # [num_pairs, width]
    places_ptr,  # [num_rows, per_token] int64
    weights_ptr,  # [num_rows, per_token] fp32
    out_ptr,  # [num_rows, width]
    stride,
    width,
    per_token,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(per_token):
        place = tl.load(places_ptr + row * per_token + j)
        weight = tl.load(weights_ptr + row * per_token + j)
        part = tl.load(y_ptr + place * stride + cols, mask=inside, other=0.0)
        total += weight * part.to(tl.float32)
    tl.store(out_ptr + row * width + cols, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine_experts(y: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Sum the results of a row's experts, in fp32 and in the order of their weights; one rounding.

    Args:
        y: ``[num_pairs, width]``, fp16, bf16 or fp32; rows may be strided.
        routing: The pairs.

    Returns:
        ``[num_rows, width]``, dtype of ``y``, contiguous.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("y", y)
    check_rows("y", y)
    num_rows, per_token = routing.places.shape
    check_shape("y", y, num_rows * per_token, -1)
    width = y.shape[1]
    out = torch.empty(num_rows, width, dtype=y.dtype, device=y.device)
    combine_experts_kernel[(num_rows, triton.cdiv(width, _COLUMNS))](
        y,
        routing.places,
        routing.weights,
        out,
        y.stride(0),
        width,
        per_token,
        BLOCK=_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
