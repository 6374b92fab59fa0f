"""``y = x Wᵀ`` for an NF4 weight (QLoRA, arXiv 2305.14314, section 3) in bitsandbytes' packing.

A byte holds two codes, the first in the high nibble. 64 weights of a row share one absmax. If a
file contains quantised absmax values (double quantisation), these are dequantised at load::

    W_dq[b·64 + i] = code[nibble] · absmax[b], rounded to the dtype of x

MXFP4 weights (OCP Microscaling Formats 1.0) have the same packing, but the codes stand for other
values, and every 32 weights share a power of two in place of absmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 64
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# The values of MXFP4's elements (E2M1) without their signs.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Format:
    """A 4-bit format.

    Attributes:
        code: The values of the 16 codes.
        block: The number of weights that share a scale.
    """

    code: tuple[float, ...]
    block: int


NF4 = Format(CODE, BLOCK)
MXFP4 = Format((*_MAGNITUDES, *(-value for value in _MAGNITUDES)), 32)


@dataclass(frozen=True, slots=True)
class Nf4Matrix:
    """A quantised ``[out_features, in_features]`` weight.

    Attributes:
        packed: ``[out · in / 2]`` uint8.
        absmax: ``[out · in / block]``: fp32, or bf16 for MXFP4, which is exact.
        out_features: The number of rows.
        in_features: The number of columns, a multiple of 64.
        format: NF4 or MXFP4. On GPUs, only the kernel for experts reads MXFP4.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    out_features: int
    in_features: int
    format: Format = NF4

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """``[out, in]`` in ``dtype``."""
        code = torch.tensor(self.format.code, device=self.packed.device)
        nibbles = torch.stack((self.packed >> 4, self.packed & 15), dim=-1).long()
        blocks = code[nibbles].view(-1, self.format.block) * self.absmax[:, None].float()
        return blocks.view(self.out_features, self.in_features).to(dtype)

    def part(self, rows: slice) -> Nf4Matrix:
        """Some rows, as a view of the same memory."""
        codes, blocks = self.in_features // 2, self.in_features // self.format.block
        return Nf4Matrix(
            self.packed[rows.start * codes : rows.stop * codes],
            self.absmax[rows.start * blocks : rows.stop * blocks],
            rows.stop - rows.start,
            self.in_features,
            self.format,
        )
