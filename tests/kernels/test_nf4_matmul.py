"""``nf4_matmul``: the reference against bitsandbytes, Triton against the reference.

Planted faults, and how many of the tests here each one fails (tried by hand):

- high nibble read as the low one: 21
- odd columns of x replaced by the even ones: 21
- offset of the first group for all: 1
- offset dropped: 21
- only the first 16 rows: 8
- x not advanced: 10
- reference: nibbles swapped: 24
"""

from __future__ import annotations

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, HALF, MAX_ERROR, error_ratio

from turret.kernels.gpu.nf4_dequantize import nf4_dequantize
from turret.kernels.gpu.nf4_matmul import nf4_matmul
from turret.kernels.nf4_matmul import GROUP, NestedAbsmax, Nf4Matrix, nf4_matmul_reference

bnb = pytest.importorskip("bitsandbytes.functional")


def quantize(out_features: int, in_features: int) -> tuple[Nf4Matrix, torch.Tensor]:
    """A random weight as bitsandbytes packs it, and as it dequantises it."""
    dense = torch.randn(out_features, in_features)
    packed, state = bnb.quantize_4bit(
        dense, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    groups = state.state2.absmax.numel()
    absmax = NestedAbsmax(
        state.absmax.view(-1).to(DEVICE),
        state.state2.code.float().to(DEVICE),
        state.state2.absmax.float().to(DEVICE),
        torch.full((groups,), float(state.offset), device=DEVICE),
    )
    matrix = Nf4Matrix(packed.view(-1).to(DEVICE), absmax, out_features, in_features)
    return matrix, bnb.dequantize_4bit(packed, state).to(DEVICE)


@pytest.mark.parametrize("shape", [(48, 64), (96, 128), (300, 192)])
def test_dequantisation_is_bitsandbytes_own(shape):
    matrix, dequantized = quantize(*shape)
    assert torch.equal(matrix.dequantize(torch.float32), dequantized)
    assert torch.equal(matrix.dequantize(torch.bfloat16), dequantized.bfloat16())


def test_fused_modules_keep_their_own_offsets():
    (first, dense_first), (second, dense_second) = quantize(GROUP, 64), quantize(GROUP, 64)
    parts = [m.absmax for m in (first, second) if isinstance(m.absmax, NestedAbsmax)]
    absmax = NestedAbsmax(
        torch.cat([p.codes for p in parts]),
        parts[0].code2,
        torch.cat([p.absmax2 for p in parts]),
        torch.cat([p.offset for p in parts]),
    )
    packed = torch.cat((first.packed, second.packed))
    fused = Nf4Matrix(packed, absmax, 2 * GROUP, 64)
    assert parts[0].offset[0] != parts[1].offset[0]
    assert torch.equal(fused.dequantize(torch.float32), torch.cat((dense_first, dense_second)))
    x = torch.randn(3, 64).to(DEVICE, HALF)
    assert error_ratio(nf4_matmul(x, fused), nf4_matmul_reference(x, fused)) < MAX_ERROR[HALF]


@pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 64])
@pytest.mark.parametrize("shape", [(48, 64), (300, 192)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product(num_rows, shape, dtype):
    matrix, _ = quantize(*shape)
    x = torch.randn(num_rows, shape[1]).to(DEVICE, dtype)
    expected = x.double() @ matrix.dequantize(dtype).double().T
    assert error_ratio(nf4_matmul_reference(x, matrix), expected) < MAX_ERROR[dtype]
    y = nf4_matmul(x, matrix)
    assert error_ratio(y, expected) < MAX_ERROR[dtype]
    assert isinstance(matrix.absmax, NestedAbsmax)
    plain = Nf4Matrix(matrix.packed, matrix.absmax.flat(), *shape)
    assert torch.equal(nf4_matmul(x, plain), y)
    if num_rows > 1:
        assert torch.equal(nf4_matmul(x[1:2], matrix), y[1:2]), "a row depends on its mates"


@pytest.mark.parametrize("shape", [(48, 64), (31, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_writing_the_weight_out(shape, dtype):
    matrix, _ = quantize(*shape)
    assert isinstance(matrix.absmax, NestedAbsmax)
    plain = Nf4Matrix(matrix.packed, matrix.absmax.flat(), *shape)
    assert torch.equal(nf4_dequantize(plain, dtype), matrix.dequantize(dtype))
    with pytest.raises(ValueError, match="nested"):
        nf4_dequantize(matrix, dtype)


def test_breaches_of_the_contract_are_refused():
    matrix, _ = quantize(48, 64)
    x = torch.zeros(2, 64, device=DEVICE, dtype=HALF)
    with pytest.raises(ValueError, match="65 rows"):
        nf4_matmul(x[:1].expand(65, -1).contiguous(), matrix)
    with pytest.raises(ValueError, match="x is"):
        nf4_matmul(x[:, :-1], matrix)
    with pytest.raises(ValueError, match="packed has"):
        nf4_matmul(x, Nf4Matrix(matrix.packed[1:], matrix.absmax, 48, 64))
    with pytest.raises(ValueError, match="multiple of 64"):
        nf4_matmul(torch.zeros(2, 60, dtype=HALF), Nf4Matrix(matrix.packed, matrix.absmax, 48, 60))
