"""Products whose order of summation turret determines; see ``products.c``.

Every bit of a result depends only on its own row, its own column and the length of the sum. Rows
are fp32; weights may be bf16 or fp16, which are exact in fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from turret.kernels.cpu import functions, has_native, num_threads
from turret.lazy_torch import torch


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "y")),
        *((name, ctypes.c_int64) for name in ("batches", "rows", "columns", "inner")),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_row", "w_batch", "w_row")),
        *((name, ctypes.c_int64) for name in ("y_batch", "y_row", "kind", "adds", "threads")),
        *((name, ctypes.c_int64) for name in ("narrows", "x_inner")),
    )


def _kind(tensor: torch.Tensor) -> int:
    """The number of a tensor's dtype in the C code."""
    return (torch.float32, torch.bfloat16, torch.float16).index(tensor.dtype)


def dot_products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x wᵀ`` for each matrix of a batch. Zeros appended to the inner dimension change no bit.

    Args:
        x: ``[batches, rows, inner]`` fp32.
        w: ``[batches, columns, inner]``, or ``[1, columns, inner]`` for all; fp32, bf16 or fp16.

    Returns:
        ``[batches, rows, columns]`` fp32.
    """
    x, w = _with_rows(x), _with_rows(w)
    y = torch.empty(x.shape[0], x.shape[1], w.shape[1])
    functions().turret_dots(ctypes.byref(_product(x, w, y, adds=False)))
    return y


def column_products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x w`` for each matrix of a batch. Zeros anywhere in the inner dimension change no bit.

    Args:
        x: ``[batches, rows, inner]`` fp32.
        w: ``[batches, inner, columns]``, or ``[1, inner, columns]`` for all; fp32, bf16 or fp16.

    Returns:
        ``[batches, rows, columns]`` fp32.
    """
    x, w = _with_rows(x), _with_rows(w)
    y = torch.empty(x.shape[0], x.shape[1], w.shape[2])
    functions().turret_columns(ctypes.byref(_product(x, w, y, adds=False)))
    return y


def add_column_products_(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """``y += x w`` in place; each sum begins with the element of ``y``.

    Args:
        y: ``[rows, columns]`` fp32, rows may be strided.
        x: ``[rows, inner]`` fp32.
        w: ``[inner, columns]``, fp32, bf16 or fp16.
    """
    assert y.stride(1) == 1, y.stride()
    x, w = _with_rows(x.unsqueeze(0)), _with_rows(w.unsqueeze(0))
    functions().turret_columns(ctypes.byref(_product(x, w, y.unsqueeze(0), adds=True)))


def _with_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Make each row contiguous in memory."""
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] <= 1 else tensor.contiguous()


def _product(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, *, adds: bool) -> _Product:
    assert x.dtype == y.dtype == torch.float32, (x.dtype, y.dtype)
    assert w.shape[0] in (1, x.shape[0]), (x.shape, w.shape)
    return _Product(
        x.data_ptr(),
        w.data_ptr(),
        y.data_ptr(),
        *(x.shape[0], x.shape[1], y.shape[2], x.shape[2]),
        *(x.stride(0), x.stride(1)),
        *(w.stride(0) if w.shape[0] == x.shape[0] else 0, w.stride(1)),
        *(y.stride(0), y.stride(1)),
        *(_kind(w), int(adds), num_threads(), 0, 1),
    )


# ``y = x Wᵀ`` for a wide bf16 weight and the few rows of a step.

TILE_ROWS = 16  # rows of a tile


def serves_dense(weight: torch.Tensor) -> bool:
    """Whether ``dense_product`` supports a weight."""
    return has_native(weight.dtype, weight.device)


def dense_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply rows by a weight without repacking it; only if ``serves_dense``.

    Args:
        x: ``[rows, in]`` bf16.
        weight: ``[out, in]`` bf16, contiguous.

    Returns:
        ``[rows, out]`` bf16, summed in fp32; a row's bits are the same in any batch.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
    scratch = torch.empty(-(-x.shape[0] // TILE_ROWS) * TILE_ROWS, x.shape[1])
    functions().turret_dense_product(
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        weight.data_ptr(),
        y.data_ptr(),
        y.shape[1],
        *weight.shape,
        num_threads(),
        scratch.data_ptr(),
    )
    return y


# ``dX = dY W``, the gradient of the rows; see ``transposed.h``.

_PANEL = 32  # inputs; PANEL in transposed.h
_MULTIPLE = 32  # outputs; gradients are padded to a multiple of it; MULTIPLE in transposed.h


def serves_transposed(weight: torch.Tensor) -> bool:
    """Whether ``transposed_product`` supports a weight."""
    return has_native(weight.dtype, weight.device) and weight.shape[1] % _PANEL == 0


def transposed_product(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply gradients by a weight; only if ``serves_transposed``.

    Args:
        grad: ``[rows, out]`` bf16, or fp32, which is rounded to bf16.
        weight: ``[out, in]`` bf16, contiguous.

    Returns:
        ``[rows, in]`` fp32; a row's bits are the same in any batch.
    """
    grad, rows = grad.contiguous(), len(grad)
    out, rounded = torch.empty(rows, weight.shape[1]), rounded_gradients(*grad.shape)
    functions().turret_transposed_product(
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        rows,
        weight.data_ptr(),
        out.data_ptr(),
        *weight.shape,
        num_threads(),
        rounded.data_ptr(),
    )
    return out


def rounded_gradients(rows: int, columns: int) -> torch.Tensor:
    """Memory for gradients in bf16, with columns padded to a multiple of ``_MULTIPLE``."""
    return torch.empty(rows, -(-columns // _MULTIPLE) * _MULTIPLE, dtype=torch.bfloat16)


# Gradients of low-rank updates.


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """``y = bᵀ (a x)`` for some rows of a projection.

    Attributes:
        rows: The rows.
        a: ``[rank, in]`` fp32, contiguous.
        b: ``[rank, out]`` fp32, contiguous.
        grad: The gradient of ``y``, ``[rows, out]`` fp32; rows may be strided.
    """

    rows: slice
    a: torch.Tensor
    b: torch.Tensor
    grad: torch.Tensor


def low_rank_gradients(
    updates: Sequence[LowRankUpdate], x: torch.Tensor, of_x: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The gradients of updates; the bits of each depend only on its own rows.

    Args:
        updates: The updates; those of the same rows follow each other.
        x: The input, ``[rows, in]`` fp32, bf16 or fp16; rows may be strided.
        of_x: The gradient of the input, ``[rows, in]`` fp32, to which those of the updates are
            added in order; contiguous.

    Returns:
        For each update, the gradients of ``a`` and ``b``.
    """
    width, x_row = x.shape[1], x.stride(0)
    x_address, of_x_address, kind = x.data_ptr(), of_x.data_ptr(), _kind(x)
    ranks = [len(each.a) for each in updates]
    counts = [each.rows.stop - each.rows.start for each in updates]
    scratch = torch.empty(2 * sum(r * n for r, n in zip(ranks, counts, strict=True)))
    address, turn, last = scratch.data_ptr(), 0, None
    found, values = [], []
    for each, rank, count in zip(updates, ranks, counts, strict=True):
        turn = turn + 1 if each.rows == last else 0
        last, first, out = each.rows, each.rows.start, each.b.shape[1]
        of_a, of_b = torch.empty(rank, width), torch.empty(rank, out)
        found.append((of_a, of_b))
        values += (
            *(x_address + first * x_row * x.itemsize, each.a.data_ptr(), each.b.data_ptr()),
            *(each.grad.data_ptr(), of_a.data_ptr(), of_b.data_ptr()),
            *(of_x_address + first * width * 4, address, address + rank * count * 4),
            *(count, rank, width, out, x_row, each.grad.stride(0), kind, turn),
        )
        address += 2 * rank * count * 4
    table = (ctypes.c_int64 * len(values))(*values)
    functions().turret_low_rank_gradients(table, len(updates), num_threads())
    return found
