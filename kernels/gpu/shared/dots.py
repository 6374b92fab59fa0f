"""Products inside kernels that keep fp32 accuracy of an fp32 operand on tensor cores."""

# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(x, w, acc):
    """``acc + x w`` for operands of one dtype; fp32 operands multiply as fp32, not as TF32."""
    return tl.dot(x, w, acc, input_precision="ieee")


@triton.jit
def split_dot(x, w, acc):
    """``acc + x w`` for an fp32 ``x`` and a narrower ``w``.

    ``x`` is split into a high and a low part of ``w``'s dtype: together 16 (bf16) or 22 (fp16) bits
    of mantissa, at twice the tensor-core work, of which kernels bound by memory have plenty.
    """
    if w.dtype == tl.float32:
        acc = tl.dot(x, w, acc, input_precision="ieee")
    else:
        high = x.to(w.dtype)
        low = (x - high.to(tl.float32)).to(w.dtype)
        acc = tl.dot(high, w, acc)
        acc = tl.dot(low, w, acc)
    return acc


@triton.jit
def dot_split(w, x, acc):
    """``acc + w x``, as ``split_dot`` with the fp32 operand on the right."""
    if w.dtype == tl.float32:
        acc = tl.dot(w, x, acc, input_precision="ieee")
    else:
        high = x.to(w.dtype)
        low = (x - high.to(tl.float32)).to(w.dtype)
        acc = tl.dot(w, high, acc)
        acc = tl.dot(w, low, acc)
    return acc
