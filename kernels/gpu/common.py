"""Code that kernels share: checks of arguments, launch parameters, functions inside kernels.

Wrappers check shapes, dtypes and strides on the host, never values on the device.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from turret.kernels.nf4_matmul import MXFP4, NF4, Format

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_float(name: str, tensor: torch.Tensor, like: torch.dtype | None = None) -> None:
    """Require fp16, bf16 or fp32, or exactly ``like``.

    Raises:
        ValueError: The tensor has a different dtype.
    """
    if like is not None and tensor.dtype != like:
        raise ValueError(f"{name} is {tensor.dtype}; {like} is needed")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}; fp16, bf16 or fp32 is needed")


def check_shape(name: str, tensor: torch.Tensor, *shape: int) -> None:
    """Require a shape; -1 stands for any size.

    Raises:
        ValueError: The tensor has a different shape.
    """
    actual = tuple(tensor.shape)
    fits = len(actual) == len(shape) and all(
        want in (-1, have) for have, want in zip(actual, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} is {list(actual)}; {list(shape)} is needed (-1: any)")


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Require that the last dimension is contiguous.

    Raises:
        ValueError: The last dimension is not contiguous.
    """
    if tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {tensor.stride(-1)} in its last dimension; 1 is needed"
        )


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Require a contiguous tensor.

    Raises:
        ValueError: The tensor is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: strides {tensor.stride()}")


def check_length(name: str, tensor: torch.Tensor, count: int) -> None:
    """Require a number of elements.

    Raises:
        ValueError: The number differs.
    """
    if tensor.numel() != count:
        raise ValueError(f"{name} has {tensor.numel()} elements; {count} are needed")


def check_addresses(name: str, tensor: torch.Tensor, count: int) -> None:
    """Require ``[slots, count]`` addresses, contiguous.

    Raises:
        ValueError: The shape, dtype or stride differs.
    """
    check_shape(name, tensor, -1, count)
    check_contiguous(name, tensor)
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} is {tensor.dtype}; int64 addresses are needed")


# Launch parameters per device; ``bench/gpu.py --tune`` finds them.

# Older versions of Triton omit the fence that Hopper's wgmma needs between an asynchronous copy to
# shared memory and a product that reads the copied data.
_FENCES_COPIES = (3, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Launch parameters.

    Parameters that determine the order of a sum (``*_split*``, ``shrink_block_k``, ``nf4_*``) are
    fixed per device, because a row's bits must not depend on the step.

    Attributes:
        programs: Programs of the kernels that loop over a device-side work list.
        shrink_programs: Programs of a shrink that is launched with the base's product.
        shrink_split_k: The approximate number of input features in a part of a shrink's reduction,
            which has 2 to 16 parts.
        shrink_block_k: Input features per step of that reduction.
        expand_block_n: Output columns per tile.
        hadamard_splits: Parts of the reduction over the input features.
        hadamard_block_k: Like ``shrink_block_k``, up to rank 32; halved for higher ranks.
        hadamard_block_n: Output columns per tile, up to rank 32; halved for higher ranks.
        kronecker_block_l: Columns of ``w2`` per step of its reduction.
        nf4_block_n: Output columns per program.
        nf4_programs: The input features of a narrow weight are cut into parts until there are this
            many programs.
        nf4_part_blocks: The minimum number of quantisation blocks in a part.
        nf4_pass_rows: Decoding rows per call of ``nf4_matmul``, at most 64; 0 if it is faster to
            dequantise the weight and use a library's product.
        attention_stages: Depth of attention's pipeline over keys. A block's number is loaded before
            its keys, so a depth of 5 keeps two tiles of keys and values in flight, and a depth of 3
            keeps none.
        nf4_stages: Depth of the pipeline of ``nf4_matmul``; four do not fit in 64 KiB (AMD).
        sample_block: Tokens of the vocabulary that the sampler processes together.
        inline_ptx: Whether kernels may contain PTX, as on NVIDIA devices.
    """

    programs: int = 528
    shrink_programs: int = 264
    shrink_split_k: int = 1024
    shrink_block_k: int = 256
    expand_block_n: int = 256
    hadamard_splits: int = 4
    hadamard_block_k: int = 64
    hadamard_block_n: int = 64
    kronecker_block_l: int = 32
    nf4_block_n: int = 64
    nf4_programs: int = 512
    nf4_part_blocks: int = 8
    nf4_pass_rows: int = 64
    # AMD devices have 64 KiB of shared memory, too little for two tiles in flight.
    attention_stages: int = 5 if torch.version.hip is None else 3
    nf4_stages: int = 4 if torch.version.hip is None else 3
    sample_block: int = 4096
    inline_ptx: bool = torch.version.hip is None

    def registers(self, most: int) -> dict[str, int]:
        """Launch option: the maximum number of registers of a thread.

        Without this option, NVIDIA's assembler uses fewer registers than are available, and spills
        values that do not fit.
        """
        return {"maxnreg": most} if self.inline_ptx else {}


# Parameters by torch.cuda.get_device_name; devices that are not listed use the default.
_TABLE: dict[str, Tuning] = {}

# Parameters for Triton's interpreter. With few programs and small tiles, tests also cover the loops
# over work lists and splits.
_INTERPRETER = Tuning(
    programs=3,
    shrink_programs=2,
    shrink_split_k=64,
    shrink_block_k=32,
    expand_block_n=32,
    hadamard_splits=2,
    hadamard_block_k=32,
    hadamard_block_n=32,
    kronecker_block_l=32,
    nf4_block_n=32,
    nf4_programs=16,
    nf4_part_blocks=1,
    nf4_pass_rows=4,
    sample_block=64,
    inline_ptx=False,
)


def wgmma_stages(stages: int) -> int:
    """Pipeline depth for tiles of 64 rows; 1 (no asynchronous copies) if Triton lacks the fence."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return stages if version >= _FENCES_COPIES else 1


@functools.cache
def tuning(device: torch.device) -> Tuning:
    """The parameters for a device; for the CPU, those for Triton's interpreter."""
    if device.type == "cpu":
        return _INTERPRETER
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return _TABLE.get(name, Tuning())


# Access to tensors by their addresses.


@triton.jit
def pointer_to(address, like_ptr):
    """An address as a pointer. Separate allocations begin at multiples of 16."""
    return tl.multiple_of(address.to(tl.pointer_type(like_ptr.dtype.element_ty)), 16)


# Products on tensor cores that keep the accuracy of an fp32 operand.


@triton.jit
def dot(x, w, acc):
    """``acc + x w`` for operands of one dtype; fp32 operands multiply as fp32, not as TF32."""
    return tl.dot(x, w, acc, input_precision="ieee")


@triton.jit
def split_dot(x, w, acc):
    """``acc + x w`` for an fp32 ``x`` and a narrower ``w``.

    ``x`` is split into a high and a low part of ``w``'s dtype, which together have 16 (bf16) or 22
    (fp16) bits of mantissa. This doubles the work of the tensor cores, but kernels bound by memory
    leave them idle anyway.
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
    """``acc + w x``: like ``split_dot``, but with the fp32 operand on the right."""
    if w.dtype == tl.float32:
        acc = tl.dot(w, x, acc, input_precision="ieee")
    else:
        high = x.to(w.dtype)
        low = (x - high.to(tl.float32)).to(w.dtype)
        acc = tl.dot(w, high, acc)
        acc = tl.dot(w, low, acc)
    return acc


# The last program of a launch adds up the parts that all programs have stored.
#
# A program stores its part, then adds one to a counter. The addition releases the program's stores
# (the barrier puts those of all its threads before it) and acquires the stores that the others
# released, so the program that finds itself the last may read every part. It adds them in a fixed
# order, so the result does not depend on which program is last. It resets the counter for the next
# launch. Parts are read from the second-level cache (``cache_modifier=".cg"``).


@triton.jit
def is_last(
    counter_ptr,  # int32, zero before the launch
    arrivals,  # number of programs that add to the counter, each once
):
    """Whether this program is the last one, so that all others have stored their parts."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


# Conversion of packed 4-bit codes to weights in a kernel.
#
# On NVIDIA devices the values are looked up in registers: ``prmt`` picks bytes of two words by the
# low three bits of a code, and the fourth bit chooses between the picks from two pairs of words.
# Four words hold the low bytes of the values, and four the high bytes, so a weight costs two and a
# half instructions and no memory access; a gathered load would go through shared memory for each
# weight. On other devices the values are gathered from a table and rounded alike, so the bits are
# the same.


def _words(weight_format: Format, dtype: torch.dtype) -> list[int]:
    """The low bytes of the sixteen values, then the high ones, four to a word."""
    bits = torch.tensor(weight_format.code).to(dtype).view(torch.int16).tolist()
    return [
        sum(((b >> shift) & 255) << 8 * i for i, b in enumerate(bits[first : first + 4]))
        for shift in (0, 8)
        for first in range(0, 16, 4)
    ]


def _lookup(weight_format: Format, dtype: torch.dtype) -> str:
    """PTX that turns four bytes (``$4``) into four pairs of neighbouring values (``$0`` to ``$3``).

    ``prmt`` accepts only one constant. The other word of each pair is therefore an operand
    (``code_words``), of which Triton passes one copy per byte.
    """
    words = [f"0x{word:08x}" for word in _words(weight_format, dtype)]
    words[::2] = ["$5", "$9", "$13", "$17"]
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
        for name, (a, b, c, d) in (("low", words[:4]), ("high", words[4:])):
            lines += [
                f"prmt.b32 first, {a}, {b}, {picks};",
                f"prmt.b32 second, {c}, {d}, {picks};",
                f"prmt.b32 {name}, first, second, {chosen};",
            ]
        # The high nibble of a byte is its even column.
        lines += [
            f"prmt.b32 ${2 * half}, low, high, 0x4051;",
            f"prmt.b32 ${2 * half + 1}, low, high, 0x6273;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


_BF16 = tl.constexpr(_lookup(NF4, torch.bfloat16))
_FP16 = tl.constexpr(_lookup(NF4, torch.float16))
_MXFP4_BF16 = tl.constexpr(_lookup(MXFP4, torch.bfloat16))
_MXFP4_FP16 = tl.constexpr(_lookup(MXFP4, torch.float16))
_OPERANDS = tl.constexpr("=r,=r,=r,=r" + 17 * ",r")


@functools.cache
def codes_on(device: torch.device, dtype: torch.dtype, weight_format: Format = NF4) -> torch.Tensor:
    """The table by which kernels decode weights to ``dtype``, copied to each device once.

    If kernels look values up in registers, the table contains the words of ``code_words``, ``[4]``
    int32; otherwise the sixteen values, ``[16]`` fp32.
    """
    if tuning(device).inline_ptx and dtype != torch.float32:
        return torch.tensor(_words(weight_format, dtype)[::2]).to(torch.int32).to(device)
    return torch.tensor(weight_format.code, device=device)


@triton.jit
def code_words(codes_ptr):
    """The words of the table that are not constants in the code.

    NVIDIA's assembler would keep constant words outside of the general registers, and copy each
    word to one before each use. Words from memory stay in general registers.
    """
    at = codes_ptr + tl.zeros((1, 1), dtype=tl.int32)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _weights(byte, codes_ptr, words, dtype: tl.constexpr, IS_MXFP4: tl.constexpr):
    """The values of packed codes in ``dtype``, ``[columns, bytes]`` → ``[columns, 2 · bytes]``."""
    if codes_ptr.dtype.element_ty == tl.int32:
        bf16: tl.constexpr = _MXFP4_BF16 if IS_MXFP4 else _BF16
        fp16: tl.constexpr = _MXFP4_FP16 if IS_MXFP4 else _FP16
        pair = tl.inline_asm_elementwise(
            bf16 if dtype == tl.bfloat16 else fp16, _OPERANDS,
            [byte, words[0], words[1], words[2], words[3]], tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
        even = pair.to(tl.int16).to(dtype, bitcast=True)
        odd = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        wide = byte.to(tl.int32)
        even = tl.load(codes_ptr + (wide >> 4)).to(dtype)
        odd = tl.load(codes_ptr + (wide & 15)).to(dtype)
    return tl.reshape(tl.join(even, odd), (byte.shape[0], 2 * byte.shape[1]))


CODES = tl.constexpr(32)


@triton.jit
def add_codes(
    acc,  # [columns, rows]
    packed_at,  # [columns], where the codes begin
    x_at,  # [rows], where the inputs begin
    inside,
    live,
    codes_ptr,
    words,  # of code_words
    IS_MXFP4: tl.constexpr = False,
):
    """Add the products of 32 codes of some columns with the inputs of some rows.

    The weights are the left operand, 32 at a time, so that Triton decodes each weight in the lane
    that multiplies it, and neither weights nor inputs are copied between registers.
    """
    half, whole = tl.arange(0, CODES // 2), tl.arange(0, CODES)
    byte = tl.load(packed_at[:, None] + half[None, :], mask=inside[:, None], other=0)
    dtype: tl.constexpr = x_at.dtype.element_ty
    weight = _weights(byte, codes_ptr, words, dtype, IS_MXFP4)
    x = tl.load(x_at[:, None] + whole[None, :], mask=live[:, None], other=0.0)
    return dot(weight, tl.trans(x), acc)
