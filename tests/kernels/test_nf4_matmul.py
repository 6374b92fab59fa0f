"""``nf4_matmul``: the reference compared with bitsandbytes, and Triton with the reference.

Planted faults, and the number of tests that fail for each of them (tried by hand):

- high nibble read as the low one: 21
- odd columns of x replaced by the even ones: 21
- offset of the first group for all: 1
- offset dropped: 21
- only the first 16 rows: 8
- x not advanced: 10
- reference: nibbles swapped: 24
- the first slice's input for all: 28
- the second slice's tiles counted from the first column: 20
"""

from __future__ import annotations

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, HALF, MAX_ERROR, error_ratio

from turret.kernels.gpu.activations import silu_mul
from turret.kernels.gpu.common import Tuning
from turret.kernels.gpu.nf4 import nf4_dequantize, nf4_matmul, parts_of
from turret.kernels.nf4_matmul import BLOCK, CODE, Nf4Matrix

bnb = pytest.importorskip("bitsandbytes.functional")


def quantize(out_features: int, in_features: int) -> tuple[Nf4Matrix, torch.Tensor]:
    """A random weight, packed and dequantised by bitsandbytes."""
    dense = torch.randn(out_features, in_features)
    packed, state = bnb.quantize_4bit(
        dense, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    matrix = Nf4Matrix(
        packed.view(-1).to(DEVICE), absmax.view(-1).to(DEVICE), out_features, in_features
    )
    return matrix, bnb.dequantize_4bit(packed, state).to(DEVICE)


@pytest.mark.parametrize("shape", [(48, 64), (96, 128), (300, 192)])
def test_dequantisation_matches_bitsandbytes(shape):
    matrix, dequantized = quantize(*shape)
    assert torch.equal(matrix.dequantize(torch.float32), dequantized)
    assert torch.equal(matrix.dequantize(torch.bfloat16), dequantized.bfloat16())


def served(matrix: Nf4Matrix, dtype: torch.dtype) -> torch.Tensor:
    """The weight by which Triton multiplies, in fp64: a rounded value times an fp32 maximum."""
    nibbles = torch.stack((matrix.packed >> 4, matrix.packed & 15), dim=-1).long()
    values = torch.tensor(CODE, device=DEVICE).to(dtype).double()[nibbles]
    blocks = values.view(-1, BLOCK) * matrix.absmax.double()[:, None]
    return blocks.view(matrix.out_features, matrix.in_features)


@pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 33, 64])
@pytest.mark.parametrize("shape", [(48, 64), (300, 320)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product(num_rows, shape, dtype):
    matrix, _ = quantize(*shape)
    x = torch.randn(num_rows, shape[1]).to(DEVICE, dtype)
    y = nf4_matmul(x, matrix)
    assert error_ratio(y, x.double() @ served(matrix, dtype).T) < MAX_ERROR[dtype]
    for start, end in ((1, 2), (1, 17), (0, 32)):
        if end < num_rows:
            found = nf4_matmul(x[start:end], matrix)
            assert torch.equal(found, y[start:end]), "a row depends on its mates"


@pytest.mark.parametrize(("num_rows", "shape"), [(3, (300, 64)), (33, (96, 192))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_product_has_the_bits_of_two_kernels(num_rows, shape, dtype):
    """300 outputs: the last tile of gates ends where the first one of ups begins."""
    matrix, _ = quantize(*shape)
    x = torch.randn(num_rows, shape[1]).to(DEVICE, dtype)
    for _ in range(2):
        assert torch.equal(nf4_matmul(x, matrix, gated=True), silu_mul(nf4_matmul(x, matrix)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_is_as_accurate_as_a_rounded_one(dtype):
    """Rounding the sixteen values is as accurate as rounding every weight."""
    matrix, _ = quantize(300, 320)
    exact = matrix.dequantize(torch.float32).double()
    rounded = error_ratio(matrix.dequantize(dtype), exact)
    assert error_ratio(served(matrix, dtype), exact) <= 1.3 * rounded + 1e-7


def test_the_parts_of_a_sum_depend_only_on_the_weight():
    """Wide weights are not cut, parts have a minimum size, and the limits of the tuning hold."""
    tuned = Tuning()
    for out_features, blocks in ((4096, 64), (4096, 224), (6144, 64), (28672, 64), (64, 3)):
        parts, part_blocks = parts_of(out_features, blocks, tuned)
        assert parts * part_blocks >= blocks
        assert parts == 1 or part_blocks >= tuned.nf4_part_blocks
        columns = -(-out_features // tuned.nf4_block_n)
        assert parts == 1 or parts * columns < 2 * tuned.nf4_programs
    assert parts_of(4096, 64, tuned) == (8, 8)
    assert parts_of(4096, 224, tuned) == (8, 28)
    assert parts_of(128256, 64, tuned)[0] == 1


@pytest.mark.parametrize("shape", [(48, 64), (31, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_writing_out_the_dequantised_weight(shape, dtype):
    matrix, _ = quantize(*shape)
    assert torch.equal(nf4_dequantize(matrix, dtype), matrix.dequantize(dtype))
