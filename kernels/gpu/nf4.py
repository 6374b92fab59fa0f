"""Products with NF4 weights: ``nf4_matmul`` decodes weights in registers, for 1 to 64 rows.

The kernels are bound by reading half a byte per weight, so decoding a weight must take few
instructions. A program computes a tile of output columns and goes through the input features by
quantisation block: it multiplies the values of the block's codes by up to 64 rows on tensor cores,
and then the product by the block's absmax in fp32. Every row goes through the same tensor-core
instructions in the same order, so its bits do not depend on how many rows there are.

If a weight has few columns, the input features are cut into parts at fixed positions that depend
only on the weight's shape. The last program to finish for a tile of columns adds the parts in their
order. For a weight of gates and ups, this program can also multiply the activated gates by the ups,
and write only these products.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.activations import silu_mul, silu_product
from turret.kernels.gpu.common import (
    CODES,
    Tuning,
    add_codes,
    check_contiguous,
    check_float,
    check_length,
    check_rows,
    check_shape,
    code_words,
    codes_on,
    is_last,
    tuning,
)
from turret.kernels.gpu.rope_kv_write import KvWrite, pair_of, rope_kv_write, store_heads
from turret.kernels.nf4_matmul import BLOCK, Nf4Matrix

MAX_ROWS = 64
# The variants of the kernels: number of rows, and maximum number of registers of a thread
# (``Tuning.registers``).
_FORMS = ((16, 168), (32, 208), (MAX_ROWS, 255))
# Maximum number of tiles of columns in a weight.
_MAX_COUNTERS = 1 << 14
_BLOCK = tl.constexpr(BLOCK)
_HALF = tl.constexpr(BLOCK // 2)


@triton.jit
def multiply_columns(
    x_ptr,  # [num_rows, in_features]
    packed_ptr,  # [out_features, in_features / 2] uint8
    codes_ptr,  # as in add_codes
    absmax_ptr,  # [out_features, in_features / 64] fp32
    to_ptr,  # [num_rows, out_features]
    n,  # [BLOCK_N], the columns
    inside,
    begin,  # first quantisation block of the inputs
    end,  # the block after the last one
    num_rows,
    x_stride,
    in_features,
    out_features,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store the products of all rows with some columns, over some blocks of the inputs."""
    first_block = n * (in_features // _BLOCK)
    m = tl.arange(0, ROWS)
    live = m < num_rows
    words = code_words(codes_ptr)
    acc = tl.zeros((BLOCK_N, ROWS), dtype=tl.float32)
    for g in range(begin, end):
        block = first_block + g
        absmax = tl.load(absmax_ptr + block, mask=inside, other=0.0)
        product = tl.zeros((BLOCK_N, ROWS), dtype=tl.float32)
        for first in tl.static_range(0, _BLOCK, CODES):
            product = add_codes(
                product, packed_ptr + block * _HALF + first // 2,
                x_ptr + m * x_stride + g * _BLOCK + first, inside, live, codes_ptr, words,
            )  # fmt: skip
        acc += product * absmax[:, None]
    y_at = to_ptr + m[:, None] * out_features + n[None, :]
    keep = live[:, None] & inside[None, :]
    tl.store(y_at, tl.trans(acc).to(to_ptr.dtype.element_ty), mask=keep)


@triton.jit
def sum_of_parts(
    parts_ptr, m, n, keep, num_rows, out_features, dtype: tl.constexpr, SPLITS: tl.constexpr
):
    """The sum of the stored parts for the given rows and columns, rounded to ``dtype``, as fp32."""
    at = parts_ptr + m[:, None] * out_features + n[None, :]
    total = tl.load(at, mask=keep, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        part_at = at + split * num_rows * out_features
        total += tl.load(part_at, mask=keep, other=0.0, cache_modifier=".cg")
    return total.to(dtype).to(tl.float32)


@triton.jit
def store_sums(
    y_ptr, parts_ptr, column, inside, num_rows, width, out_features, SPLITS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Write a tile of columns of the result: the sum of all programs' parts, activated if GATED."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    for first in tl.range(0, num_rows, 16, num_stages=1):
        m = first + tl.arange(0, 16)
        keep = (m < num_rows)[:, None] & inside[None, :]
        y = sum_of_parts(
            parts_ptr, m, column, keep, num_rows, out_features, dtype, SPLITS
        )  # fmt: skip
        if GATED:
            up = sum_of_parts(
                parts_ptr, m, width + column, keep, num_rows, out_features, dtype, SPLITS
            )
            y = silu_product(y, up)
        tl.store(y_ptr + m[:, None] * width + column[None, :], y.to(dtype), mask=keep)


# Without this option, Triton would compile further variants for some numbers of rows and blocks.
@triton.jit(do_not_specialize=["num_rows", "part_blocks"])
def nf4_matmul_kernel(
    x_ptr,  # [num_rows, in_features]
    packed_ptr,  # [out_features, in_features / 2] uint8
    codes_ptr,  # as in add_codes
    absmax_ptr,  # [out_features, in_features / 64] fp32
    y_ptr,  # [num_rows, out_features], GATED: half as wide
    parts_ptr,  # [SPLITS, num_rows, out_features] fp32, or None
    counters_ptr,  # [tiles of columns] int32
    num_rows,
    x_stride,
    in_features,
    out_features,
    part_blocks,  # quantisation blocks of a program
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The weight's columns for the ups follow those for the gates; both belong to the same columns
    # of the result.
    tile, width, shift = tl.program_id(0), out_features, 0
    if GATED:
        width = out_features // 2
        tiles = tl.cdiv(width, BLOCK_N)
        shift, tile = tile // tiles * width, tile % tiles
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = column < width
    n = shift + column
    begin = tl.program_id(1) * part_blocks
    part = tl.program_id(1).to(tl.int64) * num_rows * out_features
    multiply_columns(
        x_ptr, packed_ptr, codes_ptr, absmax_ptr, y_ptr if parts_ptr is None else parts_ptr + part,
        n, inside_n, begin, tl.minimum(begin + part_blocks, in_features // _BLOCK), num_rows,
        x_stride, in_features, out_features, ROWS, BLOCK_N,
    )  # fmt: skip
    # The outer condition is a compile-time constant, so it must stay separate from the inner one.
    if parts_ptr is not None:  # noqa: SIM102
        if is_last(counters_ptr + tile, 2 * SPLITS if GATED else SPLITS):
            store_sums(
                y_ptr, parts_ptr, column, inside_n, num_rows, width, out_features, SPLITS, GATED,
            )  # fmt: skip


@functools.cache
def counters_on(device: torch.device) -> torch.Tensor:
    """Counters that are zero between launches; launches on one stream may share them."""
    return torch.zeros(_MAX_COUNTERS, dtype=torch.int32, device=device)


def nf4_matmul(x: torch.Tensor, weight: Nf4Matrix, *, gated: bool = False) -> torch.Tensor:
    """Multiply by a quantised weight without writing the dequantised weight to memory.

    Launches share counters, so they must use one stream.

    Args:
        x: ``[num_rows, in_features]``, 1 to 64 rows, fp16, bf16 or fp32; rows may be strided.
        weight: The weight; its tensors contiguous, on the device of ``x``.
        gated: Multiply the silu of the first half of the outputs by the second half; the bits are
            those of ``silu_mul`` on the product.

    Returns:
        ``[num_rows, out_features]`` (``gated``: half as many), dtype of ``x``, one rounding from
        fp32 (and one after the activation). A weight is the value of its code in ``CODE``, rounded
        to the dtype of ``x``, times the absmax of its block, which is not rounded.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract, or there are more than 64 rows.
            For more rows, call ``nf4_dequantize`` and use a library's product.
    """
    if gated and weight.out_features % 2:
        raise ValueError(f"out_features is {weight.out_features}; an even number is needed")
    num_rows, in_features = x.shape
    tuned = tuning(x.device)
    out_features = weight.out_features
    width = out_features // 2 if gated else out_features
    check_product(x, weight)
    splits, part_blocks = parts_of(out_features, in_features // BLOCK, tuned)
    y = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    parts = None
    if splits > 1 or gated:
        shape = (splits, num_rows, out_features)
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(width, tuned.nf4_block_n)
    nf4_matmul_kernel[(2 * tiles if gated else tiles, splits)](
        x,
        weight.packed,
        codes_on(x.device, x.dtype),
        weight.absmax,
        y,
        parts,
        counters_on(x.device),
        num_rows,
        x.stride(0),
        in_features,
        out_features,
        part_blocks,
        SPLITS=splits,
        GATED=gated,
        **options_of(num_rows, tuned),
    )
    return y


def options_of(num_rows: int, tuned: Tuning) -> dict[str, Any]:
    """Compile and launch options of kernels that multiply this many rows."""
    rows, registers = next(form for form in _FORMS if num_rows <= form[0])
    return {
        "ROWS": rows,
        "BLOCK_N": tuned.nf4_block_n,
        # With four warps, Triton would use wgmma on Hopper and reorder the inputs for it.
        "num_warps": 2,
        "num_stages": tuned.nf4_stages,
        "enable_fp_fusion": True,
        **tuned.registers(registers),
    }


def parts_of(out_features: int, blocks: int, tuned: Tuning) -> tuple[int, int]:
    """The number of parts of the input features, and the number of quantisation blocks in a part.

    Both depend only on the weight's shape, because the order of a row's sum must not depend on the
    other rows.
    """
    columns = triton.cdiv(out_features, tuned.nf4_block_n)
    parts = 1
    while parts * columns < tuned.nf4_programs and blocks >= 2 * parts * tuned.nf4_part_blocks:
        parts *= 2
    return parts, -(-blocks // parts)


def check_product(x: torch.Tensor, weight: Nf4Matrix) -> None:
    """Raise ValueError unless ``x``, ``[num_rows, in_features]``, fits the weight."""
    check_float("x", x)
    check_shape("x", x, -1, weight.in_features)
    check_rows("x", x)
    num_rows, in_features = x.shape
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"{num_rows} rows; 1 to {MAX_ROWS} are supported")
    if in_features % BLOCK:
        raise ValueError(f"in_features is {in_features}; a multiple of {BLOCK} is needed")
    if weight.out_features > _MAX_COUNTERS * 16:
        raise ValueError(
            f"out_features is {weight.out_features}; the limit is {_MAX_COUNTERS * 16}"
        )
    size = weight.out_features * weight.in_features
    check_contiguous("packed", weight.packed)
    check_length("packed", weight.packed, size // 2)
    # The kernel uses 32-bit indices, because 64-bit indices need more registers.
    if size // 2 >= 1 << 31:
        raise ValueError(f"packed has {size // 2} bytes, but must have fewer than 2³¹")
    check_contiguous("absmax", weight.absmax)
    check_length("absmax", weight.absmax, size // BLOCK)


# The product of queries, keys and values, and ``rope_kv_write`` of it, in one launch.
#
# Every program stores its part of the product. The last program to finish for two neighbouring
# tiles of columns adds up the parts, rotates the heads of both tiles and stores them, so the
# product itself is never written. Two tiles contain whole heads. The bits are those of the two
# kernels in sequence.


@triton.jit
def _biased_sum(
    parts_ptr, bias_ptr, m, n, keep, inside, num_rows, out_features, dtype: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """The product in some columns: rounded, then the bias is added, then rounded again."""
    y = sum_of_parts(parts_ptr, m, n, keep, num_rows, out_features, dtype, SPLITS)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
        y = (y + bias[None, :]).to(dtype).to(tl.float32)
    return y


@triton.jit
def _store_heads(
    first_head, x_ptr, parts_ptr, bias_ptr, cos_ptr, sin_ptr, kv_slots_ptr, q_ptr,
    k_cache_ptr, v_cache_ptr, num_rows, out_features, num_heads, kv_heads, pairs,
    SPLITS: tl.constexpr, HALF: tl.constexpr, PARTIAL: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rotate and store the heads of two tiles of columns, from the parts of all programs."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pair = tl.arange(0, BLOCK_N)
    head = first_head + pair // HALF
    h = pair % HALF
    i, j = pair_of(h, HALF, pairs, PARTIAL, INTERLEAVED)
    num_all = num_heads + 2 * kv_heads
    inside = head < num_all
    at_i, at_j = head * 2 * HALF + i, head * 2 * HALF + j
    # As many rows as fit in registers.
    step: tl.constexpr = 2 if INTERLEAVED else 8
    for first_row in tl.range(0, num_rows, step, num_stages=1):
        m = first_row + tl.arange(0, step)
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
    codes_ptr,
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
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    HALF: tl.constexpr,
    PARTIAL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * part_blocks
    last = tl.minimum(begin + part_blocks, in_features // _BLOCK)
    multiply_columns(
        x_ptr, packed_ptr, codes_ptr, absmax_ptr,
        parts_ptr + tl.program_id(1).to(tl.int64) * num_rows * out_features, n, n < out_features,
        begin, last, num_rows, x_stride, in_features, out_features, ROWS, BLOCK_N,
    )  # fmt: skip
    pair = tile // 2
    programs = tl.minimum(2, tl.num_programs(0) - 2 * pair) * SPLITS
    if is_last(counters_ptr + pair, programs):
        _store_heads(
            pair * (BLOCK_N // HALF), x_ptr, parts_ptr, bias_ptr, cos_ptr, sin_ptr,
            kv_slots_ptr, q_ptr, k_cache_ptr, v_cache_ptr, num_rows, out_features, num_heads,
            kv_heads, pairs, SPLITS, HALF, PARTIAL, INTERLEAVED, BLOCK_N,
        )  # fmt: skip


def nf4_rotate(
    x: torch.Tensor, weight: Nf4Matrix, bias: torch.Tensor | None, write: KvWrite
) -> torch.Tensor:
    """Multiply by the weight of queries, keys and values, rotate heads, store keys and values.

    Launches share counters with those of ``nf4_matmul``, so all of them must use one stream.

    Args:
        x: ``[num_rows, in_features]``, 1 to 64 rows, fp16, bf16 or fp32; rows may be strided.
        weight: As for ``nf4_matmul``; heads of queries first, then of keys, then of values.
        bias: ``[out_features]`` contiguous, or None.
        write: The rotation and the slots of the same rows; two tiles of columns must contain whole
            heads (``KvWrite.divides``).

    Returns:
        Rotated queries, ``[num_rows, num_heads, head_dim]``, dtype of the cache: the bits of
        ``nf4_matmul``, the bias and ``rope_kv_write`` in sequence.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    tuned = tuning(x.device)
    check_product(x, weight)
    (num_rows, in_features), out_features = x.shape, weight.out_features
    write.check(num_rows, out_features)
    if not write.divides(2 * tuned.nf4_block_n):
        raise ValueError(f"heads of {write.head_dim} do not divide {2 * tuned.nf4_block_n} columns")
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
        codes_on(x.device, x.dtype),
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


# Triton form of ``Nf4Matrix.dequantize``: reads the packed weight once and writes the result once.
#
# This is for more rows than ``nf4_matmul`` supports: the weight is dequantised once, and a library
# computes the product.

_BLOCKS = 16


@triton.jit
def nf4_dequantize_kernel(
    packed_ptr,  # [num_blocks, 32] uint8
    code_ptr,  # [16] fp32
    absmax_ptr,  # [num_blocks] fp32
    out_ptr,  # [num_blocks, 32, 2]
    num_blocks,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    at = block[:, None] * _HALF + tl.arange(0, _HALF)[None, :]
    byte = tl.load(packed_ptr + at, mask=inside[:, None], other=0).to(tl.int32)
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0.0)[:, None]
    even = tl.load(code_ptr + (byte >> 4)) * absmax
    odd = tl.load(code_ptr + (byte & 15)) * absmax
    # [BLOCKS, 32, 2]: neighbours in memory
    pairs = tl.join(even, odd).to(out_ptr.dtype.element_ty)
    out_at = out_ptr + at[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    tl.store(out_at, pairs, mask=inside[:, None, None])


def nf4_dequantize(weight: Nf4Matrix, dtype: torch.dtype) -> torch.Tensor:
    """Dequantise a weight.

    Args:
        weight: The weight, its tensors contiguous.
        dtype: fp16, bf16 or fp32.

    Returns:
        ``[out_features, in_features]``, each value rounded once from fp32. ``nf4_matmul`` rounds
        the codes instead, so its weights are the same only within rounding.

    Raises:
        ValueError: A stride breaks the contract.
    """
    absmax = weight.absmax
    check_contiguous("packed", weight.packed)
    check_contiguous("absmax", absmax)
    shape = (weight.out_features, weight.in_features)
    out = torch.empty(shape, dtype=dtype, device=weight.packed.device)
    nf4_dequantize_kernel[(triton.cdiv(absmax.numel(), _BLOCKS),)](
        weight.packed,
        codes_on(weight.packed.device, torch.float32),
        absmax,
        out,
        absmax.numel(),
        BLOCKS=_BLOCKS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


# If no adapter changes a fused projection, the launch of the base's product also applies the
# operation that follows, its epilogue. Otherwise the epilogue has its own kernel. The bits are the
# same both ways.


class Epilogue(Protocol):
    """The operation that follows a projection."""

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        """Apply the operation to the finished result, ``[rows, out]``, in a separate kernel."""
        ...

    def ends_product(self, bias: torch.Tensor | None, device: torch.device) -> bool:
        """Whether ``of_product`` supports this bias on this device."""
        ...

    def of_product(
        self, x: torch.Tensor, first_row: int, weight: Nf4Matrix, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the base's product with some rows, and apply the operation to it.

        Args:
            x: The rows, at most 64, ``[rows, in]``.
            first_row: The position of the first row in the step.
            weight: The base's weight.
            bias: The base's bias, ``[out]``, or None.
        """
        ...


class GatedSilu:
    """The epilogue that multiplies silu(gates) by ups: ``[rows, out]`` → ``[rows, out / 2]``."""

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        return silu_mul(y)

    def ends_product(self, bias: torch.Tensor | None, device: torch.device) -> bool:
        return bias is None

    def of_product(
        self, x: torch.Tensor, first_row: int, weight: Nf4Matrix, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return nf4_matmul(x, weight, gated=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The epilogue that returns rotated queries and stores keys and values.

    Attributes:
        write: The rotation of the heads, and the slots of keys and values.
        q_norm: RMSNorm weight of the query heads, ``[head_dim]``, or None.
        k_norm: The same for the key heads.
        eps: The epsilon of the norms.
    """

    write: KvWrite
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 1e-6

    @property
    def _has_norms(self) -> bool:
        # ``nf4_rotate`` would sum a norm in a different order from ``rope_kv_write``.
        return self.q_norm is not None or self.k_norm is not None

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        norms = {"q_norm": self.q_norm, "k_norm": self.k_norm}
        return rope_kv_write(y, self.write, eps=self.eps, **norms)

    def ends_product(self, bias: torch.Tensor | None, device: torch.device) -> bool:
        return not self._has_norms and self.write.divides(2 * tuning(device).nf4_block_n)

    def of_product(
        self, x: torch.Tensor, first_row: int, weight: Nf4Matrix, bias: torch.Tensor | None
    ) -> torch.Tensor:
        write = self.write.rows(first_row, first_row + x.shape[-2])
        return nf4_rotate(x, weight, bias, write)
