"""Queries of the rows of gated adapters: ``q = Wq x``, and ``P x`` for routers, in one launch.

A shrink of its own for all of them: a program takes a question of the segment table (a chunk of
rows, 16 vectors of their adapter), one slice and one part of the input features. Queries are
multiplied in the serving dtype on tensor cores. Prototypes are fp32, and multiplied as such: near a
tie a rounded similarity would choose another component.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.adapters.segmented_shrink import shrink_parts
from turret.kernels.gpu.gates import gate_words
from turret.kernels.gpu.shared.addresses import pointer_to
from turret.kernels.gpu.shared.contract import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
)
from turret.kernels.gpu.shared.dots import dot
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.tables.segment_table import (
    GATES,
    RANK_TILE,
    RECORD,
    TILE_ROWS,
    SegmentTable,
)

# Input features per step of an fp32 product, whose operands are held in registers.
_BLOCK_P = 32
_RECORD = tl.constexpr(RECORD)
_GATES = tl.constexpr(GATES)
_WORDS = tl.constexpr(gate_words.WORDS)
_ASKED, _KIND = tl.constexpr(gate_words.ASKED), tl.constexpr(gate_words.KIND)
_VECTORS = tl.constexpr(gate_words.VECTORS)
_PROTOTYPE = tl.constexpr(gate_words.PROTOTYPE)


@triton.jit
def _products(
    x_rows,  # [BLOCK_M, 1] pointers
    live,  # [BLOCK_M, 1]
    w_rows,  # [BLOCK_R, 1] pointers
    held,  # [BLOCK_R, 1]
    start,
    end,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``x wᵀ`` over the inputs ``[start, end)``, ``[BLOCK_M, BLOCK_R]`` fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(start, end, BLOCK_K):
        cols = k0 + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_rows + cols, mask=live & (cols < end), other=0.0)
        w = tl.load(w_rows + cols, mask=held & (cols < end), other=0.0)
        acc = dot(x.to(w.dtype), tl.trans(w), acc)
    return acc


@triton.jit
def gate_shrink_kernel(
    x_ptr,  # [num_rows, in_features]
    words_ptr,  # [num_slots, NUM_SLICES, WORDS] int64
    asked_ptr,  # [SPLITS, asked_capacity * NUM_SLICES] fp32
    table_ptr,
    x_stride,
    in_features,
    asked_width,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_work = tl.load(table_ptr + _GATES + 2) * NUM_SLICES * SPLITS
    rows_ptr = table_ptr + tl.load(table_ptr + 1)
    questions_ptr = table_ptr + tl.load(table_ptr + _GATES + 3)
    split_width = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLITS) * BLOCK_K
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        split = work % SPLITS
        s = (work // SPLITS) % NUM_SLICES
        question_ptr = questions_ptr + (work // (SPLITS * NUM_SLICES)) * _RECORD
        live = m < tl.load(question_ptr + 1)
        first = tl.load(question_ptr + 2)
        slot = tl.load(question_ptr + 4)
        rows = tl.load(rows_ptr + tl.load(question_ptr) + m, mask=live, other=0).to(tl.int64)
        own_ptr = words_ptr + (slot * NUM_SLICES + s) * _WORDS
        # A missing slice has no vectors, so it reads nothing.
        left = tl.load(own_ptr + _VECTORS).to(tl.int32) - first
        held = (r < left)[:, None]
        start = split * split_width
        end = tl.where(left > 0, tl.minimum(start + split_width, in_features), start)
        x_rows = x_ptr + rows[:, None] * x_stride
        at = (first + r).to(tl.int64)[:, None] * in_features
        address = tl.load(own_ptr + _ASKED)
        if tl.load(own_ptr + _KIND) == _PROTOTYPE:
            acc = _products(
                x_rows, live[:, None], pointer_to(address, asked_ptr) + at, held, start, end,
                BLOCK_M, BLOCK_R, BLOCK_P,
            )  # fmt: skip
        else:
            acc = _products(
                x_rows, live[:, None], pointer_to(address, x_ptr) + at, held, start, end,
                BLOCK_M, BLOCK_R, BLOCK_K,
            )  # fmt: skip
        row_stride = tl.load(question_ptr + 6)
        asked = (tl.load(question_ptr + 5) + m * row_stride)[:, None].to(tl.int64) + r[None, :]
        keep = live[:, None] & (r < tl.load(question_ptr + 3) - first)[None, :]
        asked_split = asked_ptr + split.to(tl.int64) * asked_width
        tl.store(asked_split + asked * NUM_SLICES + s, acc, mask=keep)


def gate_shrink(x: torch.Tensor, words: torch.Tensor, table: SegmentTable) -> torch.Tensor:
    """Multiply every gated row by the queries or prototypes of its adapters.

    Args:
        x: Activations, ``[num_rows, in_features]``, fp16, bf16 or fp32; rows may be strided.
        words: Of the gates by slot, ``[num_slots, num_slices, WORDS]`` int64, contiguous; see
            ``gate_words``.
        table: The step's segments, loaded.

    Returns:
        ``[splits, asked_capacity · num_slices]`` fp32, for ``fusion_gate``: a row's products with
        its adapter's vectors where ``segment_table`` says, the slice innermost; the sum over the
        first axis is what was asked. Places of no row are undefined.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract. Values on the device, addresses
            among them, are not checked: that would synchronise.
    """
    check_float("x", x)
    check_shape("x", x, -1, -1)
    check_rows("x", x)
    check_words(words)
    num_slices, in_features = words.shape[1], x.shape[1]
    tuned = tuning(x.device)
    splits, width = shrink_parts(in_features, x.device), table.asked_capacity * num_slices
    asked = torch.empty(splits, width, dtype=torch.float32, device=x.device)
    gate_shrink_kernel[(tuned.programs,)](
        x,
        words,
        asked,
        table.buffer,
        x.stride(0),
        in_features,
        width,
        NUM_SLICES=num_slices,
        SPLITS=splits,
        BLOCK_M=TILE_ROWS,
        BLOCK_R=RANK_TILE,
        BLOCK_K=tuned.shrink_block_k,
        BLOCK_P=_BLOCK_P,
        num_warps=2,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return asked


def check_words(values: torch.Tensor) -> None:
    """Raise ValueError unless these are the words of gates."""
    check_shape("words", values, -1, -1, gate_words.WORDS)
    check_contiguous("words", values)
    if values.dtype != torch.int64:
        raise ValueError(f"words is {values.dtype}; torch.int64 is needed")
