"""MXFP4 weights (OCP Microscaling Formats 1.0): FP4 codes that share a power of two by 32."""

from __future__ import annotations

import torch

# Bytes of codes that share one scale.
BYTES = 16
# Values of E2M1's three lower bits; the fourth bit is the sign.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The bit pattern of 2^-127 in fp32.
_LEAST = 1 << 22


def dequantize_mxfp4(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """The numbers that a weight's codes stand for; bf16 holds all of them.

    Args:
        codes: ``[out, in / 32, 16]`` uint8, two a byte, the first in the lower half.
        exponents: ``[out, in / 32]`` uint8: each 32's power of two, and 127 more.

    Returns:
        ``[out, in]`` bf16.
    """
    signed = [*_MAGNITUDES, *(-value for value in _MAGNITUDES)]
    values = torch.tensor(signed, device=codes.device)
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()
    # Exponents are those of fp32, except that the smallest one gives a subnormal number.
    bits = torch.where(exponents == 0, _LEAST, exponents.int() << 23)
    scales = bits.int().view(torch.float32)
    return (values[pairs] * scales.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)
