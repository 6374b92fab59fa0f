"""The base product of the GPU path: rows keep their bits, and slices can be split and joined."""

from __future__ import annotations

import pytest
import torch

from turret.kernels.nf4_matmul import Nf4Matrix
from turret.server.adapters.peft_format.reading import dora_gain
from turret.server.models.weights.nf4 import Nf4Weight
from turret.server.models.weights.nf4_gpu import GpuLinear

pytestmark = pytest.mark.usefixtures("coarse_tiles")
DTYPE = torch.float32
CPU = torch.device("cpu")


def make(in_features: int) -> tuple[GpuLinear, torch.Tensor]:
    dense = [torch.randn(out, in_features) for out in (48, 32)]
    slices = [Nf4Weight.quantize(weight) for weight in dense]
    # Do not use bitsandbytes' CPU op, which misreads widths that are not multiples of 64.
    parts = [Nf4Matrix(w.packed.view(-1), w.absmax(), *w.shape).dequantize(DTYPE) for w in slices]
    whole = torch.cat(parts)
    assert (whole - torch.cat(dense)).norm() < 0.1 * whole.norm()
    return GpuLinear.fuse(slices, DTYPE, CPU), whole


# With 96 inputs, quantisation blocks span rows.
@pytest.mark.parametrize("in_features", [128, 96])
@pytest.mark.parametrize("num_decode", [0, 3, 9, 12])
def test_products_of_rows_do_not_depend_on_the_rest_of_the_step(in_features, num_decode):
    linear, weight = make(in_features)
    x = torch.randn(12, in_features)
    y = linear.product(x, num_decode)
    assert torch.allclose(y, x @ weight.T, rtol=1e-5, atol=1e-4)
    # The first decode row and the last prompt row, alongside other rows.
    if num_decode:
        assert torch.equal(linear.product(x[:1], 1)[0], y[0])
    if num_decode < len(x):
        assert torch.equal(linear.product(x[-1:], 0)[0], y[-1])


@pytest.mark.parametrize("in_features", [128, 96])
def test_parts_can_be_joined_to_other_weights(in_features):
    linear, weight = make(in_features)
    parts = [linear.part(0), linear.part(1)]
    assert torch.equal(parts[1].dequantize(0), weight[48:])
    joined = GpuLinear.join(parts)
    x = torch.randn(4, in_features)
    assert torch.equal(joined(x), linear(x))
    assert torch.equal(joined.dequantize(0), weight[:48])
    other = GpuLinear.fuse([Nf4Weight.quantize(torch.randn(48, in_features))], DTYPE, CPU)
    both = GpuLinear.join([other, parts[1]])
    assert torch.equal(both(x)[:, 48:], linear(x)[:, 48:])


@pytest.mark.parametrize("in_features", [128, 96])
def test_only_the_requested_rows_are_dequantised(in_features):
    """A DoRA adapter's norms are computed from these rows."""
    linear, whole = make(in_features)
    start = 0
    for index, width in enumerate(linear.widths):
        served, expected = linear.served(index), whole[start : start + width]
        assert tuple(served.shape) == (width, linear.in_features)
        assert served.dtype == DTYPE
        blocks = [served[low : low + 24] for low in range(0, width, 24)]
        assert max(len(block) for block in blocks) <= 24
        torch.testing.assert_close(torch.cat(blocks).float(), expected.float(), rtol=0, atol=0)
        start += width
    magnitude, a, b = torch.rand(32) + 0.5, torch.randn(4, in_features), torch.randn(32, 4)
    gain = dora_gain(magnitude, a, b, 2.0, linear.served(1))
    assert torch.equal(gain, dora_gain(magnitude, a, b, 2.0, whole[48:]))
