"""Compiled operations between a layer's products, compared with float64 and each row alone.

Faults that were planted in the C code, and how many tests each one failed: a sine of the other sign
(10), the residual not written (6), an eps 1000 times too large (6), no up (6), truncation to bf16
(12), an unbounded exponential (6).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_traffic import error_ratio

from turret.kernels.cpu import native
from turret.kernels.cpu.layers import (
    add_rms_norm,
    clamped_swiglu,
    gelu_mul,
    rope_kv_write,
    silu_mul,
)

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")

BF16 = torch.bfloat16
MAX_ERROR = 4e-3  # one rounding to bf16 makes up to 2.3e-3 of the RMS
HEADS = [(9, 3, 64), (4, 4, 32), (8, 1, 96), (2, 2, 128), (14, 2, 256)]


@pytest.fixture(params=[1, 3])
def threads(request: Any) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("width", [64, 75, 576])
def test_norm_adds_the_residual_and_rounds_once(width: int, threads: None) -> None:
    # Values that are small enough for eps to matter.
    hidden, delta = ((3e-3 * torch.randn(9, width)).to(BF16) for _ in range(2))
    weight = torch.randn(width)
    before = hidden.clone()
    out = add_rms_norm(hidden, delta, weight, 1e-5)
    assert torch.equal(hidden, before + delta)
    scale = (hidden.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert error_ratio(out, hidden.double() * scale * weight.double()) < MAX_ERROR
    again = hidden.clone()
    assert torch.equal(add_rms_norm(again, None, weight, 1e-5), out)
    assert torch.equal(again, hidden)
    assert torch.equal(add_rms_norm(before[3:4], delta[3:4], weight, 1e-5), out[3:4])


@pytest.mark.parametrize(
    ("kernel", "activation"),
    [(silu_mul, F.silu), (gelu_mul, partial(F.gelu, approximate="tanh"))],
    ids=["silu", "gelu"],
)
@pytest.mark.parametrize("width", [16, 40, 1536])
def test_gated_activations(kernel: Any, activation: Any, width: int, threads: None) -> None:
    gate_up = (4 * torch.randn(5, 2 * width)).to(BF16)
    gate_up[0, :4] = torch.tensor([0.0, -120.0, 120.0, -88.0])
    gate, up = gate_up.double().chunk(2, -1)
    out = kernel(gate_up)
    assert error_ratio(out, activation(gate) * up) < MAX_ERROR
    assert torch.equal(kernel(gate_up[2:3]), out[2:3])


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("width", [16, 40, 1536])
def test_clamped_swiglu(width: int, dtype: torch.dtype, threads: None) -> None:
    gate_up = (4 * torch.randn(5, 2 * width)).to(dtype)
    gate_up[0, :6] = torch.tensor([0.0, -120.0, 120.0, 3.0, -88.0, 120.0])
    gate, up = gate_up[:, ::2].double().clamp(max=5.5), gate_up[:, 1::2].double().clamp(-5.5, 5.5)
    out = clamped_swiglu(gate_up, 1.7, 5.5)
    exact = (up + 1) * gate * (1.7 * gate).sigmoid()
    assert error_ratio(out, exact) < (MAX_ERROR if dtype == BF16 else 1e-6)
    assert torch.equal(clamped_swiglu(gate_up[2:3], 1.7, 5.5), out[2:3])
    gate_up[0, :4] = torch.nan
    assert clamped_swiglu(gate_up, 1.7, 5.5)[0].isnan().nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("pairs", [5, 16, 24, 48])
def test_partially_rotated_heads(pairs: int, is_interleaved: bool, threads: None) -> None:
    heads, kv_heads, dim = 3, 1, 96
    qkv = torch.randn(6, heads + 2 * kv_heads, dim).to(BF16)
    angles = 10 * torch.rand(6, pairs)
    slots = torch.tensor([3, 5, 7, 11, 0, 2])
    keys, values = (torch.zeros(1, 16, kv_heads, dim, dtype=BF16) for _ in range(2))
    arguments = qkv, angles.cos(), angles.sin(), slots, keys, values
    q = rope_kv_write(*arguments, is_interleaved=is_interleaved)
    exact = qkv.double()
    turned = torch.polar(torch.ones(6, 1, pairs).double(), angles.double().unsqueeze(1))
    for i in range(pairs):
        at = [2 * i, 2 * i + 1] if is_interleaved else [i, i + pairs]
        both = torch.complex(exact[..., at[0]], exact[..., at[1]]) * turned[..., i]
        exact[..., at] = torch.stack((both.real, both.imag), -1)
    assert error_ratio(q, exact[:, :heads]) < 1e-6
    assert torch.equal(q[..., 2 * pairs :], qkv[:, :heads, 2 * pairs :].float())
    assert error_ratio(keys.flatten(0, 1)[slots], exact[:, heads : heads + kv_heads]) < MAX_ERROR
    cos, sin = (each[2:3].contiguous() for each in arguments[1:3])
    alone = rope_kv_write(
        qkv[2:3], cos, sin, slots[2:3], keys, values, is_interleaved=is_interleaved
    )
    assert torch.equal(alone[0], q[2])


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_rope_rotates_and_stores(heads: int, kv_heads: int, dim: int, threads: None) -> None:
    qkv = torch.randn(6, heads + 2 * kv_heads, dim).to(BF16)
    angles = 10 * torch.rand(6, dim // 2)
    slots = torch.tensor([33, 5, 47, 16, 17, 0])
    keys, values = (torch.zeros(3, 16, kv_heads, dim, dtype=BF16) for _ in range(2))
    q = rope_kv_write(qkv, angles.cos(), angles.sin(), slots, keys, values)
    first, second = qkv.double().chunk(2, -1)
    cos, sin = angles.double().cos().unsqueeze(1), angles.double().sin().unsqueeze(1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    assert error_ratio(q, rotated[:, :heads]) < 1e-6
    stored = keys.flatten(0, 1)[slots]
    assert error_ratio(stored, rotated[:, heads : heads + kv_heads]) < MAX_ERROR
    assert torch.equal(values.flatten(0, 1)[slots], qkv[:, heads + kv_heads :])
    untouched = [i for i in range(48) if i not in slots.tolist()]
    assert not keys.flatten(0, 1)[untouched].any()


def test_the_exponential_is_exact_to_float32() -> None:
    """Tested through silu_mul, which computes x / (1 + e^-x)."""
    x = torch.linspace(-80, 80, 4096).to(BF16)
    out = silu_mul(torch.cat((x, torch.ones_like(x))).view(1, -1))
    assert error_ratio(out[0], F.silu(x.double())) < 2.4e-3
