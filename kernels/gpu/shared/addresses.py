"""Tensors that kernels find by their addresses."""

# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer_to(address, like_ptr):
    """An address as a pointer; memory of its own begins at a multiple of 16."""
    return tl.multiple_of(address.to(tl.pointer_type(like_ptr.dtype.element_ty)), 16)
