"""The base's product and ``segmented_shrink`` in one launch: both read the projection's input.

The first programs take the shrink's work list, the others are those of ``nf4_matmul``. A shrink's
bytes, a few hundredths of the weight's, are read while the weight's are, and a launch is saved.
Both compute what their own kernels do, bit for bit: a shrink's products are the same instructions
in the same order with four warps as with two, of which two repeat what the others do.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.adapters.segmented_shrink import (
    Shrink,
    check_shrink,
    empty_parts,
    shrink_items,
)
from turret.kernels.gpu.nf4_matmul import (
    check_product,
    counters_on,
    multiply_columns,
    options_of,
    parts_of,
    store_sums,
)
from turret.kernels.gpu.shared.last_program import is_last
from turret.kernels.gpu.shared.nf4_codes import code_on
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.tables.segment_table import RANK_TILE, TILE_ROWS
from turret.kernels.nf4_matmul import BLOCK, Nf4Matrix

_BLOCK = tl.constexpr(BLOCK)


@triton.jit(do_not_specialize=["num_rows", "part_blocks"])
def nf4_shrink_kernel(
    x_ptr,  # [at least num_rows, in_features]
    packed_ptr,  # as in nf4_matmul
    code_ptr,
    absmax_ptr,
    y_ptr,  # [num_rows, out_features]
    parts_ptr,  # [SPLITS, num_rows, out_features] fp32, or None
    counters_ptr,
    a_ptr,  # as in segmented_shrink
    slice_ranks_ptr,
    v_ptr,
    table_ptr,
    num_rows,  # that the base multiplies
    x_stride,
    in_features,
    out_features,
    part_blocks,
    v_stride,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
    SHRINK_PROGRAMS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    SHRINK_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    if program < SHRINK_PROGRAMS:
        shrink_items(
            program, SHRINK_PROGRAMS, x_ptr, a_ptr, slice_ranks_ptr, v_ptr, table_ptr, x_stride,
            in_features, v_stride, NUM_SLICES, SHRINK_SPLITS, BLOCK_M, BLOCK_R, BLOCK_K,
            3,
        )  # fmt: skip
    else:
        columns = tl.cdiv(out_features, BLOCK_N)
        tile = (program - SHRINK_PROGRAMS) % columns
        split = (program - SHRINK_PROGRAMS) // columns
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < out_features
        begin = split * part_blocks
        to = y_ptr
        if parts_ptr is not None:
            to = parts_ptr + split.to(tl.int64) * num_rows * out_features
        multiply_columns(
            x_ptr, packed_ptr, code_ptr, absmax_ptr, to, n, inside, begin,
            tl.minimum(begin + part_blocks, in_features // _BLOCK), num_rows, x_stride, in_features,
            out_features, TILES, BLOCK_N, PTX,
        )  # fmt: skip
        if parts_ptr is not None:  # noqa: SIM102
            if is_last(counters_ptr + tile, SPLITS):
                store_sums(
                    y_ptr, parts_ptr, n, inside, num_rows, out_features, out_features,
                    16 if TILES == 1 else 32, SPLITS, False,
                )  # fmt: skip


def nf4_shrink(
    x: torch.Tensor,
    num_rows: int,
    weight: Nf4Matrix,
    shrink: Shrink,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply the first rows by the base's weight, shrink all adapted ones.

    Launches share counters with those of ``nf4_matmul``: all follow each other on one stream.

    Args:
        x: ``[rows, in_features]``, fp16, bf16 or fp32; rows may be strided.
        num_rows: Rows that the base multiplies, 1 to 64 and no more than there are.
        weight: As for ``nf4_matmul``.
        shrink: What of, and into what.

    Returns:
        What ``nf4_matmul`` makes of the first rows and ``segmented_shrink`` of all, bit for bit.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_product(x[:num_rows], weight)
    a, slice_ranks, table = shrink.a, shrink.slice_ranks, shrink.table
    check_shrink(x, a, slice_ranks)
    tuned, in_features, out_features = tuning(x.device), x.shape[1], weight.out_features
    columns = triton.cdiv(out_features, tuned.nf4_block_n)
    splits, part_blocks = parts_of(out_features, in_features // BLOCK, tuned)
    y = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    shape = (splits, num_rows, out_features)
    parts = torch.empty(shape, dtype=torch.float32, device=x.device) if splits > 1 else None
    v = empty_parts(table, a.shape[1], in_features, x.device)
    nf4_shrink_kernel[(tuned.shrink_programs + columns * splits,)](
        x,
        weight.packed,
        code_on(x.device),
        weight.absmax,
        y,
        parts,
        counters_on(x.device),
        a,
        slice_ranks,
        v,
        table.buffer,
        num_rows,
        x.stride(0),
        in_features,
        out_features,
        part_blocks,
        v.shape[1],
        SPLITS=splits,
        SHRINK_PROGRAMS=tuned.shrink_programs,
        NUM_SLICES=a.shape[1],
        SHRINK_SPLITS=v.shape[0],
        BLOCK_M=TILE_ROWS,
        BLOCK_R=RANK_TILE,
        BLOCK_K=tuned.shrink_block_k,
        **options_of(num_rows, tuned),
    )
    return y, v
