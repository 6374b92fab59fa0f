"""The product of queries, keys and values, and ``rope_kv_write`` of it, in one launch.

All programs store their parts of the product, the last one of a tile of columns adds them up, turns
the heads of the tile and stores them where they go: the product itself is never written. A tile
holds whole heads. The bits are those of the two kernels one after the other.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.kv_write import KvWrite
from turret.kernels.gpu.nf4_matmul import (
    check_product,
    counters_on,
    multiply_columns,
    options_of,
    parts_of,
    sum_of_parts,
)
from turret.kernels.gpu.rope_kv_write import pair_of, store_heads
from turret.kernels.gpu.shared.contract import check_contiguous, check_float, check_shape
from turret.kernels.gpu.shared.last_program import is_last
from turret.kernels.gpu.shared.nf4_codes import code_on
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.nf4_matmul import BLOCK, Nf4Matrix

_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _biased_sum(
    parts_ptr, bias_ptr, m, n, keep, inside, num_rows, out_features, dtype: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """The product in some columns, its bias added after it was rounded, rounded again."""
    y = sum_of_parts(parts_ptr, m, n, keep, num_rows, out_features, dtype, SPLITS)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
        y = (y + bias[None, :]).to(dtype).to(tl.float32)
    return y


@triton.jit
def _store_tile(
    first_head, x_ptr, parts_ptr, bias_ptr, cos_ptr, sin_ptr, kv_slots_ptr, q_ptr,
    k_cache_ptr, v_cache_ptr, num_rows, out_features, num_heads, kv_heads, pairs,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, HALF: tl.constexpr, PARTIAL: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Turn the heads of a tile of columns and store them, from the parts of all programs."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pair = tl.arange(0, BLOCK_N // 2)
    head = first_head + pair // HALF
    h = pair % HALF
    i, j = pair_of(h, HALF, pairs, PARTIAL, INTERLEAVED)
    num_all = num_heads + 2 * kv_heads
    inside = head < num_all
    at_i, at_j = head * 2 * HALF + i, head * 2 * HALF + j
    for first_row in tl.range(0, num_rows, ROWS, num_stages=1):
        m = first_row + tl.arange(0, ROWS)
        live = m < num_rows
        keep = live[:, None] & inside[None, :]
        first = _biased_sum(
            parts_ptr, bias_ptr, m, at_i, keep, inside, num_rows, out_features, dtype, SPLITS
        )
        second = _biased_sum(
            parts_ptr, bias_ptr, m, at_j, keep, inside, num_rows, out_features, dtype, SPLITS
        )
        store_heads(
            first, second, m.to(tl.int64), live, head, h, i, j, cos_ptr, sin_ptr, kv_slots_ptr,
            q_ptr, k_cache_ptr, v_cache_ptr, num_heads, kv_heads, HALF, pairs,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "part_blocks"])
def nf4_rotate_kernel(
    x_ptr,  # [num_rows, in_features]
    packed_ptr,  # as in nf4_matmul
    code_ptr,
    absmax_ptr,
    bias_ptr,  # [out_features] or None
    parts_ptr,  # [SPLITS, num_rows, out_features] fp32
    counters_ptr,
    cos_ptr,  # as in rope_kv_write
    sin_ptr,
    kv_slots_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    num_rows,
    x_stride,
    in_features,
    out_features,
    part_blocks,
    num_heads,
    kv_heads,
    pairs,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    HALF: tl.constexpr,
    PARTIAL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * part_blocks
    last = tl.minimum(begin + part_blocks, in_features // _BLOCK)
    multiply_columns(
        x_ptr, packed_ptr, code_ptr, absmax_ptr,
        parts_ptr + tl.program_id(1).to(tl.int64) * num_rows * out_features, n, n < out_features,
        begin, last, num_rows, x_stride, in_features, out_features, TILES, BLOCK_N, PTX,
    )  # fmt: skip
    if is_last(counters_ptr + tile, SPLITS):
        _store_tile(
            tile * (BLOCK_N // (2 * HALF)), x_ptr, parts_ptr, bias_ptr, cos_ptr, sin_ptr,
            kv_slots_ptr, q_ptr, k_cache_ptr, v_cache_ptr, num_rows, out_features, num_heads,
            kv_heads, pairs, 16 if TILES == 1 else 32, SPLITS, HALF, PARTIAL, INTERLEAVED, BLOCK_N,
        )  # fmt: skip


def nf4_rotate(
    x: torch.Tensor, weight: Nf4Matrix, bias: torch.Tensor | None, write: KvWrite
) -> torch.Tensor:
    """Multiply, turn the heads, store keys and values.

    Launches share counters with those of ``nf4_matmul``: all follow each other on one stream.

    Args:
        x: ``[num_rows, in_features]``, 1 to 64 rows, fp16, bf16 or fp32; rows may be strided.
        weight: As for ``nf4_matmul``; heads of queries first, then of keys, then
            of values.
        bias: ``[out_features]`` contiguous, or None.
        write: Of the same rows; a tile of columns holds whole heads (``KvWrite.divides``).

    Returns:
        Rotated queries, ``[num_rows, num_heads, head_dim]``, dtype of the cache: the bits of
        ``nf4_matmul``, the bias and ``rope_kv_write`` one after the other.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    tuned = tuning(x.device)
    check_product(x, weight)
    (num_rows, in_features), out_features = x.shape, weight.out_features
    write.check(num_rows, out_features)
    if not write.divides(tuned.nf4_block_n):
        raise ValueError(f"heads of {write.head_dim} do not divide {tuned.nf4_block_n} columns")
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, out_features)
        check_contiguous("bias", bias)
    splits, part_blocks = parts_of(out_features, in_features // BLOCK, tuned)
    shape = (splits, num_rows, out_features)
    q = write.empty_queries(num_rows, out_features)
    columns = triton.cdiv(out_features, tuned.nf4_block_n)
    nf4_rotate_kernel[(columns, splits)](
        x,
        weight.packed,
        code_on(x.device),
        weight.absmax,
        bias,
        torch.empty(shape, dtype=torch.float32, device=x.device),
        counters_on(x.device),
        write.cos,
        write.sin,
        write.kv_slots,
        q,
        write.k_cache,
        write.v_cache,
        num_rows,
        x.stride(0),
        in_features,
        out_features,
        part_blocks,
        write.num_heads(out_features),
        write.kv_heads,
        write.pairs,
        SPLITS=splits,
        HALF=write.head_dim // 2,
        PARTIAL=write.is_partial,
        INTERLEAVED=write.is_interleaved,
        **options_of(num_rows, tuned),
    )
    return q
