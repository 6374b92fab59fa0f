"""Triton form of ``Nf4Matrix.dequantize``: reads the packed weight once, writes it once.

For more rows than ``nf4_matmul`` takes: dequantised once, the weight goes to a library's product.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.shared.contract import check_contiguous
from turret.kernels.gpu.shared.nf4_codes import code_on
from turret.kernels.nf4_matmul import BLOCK, Nf4Matrix

_HALF = tl.constexpr(BLOCK // 2)
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
    """Write out a quantised weight.

    Args:
        weight: The weight, its tensors contiguous.
        dtype: fp16, bf16 or fp32.

    Returns:
        ``[out_features, in_features]``, each value rounded once from fp32: what ``nf4_matmul``
        multiplies by.

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
        code_on(weight.packed.device),
        absmax,
        out,
        absmax.numel(),
        BLOCKS=_BLOCKS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
