"""The small fused kernels between projections and attention, compared with their references.

Planted faults, and the number of tests that each of them fails (tried by hand):

- mean over the padded width: 4
- residual not stored: 6
- up replaced by gate: 6
- only the first block of columns: 2
- sine's sign: 8
- key norm skipped: 4
- values written a row further: all (the interpreter crashes)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_traffic import DEVICE, DTYPES, error_ratio, rope_kv_write_reference

from turret.kernels.between import (
    clamped_swiglu_reference,
    residual_rms_norm_reference,
)
from turret.kernels.gpu.activations import clamped_swiglu, gelu_mul, silu_mul
from turret.kernels.gpu.rms_norm import residual_rms_norm
from turret.kernels.gpu.rope_kv_write import KvWrite, rope_kv_write
from turret.kernels.rows.elementwise import row_clamped_swiglu

BOUND = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


@pytest.mark.parametrize("width", [64, 100, 576])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_rms_norm(width, dtype):
    residual, update = (torch.randn(5, width).to(DEVICE, dtype) for _ in range(2))
    # The decoders' norms are fp32.
    weight = torch.randn(width).to(DEVICE, torch.float32 if width == 100 else dtype)
    total = residual + update
    exact = total.double() * (total.double().pow(2).mean(1, keepdim=True) + 1e-5).rsqrt()
    exact = exact * weight.double()
    mine, theirs = residual.clone(), residual.clone()
    out = residual_rms_norm(mine, update, weight, 1e-5)
    reference = residual_rms_norm_reference(theirs, update, weight, 1e-5)
    assert torch.equal(mine, total)
    assert torch.equal(theirs, total)
    assert error_ratio(out, exact) < BOUND[dtype]
    assert error_ratio(reference, exact) < BOUND[dtype]
    again = residual_rms_norm(mine, None, weight, 1e-5)
    assert torch.equal(again, out)
    assert torch.equal(mine, total)


@pytest.mark.parametrize("width", [33, 1024, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(width, dtype):
    wide = torch.randn(3, 2 * width + 3).to(DEVICE, dtype)
    gate_up = wide[:, : 2 * width]
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = gate * gate.sigmoid() * up
    assert error_ratio(silu_mul(gate_up), exact) < BOUND[dtype]


@pytest.mark.parametrize("width", [33, 1024, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_mul(width, dtype):
    wide = torch.randn(3, 2 * width + 3).to(DEVICE, dtype)
    gate_up = wide[:, : 2 * width]
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = F.gelu(gate, approximate="tanh") * up
    assert error_ratio(gelu_mul(gate_up), exact) < BOUND[dtype]


@pytest.mark.parametrize("width", [33, 1024, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clamped_swiglu(width, dtype):
    """Alternating gates from below the limit to above it, and ups on both sides."""
    wide = (3 * torch.randn(3, 2 * width + 3)).to(DEVICE, dtype)
    gate_up = wide[:, : 2 * width]
    gate, up = gate_up[:, ::2].double().clamp(max=2.5), gate_up[:, 1::2].double().clamp(-2.5, 2.5)
    exact = (up + 1) * gate * (1.7 * gate).sigmoid()
    for formulation in (clamped_swiglu, clamped_swiglu_reference, row_clamped_swiglu):
        assert error_ratio(formulation(gate_up, 1.7, 2.5), exact) < BOUND[dtype]
    alone = clamped_swiglu(gate_up[1:2], 1.7, 2.5)
    assert torch.equal(alone, clamped_swiglu(gate_up, 1.7, 2.5)[1:2])
    gate_up[0, :4] = torch.nan
    assert clamped_swiglu(gate_up, 1.7, 2.5)[0].isnan().nonzero().flatten().tolist() == [0, 1]


def fused(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    is_interleaved: bool = False,
    **norms: Any,
) -> torch.Tensor:
    """``rope_kv_write`` with the arguments of its reference."""
    write = KvWrite(
        cos=cos,
        sin=sin,
        kv_slots=kv_slots,
        k_cache=k_cache,
        v_cache=v_cache,
        is_interleaved=is_interleaved,
    )
    return rope_kv_write(qkv, write, **norms)


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("pairs", [3, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_partially_rotated_heads(pairs, is_interleaved, dtype):
    """Kernel and reference are compared with complex numbers in float64."""
    heads, kv_heads, rows, head_dim = 3, 1, 4, 64
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(DEVICE, dtype)
    angles = torch.randn(rows, pairs, device=DEVICE)
    slots = torch.tensor([3, 9, 15, 0], device=DEVICE)
    norms: dict[str, Any] = {
        k: torch.rand(head_dim, device=DEVICE) + 0.5 for k in ("q_norm", "k_norm")
    }
    exact = qkv.double().view(rows, -1, head_dim)[:, : heads + kv_heads]
    exact = exact * (exact.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    exact[:, :heads] *= norms["q_norm"].double()
    exact[:, heads:] *= norms["k_norm"].double()
    turn = torch.polar(torch.ones_like(angles).double(), angles.double())
    for i in range(pairs):
        at = [2 * i, 2 * i + 1] if is_interleaved else [i, i + pairs]
        both = torch.complex(exact[..., at[0]], exact[..., at[1]]) * turn[:, i, None]
        exact[..., at] = torch.stack((both.real, both.imag), -1)
    for kernel in (fused, rope_kv_write_reference):
        keys, values = (
            torch.zeros(4, 4, kv_heads, head_dim, device=DEVICE, dtype=dtype) for _ in range(2)
        )
        cos, sin = angles.cos(), angles.sin()
        q = kernel(qkv, cos, sin, slots, keys, values, is_interleaved=is_interleaved, **norms)
        assert error_ratio(q, exact[:, :heads]) < BOUND[dtype]
        assert error_ratio(keys.flatten(0, 1)[slots], exact[:, heads:]) < BOUND[dtype]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("head_dim", [12, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_kv_write(norms, head_dim, dtype):
    heads, kv_heads, rows = 6, 2, 5
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim + 4).to(DEVICE, dtype)
    qkv = qkv[:, : (heads + 2 * kv_heads) * head_dim]
    angles = torch.randn(rows, head_dim // 2, device=DEVICE)
    slots = torch.tensor([3, 9, 15, 0, 7], device=DEVICE)
    options: dict[str, Any] = {}
    if norms:
        options = {k: torch.randn(head_dim).to(DEVICE, dtype) for k in ("q_norm", "k_norm")}
    caches = [torch.zeros(4, 4, kv_heads, head_dim, device=DEVICE, dtype=dtype) for _ in range(4)]
    q = fused(qkv, angles.cos(), angles.sin(), slots, *caches[:2], **options)
    expected = rope_kv_write_reference(
        qkv.contiguous(), angles.cos(), angles.sin(), slots, *caches[2:], **options
    )
    assert error_ratio(q, expected) < BOUND[dtype]
    assert error_ratio(caches[0], caches[2]) < BOUND[dtype]
    assert torch.equal(caches[1], caches[3])
    untouched = [slot for slot in range(16) if slot not in slots.tolist()]
    assert not caches[0].flatten(0, 1)[untouched].any()
