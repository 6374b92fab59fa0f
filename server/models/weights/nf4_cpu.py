"""The compiled NF4 products, of weights in the layout that bitsandbytes packs for a CPU.

They need a processor with AMX or AVX512-BF16 (``has_native_products``).
"""

from __future__ import annotations

import torch

from turret.kernels.cpu.native import functions, num_threads
from turret.kernels.cpu.row_adapters import Ahead

TILE_ROWS = 32  # outputs whose codes lie together


def pack(codes: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A weight in bitsandbytes' packed CPU layout.

    In each tile, two features of all rows take 32 bytes: a row of the first half has the low four
    bits of a byte, and the row 16 further on has the high ones.

    Args:
        codes: The codes as quantised, row by row, with the earlier feature in the high bits;
            ``out·in/2`` bytes.
        shape: ``(out, in)``; ``out`` a multiple of ``TILE_ROWS``, ``in`` even.

    Returns:
        ``[out, in / 2]`` uint8.
    """
    rows, pairs = shape[0], shape[1] // 2
    low, high = codes.view(torch.uint8).view(-1, 2, TILE_ROWS // 2, pairs).unbind(1)
    even, odd = (high & 0xF0) | (low >> 4), (high << 4) | (low & 0x0F)
    both = torch.stack([even, odd], dim=-1).view(torch.int16).view(-1, TILE_ROWS // 2, pairs)
    return both.transpose(1, 2).contiguous().view(torch.uint8).view(rows, pairs)


def nf4_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, int],
    ahead: Ahead | None = None,
) -> torch.Tensor:
    """Multiply rows by a weight in bitsandbytes' packed CPU layout.

    Args:
        x: ``[rows, in]`` bf16.
        packed: ``[out, in / 2]`` uint8.
        absmax: ``[in / 64, out]`` bf16.
        shape: ``(out, in)``.
        ahead: The memory to prefetch meanwhile.

    Returns:
        ``[rows, out]`` bf16.
    """
    if x.stride(1) != 1:
        # The product walks rows with stride 1.
        x = x.contiguous()
    rows, (out_features, in_features) = x.shape[0], shape
    out = torch.empty(rows, out_features, dtype=torch.bfloat16)
    step, module = ahead or (None, 0)
    functions().turret_nf4_product(
        x.data_ptr(),
        x.stride(0),
        rows,
        packed.data_ptr(),
        absmax.data_ptr(),
        out.data_ptr(),
        out_features,
        in_features,
        num_threads(),
        step,
        module,
    )
    return out


def nf4_expert_products(
    x: torch.Tensor,
    ends: torch.Tensor,
    weights: torch.Tensor,
    shape: tuple[int, int],
) -> torch.Tensor:
    """Multiply runs of rows, each by a weight of its own.

    Args:
        x: ``[rows, in]`` bf16.
        ends: Where the rows of each weight end, ``[weights]`` int64.
        weights: Addresses of each one's codes and maxima, as ``nf4_product`` takes them,
            ``[weights, 2]`` int64.
        shape: ``(out, in)``, the same for all.

    Returns:
        ``[rows, out]`` bf16; a row has the bits of ``nf4_product``.
    """
    out_features, in_features = shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape[0], out_features, dtype=torch.bfloat16)
    functions().turret_nf4_experts(
        x.data_ptr(),
        x.stride(0),
        ends.data_ptr(),
        ends.shape[0],
        weights.data_ptr(),
        out.data_ptr(),
        out_features,
        in_features,
        num_threads(),
    )
    return out
