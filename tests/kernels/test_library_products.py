"""Library products on the gpu path: the settings, and on a GPU what they are for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from turret.kernels.gpu import library_products
from turret.kernels.gpu.library_products import keep_sums_whole

CUDA = torch.device("cuda")
# Rows of a piece, inputs, outputs: prompts through an 8B's projections, and its head.
PRODUCTS = [
    (256, 4096, 6144),
    (256, 4096, 4096),
    (256, 4096, 28672),
    (256, 14336, 4096),
    (64, 4096, 128256),
]


@pytest.mark.parametrize("refused", [None, RuntimeError, TypeError])
def test_sums_are_whole_or_at_least_in_fp32(monkeypatch, refused):
    matmul = SimpleNamespace()
    libraries = []
    backend = SimpleNamespace(matmul=matmul, preferred_blas_library=libraries.append)
    monkeypatch.setattr(torch.backends, "cuda", backend)

    def product(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        if refused is not None:
            raise refused
        return x

    fake = SimpleNamespace(linear=product)
    monkeypatch.setattr(library_products, "F", fake)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **_: torch.empty(shape, device="meta"))
    assert keep_sums_whole(CUDA) is (refused is None)
    wanted = (False, False) if refused is None else False
    assert libraries == ["cublaslt"]
    assert matmul.allow_tf32 is False
    assert matmul.allow_bf16_reduced_precision_reduction == wanted
    assert matmul.allow_fp16_reduced_precision_reduction == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("rows", "inner", "out"), PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_has_the_same_bits_wherever_it_is(rows, inner, out, dtype):
    keep_sums_whole(CUDA)
    x = torch.randn(rows, inner, dtype=dtype, device=CUDA)
    weight = torch.randn(out, inner, dtype=dtype, device=CUDA)
    y = F.linear(x, weight)
    for seed in range(3):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(CUDA)
        assert torch.equal(F.linear(x[order], weight), y[order])
    # With other mates, and with none.
    alone = torch.zeros_like(x)
    alone[rows // 2] = x[rows // 2]
    assert torch.equal(F.linear(alone, weight)[rows // 2], y[rows // 2])
