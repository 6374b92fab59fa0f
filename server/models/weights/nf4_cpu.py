"""The fused NF4 product on the CPU: the compiled kernel, or bitsandbytes' with AVX512-BF16.

bitsandbytes does not guarantee a row's bits in other batches, so its product is tried first, like
any library's (``turret.kernels.rows``).
"""

from __future__ import annotations

import functools

import torch

from turret.kernels.cpu import functions, has_kernels, num_threads
from turret.kernels.cpu.products import rounded_gradients
from turret.kernels.cpu.row_adapters import Ahead
from turret.kernels.nf4_matmul import MXFP4, Format
from turret.kernels.rows import SAMPLE_ROWS, Compute, Sizes, choose, in_sizes, name_of

_BLOCKSIZE = 64
TILE_ROWS = 32  # Number of outputs whose codes are stored together.


def has_library_product(device: torch.device) -> bool:
    """Whether bitsandbytes has a fused product for bf16 rows on this device."""
    from bitsandbytes import functional

    return device.type == "cpu" and bool(functional.has_avx512bf16())


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode numbers in NF4 with the kernel, or with bitsandbytes, whose codes are the same.

    Returns:
        The codes, ``[numbers / 2, 1]`` uint8, the earlier number in the high bits; and the largest
        magnitude of each block, fp32.
    """
    code = _code()
    if not has_kernels(weight.device) or weight.numel() % _BLOCKSIZE:
        return torch.ops.bitsandbytes.quantize_4bit(
            weight.contiguous(), _BLOCKSIZE, "nf4", torch.uint8
        )
    numbers, midpoints = weight.float().contiguous(), (code[:-1] + code[1:]) / 2
    codes = torch.empty(numbers.numel() // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(numbers.numel() // _BLOCKSIZE)
    functions().turret_nf4_quantize(
        numbers.data_ptr(),
        midpoints.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        len(absmax),
        num_threads(),
    )
    return codes, absmax


def pack(codes: torch.Tensor, packed: torch.Tensor) -> None:
    """Write a weight in bitsandbytes' packed CPU layout.

    In each tile, two features of all rows take 32 bytes. A row of the first half has the low four
    bits of a byte, and the row 16 rows further has the high ones.

    Args:
        codes: The codes as quantised, row by row, with the earlier feature in the high bits;
            ``out·in/2`` bytes.
        packed: The result, ``[out, in / 2]`` uint8; ``out`` is a multiple of ``TILE_ROWS``.
    """
    rows, pairs = packed.shape
    if has_kernels(codes.device):
        codes = codes.contiguous()
        addresses = codes.data_ptr(), packed.data_ptr()
        functions().turret_nf4_pack(*addresses, rows, 2 * pairs, num_threads())
        return
    low, high = codes.view(torch.uint8).view(-1, 2, TILE_ROWS // 2, pairs).unbind(1)
    even, odd = (high & 0xF0) | (low >> 4), (high << 4) | (low & 0x0F)
    both = torch.stack([even, odd], dim=-1).view(torch.int16).view(-1, TILE_ROWS // 2, pairs)
    packed.copy_(both.transpose(1, 2).contiguous().view(torch.uint8).view(rows, pairs))


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes as quantised, ``[out·in/2, 1]`` uint8, of a weight that ``pack`` wrote."""
    pairs = packed.shape[1]
    both = packed.view(torch.int16).view(-1, pairs, TILE_ROWS // 2).transpose(1, 2).contiguous()
    even, odd = both.view(torch.uint8).view(-1, TILE_ROWS // 2, pairs, 2).unbind(-1)
    low, high = (even << 4) | (odd & 0x0F), (even & 0xF0) | (odd >> 4)
    return torch.stack([low, high], dim=1).view(-1, 1)


def nf4_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, int],
    ahead: Ahead | None = None,
) -> torch.Tensor:
    """Multiply rows by a weight in bitsandbytes' packed CPU layout.

    Needs a compiled kernel or ``has_library_product``.

    Args:
        x: ``[rows, in]`` bf16.
        packed: ``[out, in / 2]`` uint8.
        absmax: ``[in / 64, out]`` bf16; or the scales of MXFP4, ``[in / 32, out]``, which need the
            compiled kernel.
        shape: ``(out, in)``.
        ahead: The memory to prefetch meanwhile.

    Returns:
        ``[rows, out]`` bf16.
    """
    if x.stride(1) != 1:
        # Both products expect rows with stride 1, and bitsandbytes does not check the stride.
        x = x.contiguous()
    if not has_kernels(x.device):
        return in_sizes(lambda rows: _gemv(rows, packed, absmax, shape), x, _sizes(shape))
    rows, (out_features, in_features) = x.shape[0], shape
    out = torch.empty(rows, out_features, dtype=torch.bfloat16)
    step, module = ahead or (None, 0)
    is_mxfp4 = absmax.shape[0] * MXFP4.block == in_features
    product = functions().turret_mxfp4_product if is_mxfp4 else functions().turret_nf4_product
    product(
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


def nf4_transposed_product(
    grad: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """``grad · W``, the gradient of the rows in ``nf4_product``. Needs the compiled kernels.

    Args:
        grad: ``[rows, out]`` fp32, which is rounded to bf16, or bf16.
        packed: See ``nf4_product``.
        absmax: ``[in / 64, out]`` bf16.
        shape: ``(out, in)``.

    Returns:
        ``[rows, in]`` fp32; a row has the same bits in any batch.
    """
    grad, rows = grad.contiguous(), len(grad)
    out, rounded = torch.empty(rows, shape[1]), rounded_gradients(*grad.shape)
    functions().turret_nf4_transposed_product(
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        rows,
        packed.data_ptr(),
        absmax.data_ptr(),
        out.data_ptr(),
        *shape,
        num_threads(),
        rounded.data_ptr(),
    )
    return out


def nf4_expert_products(
    x: torch.Tensor,
    ends: torch.Tensor,
    weights: torch.Tensor,
    shape: tuple[int, int],
    weight_format: Format,
) -> torch.Tensor:
    """Multiply runs of rows, each by its own weight. Needs the compiled kernels.

    Args:
        x: ``[rows, in]`` bf16.
        ends: Where the rows of each weight end, ``[weights]`` int64.
        weights: Addresses of the codes and maxima of each weight, in the format of ``nf4_product``,
            ``[weights, 2]`` int64.
        shape: ``(out, in)``, the same for all.
        weight_format: The format of all of them.

    Returns:
        ``[rows, out]`` bf16; a row has the bits of ``nf4_product``.
    """
    out_features, in_features = shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape[0], out_features, dtype=torch.bfloat16)
    is_mxfp4 = weight_format == MXFP4
    product = functions().turret_mxfp4_experts if is_mxfp4 else functions().turret_nf4_experts
    product(
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


def nf4_formulation(shape: tuple[int, int]) -> str:
    """A description of the product for weights of this shape, for the log."""
    if has_kernels(torch.device("cpu")):
        return "native"
    return f"bitsandbytes {name_of(_sizes(shape))}"


def _gemv(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    return torch.ops.bitsandbytes.gemv_4bit(x, packed, shape, absmax, _code(), _BLOCKSIZE)


@functools.cache
def _code() -> torch.Tensor:
    """The 16 values of NF4, fp32."""
    from bitsandbytes import functional

    return functional.get_4bit_type("nf4", device="cpu")


def _sizes(shape: tuple[int, int]) -> Sizes:
    """The sizes of calls in which bitsandbytes' product keeps a row's bits, at worst one row."""

    def trial() -> tuple[Compute, torch.Tensor]:
        packed, absmax, x = _cancelling(shape)
        return lambda rows: _gemv(rows, packed, absmax, shape), x

    return choose("nf4", shape, trial) or (1,)


def _cancelling(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed weight, absmax and rows whose second half of blocks cancels the first half.

    So the result of a product depends only on the order of its sums.
    """
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    half = in_features // _BLOCKSIZE // 2
    blocks = torch.arange(in_features // _BLOCKSIZE)
    blocks[half : 2 * half] = blocks[:half]
    tiles = out_features // TILE_ROWS, len(blocks), _BLOCKSIZE // 2 * TILE_ROWS
    packed = torch.randint(0, 256, tiles, generator=generator)[:, blocks]
    absmax = torch.rand(len(blocks), out_features, generator=generator)[blocks]
    x = torch.randn(SAMPLE_ROWS, len(blocks), _BLOCKSIZE, generator=generator)[:, blocks]
    x[:, half : 2 * half] *= -1
    return (
        packed.to(torch.uint8).reshape(out_features, in_features // 2),
        absmax.to(torch.bfloat16),
        x.reshape(SAMPLE_ROWS, in_features).to(torch.bfloat16),
    )
