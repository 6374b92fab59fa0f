"""Kernels that combine two launches, compared with the bits of the two and with float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, MAX_ERROR, error_ratio, make_pack, rotated, traffic

from turret.kernels.gpu.low_rank import Shrink, nf4_shrink, segmented_expand, segmented_shrink
from turret.kernels.gpu.nf4 import nf4_matmul, nf4_rotate
from turret.kernels.gpu.rope_kv_write import KvWrite, rope_kv_write
from turret.kernels.gpu.tables import SegmentTable
from turret.kernels.nf4_matmul import BLOCK, CODE, Nf4Matrix

HEADS, KV_HEADS, HEAD_DIM, SLOTS = 3, 1, 16, 80
# Some ranks exceed a tile of 16.
RANKS = (1, 3, 8, 16, 5, 20)
# In the interpreter, fp32 adds little to fp16.
WIDTHS = [
    pytest.param(dtype, marks=pytest.mark.long) if dtype == torch.float32 else dtype
    for dtype in DTYPES
]
# The rotated pairs of a head, and whether they are neighbours.
WHOLE, PARTLY, NEIGHBOURS = (8, False), (3, False), (8, True)


def weight_of(out: int, inner: int) -> Nf4Matrix:
    packed = torch.randint(0, 256, (out * inner // 2,), dtype=torch.uint8)
    absmax = torch.rand(out * inner // BLOCK) + 0.1
    return Nf4Matrix(packed.to(DEVICE), absmax.to(DEVICE), out, inner)


def product_in_float64(x: torch.Tensor, weight: Nf4Matrix) -> torch.Tensor:
    """The product with the multiplied values: rounded codes times maxima."""
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), dim=-1).long()
    values = torch.tensor(CODE, device=DEVICE).to(x.dtype).double()[nibbles]
    blocks = values.view(-1, BLOCK) * weight.absmax.double()[:, None]
    return x.double() @ blocks.view(weight.out_features, weight.in_features).T


def make_write(rows: int, dtype: torch.dtype, pairs: int, is_interleaved: bool) -> KvWrite:
    """A write with zeroed caches and unordered slots."""
    angles = torch.randn(rows, pairs, device=DEVICE)
    caches = torch.zeros(2, SLOTS // 4, 4, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=dtype)
    return KvWrite(
        cos=angles.cos(),
        sin=angles.sin(),
        kv_slots=torch.randperm(SLOTS)[:rows].to(DEVICE),
        k_cache=caches[0],
        v_cache=caches[1],
        is_interleaved=is_interleaved,
    )


def emptied(write: KvWrite) -> KvWrite:
    """The same write with separate caches."""
    caches = torch.zeros_like(write.k_cache), torch.zeros_like(write.v_cache)
    return replace(write, k_cache=caches[0], v_cache=caches[1])


def assert_same_heads(
    found: torch.Tensor, write: KvWrite, expected: torch.Tensor, other: KvWrite
) -> None:
    assert torch.equal(found, expected)
    assert torch.equal(write.k_cache, other.k_cache)
    assert torch.equal(write.v_cache, other.v_cache)


def assert_near_float64(q: torch.Tensor, write: KvWrite, exact: torch.Tensor) -> None:
    """``exact`` is the product, ``[rows, columns]`` float64."""
    heads = exact.view(len(exact), -1, HEAD_DIM)
    turned = rotated(heads, write.cos, write.sin, is_interleaved=write.is_interleaved)
    bound = 1.5 * MAX_ERROR[q.dtype]
    assert error_ratio(q, turned[:, :HEADS]) < bound
    keys, values = (each.flatten(0, 1)[write.kv_slots] for each in (write.k_cache, write.v_cache))
    assert error_ratio(keys, turned[:, HEADS:-KV_HEADS]) < bound
    assert error_ratio(values, heads[:, -KV_HEADS:]) < bound


@pytest.mark.parametrize(
    ("rows", "inner", "turn"), [(1, 64, PARTLY), (5, 192, WHOLE), (33, 64, NEIGHBOURS)]
)
@pytest.mark.parametrize("dtype", WIDTHS)
def test_a_product_and_its_heads(rows, inner, turn, dtype):
    out = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    weight, x = weight_of(out, inner), torch.randn(rows, inner).to(DEVICE, dtype)
    for bias in (None, torch.randn(out).to(DEVICE, dtype)):
        write = make_write(rows, dtype, *turn)
        q, other = nf4_rotate(x, weight, bias, write), emptied(write)
        y = nf4_matmul(x, weight)
        if bias is not None:
            y += bias
        assert_same_heads(q, write, rope_kv_write(y, other), other)
        exact = product_in_float64(x, weight) + (0 if bias is None else bias.double())
        assert_near_float64(q, write, exact)
        alone = nf4_rotate(x[:1], weight, bias, emptied(write).rows(0, 1))
        assert torch.equal(alone, q[:1]), "a row depends on its mates"


@pytest.mark.parametrize(
    ("name", "inner", "base_rows"),
    [("mixes", 128, 5), ("run of 17", 64, 17), ("base rows between", 64, 1), ("empty", 64, 3)],
)
@pytest.mark.parametrize("dtype", WIDTHS)
def test_a_product_and_a_shrink(name, inner, base_rows, dtype):
    outs = (40, 33, 5)
    pack, weight = make_pack(inner, outs, dtype, RANKS), weight_of(sum(outs), inner)
    runs, num_rows = next((runs, rows) for found, runs, rows in traffic(pack) if found == name)
    table = SegmentTable(max_rows=64, max_row_rank=256, max_components=4, device=DEVICE)
    table.load(runs)
    x = torch.randn(num_rows, inner).to(DEVICE, dtype)
    y, v = nf4_shrink(x, base_rows, weight, Shrink(pack.a, pack.slice_ranks, table))
    assert torch.equal(y, nf4_matmul(x[:base_rows], weight))
    # Places without a row are undefined, so compare only what expand reads.
    results = []
    for parts in (v, segmented_shrink(x, pack.a, pack.slice_ranks, table)):
        result = torch.zeros(num_rows, sum(outs), device=DEVICE)
        b = [slice_b.float() for slice_b in pack.b]
        segmented_expand(result, parts, b, pack.slice_ranks, table)
        results.append(result)
    assert torch.equal(*results)
