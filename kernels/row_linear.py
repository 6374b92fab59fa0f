"""``y = x Wᵀ`` whose rows do not depend on how many rows are computed together.

A library GEMM chooses its kernel and its blocking of the reduction by the whole shape, so row 0 of
a 1-row product and row 0 of a 16-row product may differ in the last bit. Batch invariance forbids
that: a request's tokens must not depend on its batch mates. Measured on x86 (oneDNN bf16, MKL
fp32): the bits of a row depend on the number of rows only through a few kernel choices, and are
the same for all multiples of 16 (bf16) or 8 (fp32). Padding rows to such a multiple is therefore
enough; ``row_multiple`` finds the smallest one that holds for a weight's shape on this machine.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

# Multiples that were measured to agree for every shape tried (in_features 64-14336, 1-512 rows).
_SAFE_MULTIPLE = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 8}
_PROBE_ROWS = 64
# MKL's sgemm rounds differently in a thread that is left with fewer columns than this.
_FP32_COLUMN_MULTIPLE = 16
# torch hands a half-precision product to oneDNN only if rows · inner · columns is larger than this.
_MAX_NATIVE_PRODUCT = 16 * 16 * 16
# Longer reductions are cut into blocks by the libraries (measured: 128-192 in fp32, 512 in bf16).
_MAX_REDUCTION = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}


def row_linear(x: torch.Tensor, weight: torch.Tensor, *, probe: bool = True) -> torch.Tensor:
    """Multiply rows by a dense weight, each row bit-identical in any batch.

    Args:
        x: ``[num_rows, in_features]``, dtype of ``weight``.
        weight: ``[out_features, in_features]``, contiguous.
        probe: Look for the smallest row multiple that holds for this shape (some milliseconds, once
            per shape). Pass False where the shape of ``weight`` changes from step to step: then
            a column's bits do not depend on the columns beside it either.

    Returns:
        ``[num_rows, out_features]``, dtype of ``x``. On devices other than the CPU this is a plain
        ``linear``.
    """
    num_rows = x.shape[0]
    if x.device.type != "cpu":
        return F.linear(x, weight)
    multiple = _SAFE_MULTIPLE[weight.dtype]
    if probe and num_rows <= _PROBE_ROWS:
        multiple = row_multiple(weight.dtype, weight.shape[0], weight.shape[1])
    columns = weight.shape[0]
    if not probe and weight.dtype == torch.float32 and columns % _FP32_COLUMN_MULTIPLE:
        weight = F.pad(weight, (0, 0, 0, -columns % _FP32_COLUMN_MULTIPLE))
    padding = -num_rows % multiple
    if padding == 0:
        return F.linear(x, weight)[:, :columns]
    return F.linear(F.pad(x, (0, 0, 0, padding)), weight)[:num_rows, :columns]


def row_addmm_(y: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> None:
    """``y += v b`` in place, each row bit-identical in any batch and at any place among zeros.

    The second half is what lets adapters share one product: a row of ``v`` that is zero outside
    ranks ``[lo, hi)`` adds the bits that ``v[:, lo:hi] b[lo:hi]`` would, ``lo`` a multiple of 8.

    Args:
        y: ``[num_rows, out_features]``; rows may be strided (a slice of a fused projection).
        v: ``[num_rows, rank]``, dtype of ``y``, rank at most ``max_reduction(dtype)``.
        b: ``[rank, out_features]``, dtype of ``y``.
    """
    num_rows, rank = v.shape
    assert rank <= max_reduction(v.dtype), rank
    if v.device.type != "cpu":
        y.addmm_(v, b)
    elif v.dtype == torch.float32:
        padding = -num_rows % _SAFE_MULTIPLE[v.dtype]
        y.add_((F.pad(v, (0, 0, 0, padding)) @ b)[:num_rows])
    else:
        # oneDNN's product with a sum post-op was row-invariant at every rank and width tried.
        padding = _MAX_NATIVE_PRODUCT // (rank * b.shape[1]) + 1 - num_rows
        if padding <= 0:
            y.addmm_(v, b)
        else:
            wide = F.pad(y, (0, 0, 0, padding)).addmm_(F.pad(v, (0, 0, 0, padding)), b)
            y.copy_(wide[:num_rows])


def max_reduction(dtype: torch.dtype) -> int:
    """The longest reduction that ``row_addmm_`` takes: no library cuts it into blocks.

    Where a cut falls depends on the length, so a sum across a cut rounds differently in products
    of different lengths.
    """
    return _MAX_REDUCTION[dtype]


@functools.cache
def row_multiple(dtype: torch.dtype, out_features: int, in_features: int) -> int:
    """Find the row multiple to pad to for one weight shape, by trying it on this machine.

    Returns:
        1 where any number of rows up to 64 gives the bits of the safe multiple, else that multiple.
    """
    safe = _SAFE_MULTIPLE[dtype]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, in_features, generator=generator).to(dtype)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    expected = F.linear(x, weight)
    for num_rows in range(1, _PROBE_ROWS):
        if not torch.equal(F.linear(x[:num_rows], weight), expected[:num_rows]):
            return safe
    return 1
