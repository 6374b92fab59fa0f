"""The compiled NF4 product: bitsandbytes' bits without tiles, near float64 with tiles.

Faults planted in the C code, and how many tests failed for each: the absmax of the low half used
for the high one (61), the low codes used for the high ones (61), the absmax of the first block used
for all (40), every group's sums stored in the first one's place (37), the tiles after an even
division among threads left out (10), every other block of 64 rows left out (12).
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from kernel_traffic import error_ratio

from turret.kernels import cpu as native
from turret.kernels.cpu import library
from turret.kernels.nf4_matmul import NF4
from turret.server.models.weights import nf4_cpu
from turret.server.models.weights.nf4 import BLOCKSIZE, Nf4Weight, PackedLinear, nf4_linear
from turret.server.models.weights.nf4_cpu import nf4_product, pack, unpack

CPU = torch.device("cpu")
# Codes, maxima and results are rounded to bf16.
MAX_ERROR = 6e-3

needs_avx512bf16 = pytest.mark.skipif(
    not bnb_functional.has_avx512bf16(), reason="bitsandbytes packs only for AVX512-BF16"
)


def random_weight(out_features: int, in_features: int, seed: int = 0) -> Nf4Weight:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    return Nf4Weight.quantize(weight.to(torch.bfloat16))


def converted(weight: Nf4Weight) -> tuple[torch.Tensor, Any]:
    """The weight in bitsandbytes' packed form, and its state."""
    state = copy.deepcopy(weight.state)
    return bnb_functional._convert_weight_packed_for_cpu(weight.packed, state)


@pytest.mark.parametrize("shape", [(32, 64), (96, 576), (1536, 192)])
def test_weights_are_packed_as_bitsandbytes_packs_them(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(*shape)
    packed, state = converted(weight)
    for has_kernels in {nf4_cpu.has_kernels(CPU), False}:
        monkeypatch.setattr(nf4_cpu, "has_kernels", lambda device, found=has_kernels: found)
        own = torch.empty_like(packed)
        pack(weight.packed, own)
        assert torch.equal(own, packed)
    assert torch.equal(unpack(packed), weight.packed)
    linear = PackedLinear.pack([weight])
    assert torch.equal(linear.packed, packed)
    assert torch.equal(linear.absmax, state.absmax)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_quantised_as_bitsandbytes_quantises_them(dtype: torch.dtype) -> None:
    code = bnb_functional.get_4bit_type("nf4", device="cpu")
    weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(1))
    # All values and the midpoints between them, exactly as some block scales them.
    weight[0, :16], weight[0, 16:31], weight[0, 31:64] = code, (code[:-1] + code[1:]) / 2, 0
    weight[1] = 0
    weight[2] *= 1e-39
    weight[3, 5], weight[4, 7], weight[5, 9] = float("nan"), float("inf"), -float("inf")
    weight[6] *= 1e37
    found, expected = Nf4Weight.quantize(weight.to(dtype)), _by_bitsandbytes(weight.to(dtype))
    parts, wanted = found.to_tensors("w"), expected.to_tensors("w")
    assert parts.keys() == wanted.keys()
    for name, part in parts.items():
        torch.testing.assert_close(part, wanted[name], rtol=0, atol=0, equal_nan=True)
    ragged = weight[:1, :100]
    assert torch.equal(Nf4Weight.quantize(ragged).packed, _by_bitsandbytes(ragged).packed)


def _by_bitsandbytes(weight: torch.Tensor) -> Nf4Weight:
    return Nf4Weight(
        *bnb_functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=True
        )
    )


_IMPORTS = """
import sys, torch
replaced = torch.compile, torch._disable_dynamo
from turret.server.models.weights.nf4 import Nf4Weight, nf4_linear
assert (torch.compile, torch._disable_dynamo) == replaced
weight = Nf4Weight.from_tensors("one", torch.load(sys.argv[1]))
nf4_linear([weight], torch.bfloat16, torch.device("cpu"))
Nf4Weight.quantize(weight.dequantize(torch.float32))
assert not {"torch._dynamo", "triton"} & sys.modules.keys()
"""


def test_weights_are_loaded_and_quantised_without_torchs_compiler_and_triton(
    tmp_path: Path,
) -> None:
    torch.save(random_weight(32, 64).to_tensors("one"), tmp_path / "weight")
    command = [sys.executable, "-c", _IMPORTS, str(tmp_path / "weight")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_avx512bf16
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 64, 65, 130])
@pytest.mark.parametrize(("out_features", "in_features"), [(96, 64), (64, 192), (576, 576)])
def test_products_match_the_registered_op(
    rows: int, out_features: int, in_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.isa() == "amx":
        monkeypatch.setattr(nf4_cpu, "functions", lambda: native.load("avx512_bf16"))
    weight = random_weight(out_features, in_features)
    packed, state = converted(weight)
    x = torch.randn(rows, in_features).to(torch.bfloat16)
    shape = (out_features, in_features)
    found = nf4_product(x, packed, state.absmax, shape)
    op = torch.ops.bitsandbytes.gemv_4bit
    assert torch.equal(found, op(x, packed, shape, state.absmax, state.code, BLOCKSIZE))


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    # In the last shape, the weights of a piece exceed their share of the cache (``KEPT_BYTES``).
    ("out_features", "in_features"),
    [(96, 64), (64, 192), (576, 576), (640, 8192)],
)
def test_rows_equal_float64_and_the_rows_alone(out_features: int, in_features: int) -> None:
    weight = random_weight(out_features, in_features)
    packed, state = converted(weight)
    x = torch.randn(300, in_features).to(torch.bfloat16)
    exact = x.double() @ weight.dequantize(torch.float32).double().T
    whole = nf4_product(x, packed, state.absmax, (out_features, in_features))
    for first, last in [(0, 1), (5, 7), (0, 15), (0, 16), (3, 20), (0, 33), (1, 130), (20, 277)]:
        found = nf4_product(x[first:last], packed, state.absmax, (out_features, in_features))
        assert torch.equal(found, whole[first:last])
    assert error_ratio(whole, exact) < MAX_ERROR


def test_zero_rows_give_zero_rows() -> None:
    linear = nf4_linear([random_weight(64, 128)], torch.bfloat16, torch.device("cpu"))
    assert linear(torch.empty(0, 128, dtype=torch.bfloat16)).shape == (0, 64)


def test_strided_rows_of_a_wider_matrix_are_accepted() -> None:
    linear = nf4_linear([random_weight(64, 128)], torch.bfloat16, torch.device("cpu"))
    wide = torch.randn(5, 256).to(torch.bfloat16)
    assert torch.equal(linear(wide[:, 128:]), linear(wide[:, 128:].contiguous()))
    assert torch.equal(linear(wide.T.contiguous().T[:, :128]), linear(wide[:, :128].contiguous()))


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("isa", native.usable_isas())
def test_gradients_use_the_weight_of_the_product(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_cpu, "functions", lambda: native.load(isa))
    linear = PackedLinear.pack([random_weight(96, 192, 1), random_weight(32, 192, 2)])
    grad = torch.randn(5, 128).to(torch.bfloat16)
    weight = torch.cat([linear.dequantize(0), linear.dequantize(1)])
    exact = grad.double() @ weight.double()
    assert error_ratio(linear.transposed_product(grad.float()), exact) < MAX_ERROR
    # A unit row selects one row of the weight, which ``dequantize`` rounds to bf16.
    rows = linear.transposed_product(torch.eye(128))
    assert torch.equal(rows.to(torch.bfloat16).float(), weight)


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_terms_are_added_in_the_order_of_the_inputs(
    isa: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block from zero, pair by pair, the odd input first, as VDPBF16PS adds them."""
    if isa not in native.usable_isas():
        pytest.skip(f"this processor or compiler does not have {isa}")
    monkeypatch.setattr(nf4_cpu, "functions", lambda: native.load(isa))
    # The second half of each block cancels the first, so that the rounding of every sum shows.
    numbers = torch.randn(64, 3, 1, 32).expand(-1, -1, 2, -1).reshape(64, 192)
    weight = Nf4Weight.quantize(numbers.to(torch.bfloat16))
    linear = PackedLinear.pack([weight])
    code = torch.tensor(NF4.code).to(torch.bfloat16).float()
    codes = weight.packed.view(64, 96)
    values = code[torch.stack((codes >> 4, codes & 15), dim=2).view(64, 192).int()]
    halves = torch.randn(rows, 3, 1, 32) * torch.tensor([1.0, -1.0])[:, None]
    x = halves.reshape(rows, 192).to(torch.bfloat16)
    total = torch.zeros(rows, 64)
    for block in range(3):
        sums = torch.zeros(rows, 64)
        for k in range(BLOCKSIZE):
            place = block * BLOCKSIZE + (k ^ 1)
            # Products of bf16 numbers are exact in fp32.
            sums += x[:, place, None].float() * values[:, place]
        # In float64, the product is exact as well, so this rounds like a fused multiply-add.
        total = (total.double() + sums.double() * linear.absmax[block].double()).float()
    assert torch.equal(linear(x), total.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_returns_the_weight_of_the_product(dtype: torch.dtype) -> None:
    parts = [random_weight(96, 64, 1), random_weight(32, 64, 2)]
    linear = nf4_linear(parts, dtype, torch.device("cpu"))
    x = torch.randn(3, 64).to(dtype)
    expected = torch.cat([x.float() @ linear.dequantize(i).T for i in range(2)], dim=1)
    error = (linear(x).float() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 5e-3)
    exact = parts[1].dequantize(torch.float32)
    bound = 0.0 if dtype == torch.float32 else 1e-2
    assert (linear.dequantize(1) - exact).norm() <= bound * exact.norm()
