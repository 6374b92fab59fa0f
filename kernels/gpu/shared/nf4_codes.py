"""The sixteen NF4 values in a kernel: packed bytes to pairs of neighbouring weights.

On NVIDIA devices the values are looked up in registers: ``prmt`` picks bytes of two words by the
low three bits of a code, the fourth bit chooses between two such picks. Two words hold the low
bytes of the values, two the high bytes, so a weight costs two and a half instructions and no
memory; a gathered load would take a trip through shared memory for each. Elsewhere it is gathered,
from the same rounded values: the bits are the same.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from turret.kernels.nf4_matmul import CODE


def _lookup(dtype: torch.dtype) -> str:
    """PTX that turns four bytes (``$4``) into four even (``$0, $1``) and four odd values."""
    bits = torch.tensor(CODE).to(dtype).view(torch.int16).tolist()
    words = {}
    for name, shift in (("low", 0), ("high", 8)):
        for part in range(4):
            values = [(b >> shift) & 255 for b in bits[4 * part : 4 * part + 4]]
            words[f"{name}{part}"] = f"0x{sum(v << 8 * i for i, v in enumerate(values)):08x}"
    lines = [
        ".reg .b32 code, upper, first, second, low, high, picks, chosen;",
        # ``code`` has the codes without their fourth bit. ``upper`` uses that bit to select byte i
        # or i + 4.
        "and.b32 code, $4, 0x77777777;",
        "shr.u32 upper, $4, 1;",
        "lop3.b32 upper, upper, 0x44444444, 0x32103210, 0xEA;",
    ]
    for half in range(2):
        picks, chosen = "code", "upper"
        if half:
            lines += ["shr.u32 picks, code, 16;", "shr.u32 chosen, upper, 16;"]
            picks, chosen = "picks", "chosen"
        for name in ("low", "high"):
            lines += [
                f"prmt.b32 first, {words[name + '0']}, {words[name + '1']}, {picks};",
                f"prmt.b32 second, {words[name + '2']}, {words[name + '3']}, {picks};",
                f"prmt.b32 {name}, first, second, {chosen};",
            ]
        # The high nibble of a byte is its even column.
        lines += [
            f"prmt.b32 ${half}, low, high, 0x7351;",
            f"prmt.b32 ${2 + half}, low, high, 0x6240;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


_BF16 = tl.constexpr(_lookup(torch.bfloat16))
_FP16 = tl.constexpr(_lookup(torch.float16))


@functools.cache
def code_on(device: torch.device) -> torch.Tensor:
    """The sixteen values, ``[16]`` fp32, copied to each device once."""
    return torch.tensor(CODE, device=device)


@triton.jit
def code_pairs(byte, code_ptr, dtype: tl.constexpr, PTX: tl.constexpr):
    """Values of the even and the odd columns of packed bytes, rounded to ``dtype``.

    Args:
        byte: uint8, any shape.
        code_ptr: ``[16]`` fp32.
        dtype: Of the values.
        PTX: Whether inline PTX may be used.
    """
    if PTX and dtype == tl.bfloat16:
        even, odd = tl.inline_asm_elementwise(
            _BF16, "=r,=r,=r,=r,r", [byte], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif PTX and dtype == tl.float16:
        even, odd = tl.inline_asm_elementwise(
            _FP16, "=r,=r,=r,=r,r", [byte], (tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        wide = byte.to(tl.int32)
        even = tl.load(code_ptr + (wide >> 4)).to(dtype)
        odd = tl.load(code_ptr + (wide & 15)).to(dtype)
    return even, odd
