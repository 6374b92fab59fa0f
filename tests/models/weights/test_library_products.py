"""Library products on the GPU path: the settings, and their effect on a GPU."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from turret.kernels.rows import (
    _addmm_in_pieces,
    linear_in_pieces,
    row_addmm_,
    row_linear,
    row_product,
)
from turret.server.models.weights import nf4_gpu as library_products
from turret.server.models.weights.nf4_gpu import keep_sums_whole

CUDA = torch.device("cuda")
# Rows of a piece, inputs and outputs, for the projections and the head of an 8B model.
PRODUCTS = [
    (256, 4096, 6144),
    (256, 4096, 4096),
    (256, 4096, 28672),
    (256, 14336, 4096),
    (64, 4096, 128256),
]


@pytest.mark.parametrize("refused", [None, RuntimeError, TypeError])
def test_reduced_precision_sums_are_disabled_where_possible(monkeypatch, refused):
    matmul = SimpleNamespace()
    libraries = []

    def prefer(name: str) -> None:
        warnings.warn("preferred_blas_library is an experimental feature", stacklevel=1)
        libraries.append(name)

    backend = SimpleNamespace(matmul=matmul, preferred_blas_library=prefer)
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
    # The row with other rows, and alone.
    alone = torch.zeros_like(x)
    alone[rows // 2] = x[rows // 2]
    assert torch.equal(F.linear(alone, weight)[rows // 2], y[rows // 2])


class _Products(TorchDispatchMode):
    """Records the shapes of library products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            self.shapes.add((name, *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def _update(rows: int, device: str) -> torch.Tensor:
    y, v = torch.zeros(rows, 24, device=device), torch.zeros(rows, 8, device=device)
    row_addmm_(y, v, torch.zeros(8, 24, device=device))
    return y


PIECES = {
    "row_linear": lambda rows, device: row_linear(
        torch.zeros(rows, 8, device=device), torch.zeros(24, 8, device=device)
    ),
    "row_addmm_": _update,
    "row_product of one": lambda rows, device: row_product(
        torch.zeros(rows, 1, 8, device=device), torch.zeros(24, 8, device=device)
    ),
    "row_product of each": lambda rows, device: row_product(
        torch.zeros(rows, 3, 8, device=device), torch.zeros(rows, 24, 8, device=device)
    ),
}


@pytest.mark.parametrize("product", PIECES)
def test_products_on_a_device_have_one_shape_for_any_number_of_rows(product):
    """A library chooses its algorithm by the shape, so a row's bits would depend on other rows."""
    with _Products() as products:
        for rows in (1, 3, 64, 65, 200):
            assert len(PIECES[product](rows, "meta")) == rows
    assert len(products.shapes) == 1, products.shapes


@pytest.mark.parametrize("rows", [1, 64, 131])
def test_the_pieces_equal_the_product(rows):
    y, v, b = torch.randn(rows, 24), torch.randn(rows, 8), torch.randn(8, 24)
    torch.testing.assert_close(_addmm_in_pieces(y, v, b), y + v @ b)
    x, w = torch.randn(rows, 8), torch.randn(24, 8)
    torch.testing.assert_close(linear_in_pieces(x, w), x @ w.T)
