"""The operations between products, in Triton, in C and in torch, compared with float64.

Each of these faults was planted once, in Triton or in C, and made tests fail: a mean over the
padded width, a residual that is not stored, up replaced by gate, only the first block of columns, a
sine of the other sign, a skipped key norm, values written one row too far, an eps 1000 times too
large, truncation to bf16, an unbounded exponential.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_traffic import DEVICE, DTYPES, HALF, error_ratio, rotated

from turret.kernels import cpu as native
from turret.kernels.cpu import layers
from turret.kernels.gpu import activations
from turret.kernels.gpu.rms_norm import residual_rms_norm
from turret.kernels.gpu.rope_kv_write import KvWrite, rope_kv_write
from turret.kernels.rows import (
    clamped_swiglu_reference,
    residual_rms_norm_reference,
    row_clamped_swiglu,
)

BOUND = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}


def in_triton(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    is_interleaved: bool,
    **norms: Any,
) -> torch.Tensor:
    """Triton's kernel with the arguments of the C kernel, for strided rows."""
    wide = torch.zeros(len(qkv), qkv[0].numel() + 4, dtype=qkv.dtype, device=DEVICE)
    rows = wide[:, :-4].copy_(qkv.flatten(1))
    write = KvWrite(
        cos=cos,
        sin=sin,
        kv_slots=slots,
        k_cache=keys,
        v_cache=values,
        is_interleaved=is_interleaved,
    )
    return rope_kv_write(rows, write, **norms)


TRITON = SimpleNamespace(
    language="Triton",
    norm=residual_rms_norm,
    silu=activations.silu_mul,
    gelu=activations.gelu_mul,
    swiglu=activations.clamped_swiglu,
    heads=in_triton,
    normed_heads=in_triton,
)
C = SimpleNamespace(
    language="C",
    norm=layers.add_rms_norm,
    silu=layers.silu_mul,
    gelu=layers.gelu_mul,
    swiglu=layers.clamped_swiglu,
    heads=layers.rope_kv_write,
)
IN_C = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
ACTIVATIONS = {"silu": F.silu, "gelu": partial(F.gelu, approximate="tanh")}
REFERENCE = SimpleNamespace(
    language="torch", norm=residual_rms_norm_reference, swiglu=clamped_swiglu_reference
)
ROWS = SimpleNamespace(language="torch", swiglu=row_clamped_swiglu)
PATHS: list[tuple[Any, Any, int | None]] = [
    *((TRITON, dtype, None) for dtype in DTYPES),
    *((C, torch.bfloat16, threads) for threads in (1, 3)),
    (REFERENCE, HALF, None),
    (ROWS, torch.float32, None),
]


def paths(*names: str) -> Any:
    """Parametrise a test over operations and the paths that have them."""
    found = []
    for name in names:
        for kernels, dtype, threads in PATHS:
            if hasattr(kernels, name):
                marks = getattr(dtype, "marks", IN_C if kernels is C else ())
                own = getattr(dtype, "values", (dtype,))[0]
                label = f"{name} in {kernels.language}, {own}, {threads}"
                found.append(pytest.param(name, (kernels, own, threads), marks=marks, id=label))
    return pytest.mark.parametrize(("name", "path"), found, indirect=["path"])


@pytest.fixture
def path(request: pytest.FixtureRequest) -> Iterator[tuple[Any, torch.dtype]]:
    """The kernels and their dtype."""
    kernels, dtype, threads = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    yield kernels, dtype
    torch.set_num_threads(before)


Path = tuple[Any, torch.dtype]


@pytest.mark.parametrize("width", [64, 75, 576])
@paths("norm")
def test_norm_adds_the_residual_and_rounds_once(width: int, name: str, path: Path) -> None:
    norm, dtype = path[0].norm, path[1]
    # Values that are small enough for eps to matter.
    hidden, delta = ((3e-3 * torch.randn(9, width)).to(DEVICE, dtype) for _ in range(2))
    weight, before = torch.randn(width, device=DEVICE), hidden.clone()
    out = norm(hidden, delta, weight, 1e-5)
    assert torch.equal(hidden, before + delta)
    scale = (hidden.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert error_ratio(out, hidden.double() * scale * weight.double()) < BOUND[dtype]
    again = hidden.clone()
    assert torch.equal(norm(again, None, weight, 1e-5), out)
    assert torch.equal(again, hidden)
    assert torch.equal(norm(before[3:4], delta[3:4], weight, 1e-5), out[3:4])


# The interpreter computes with numpy, which warns of an exponential that overflows.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@paths("silu", "gelu")
@pytest.mark.parametrize("width", [16, 33, 40, 1536])
def test_gated_activations(width: int, name: str, path: Path) -> None:
    gated, dtype = getattr(path[0], name), path[1]
    wide = (4 * torch.randn(5, 2 * width + 3)).to(DEVICE, dtype)
    gate_up = wide[:, : 2 * width] if path[0] is TRITON else wide[:, : 2 * width].contiguous()
    gate_up[0, :4] = torch.tensor([0.0, -120.0, 120.0, -88.0])
    gate, up = gate_up.double().chunk(2, -1)
    out = gated(gate_up)
    assert error_ratio(out, ACTIVATIONS[name](gate) * up) < BOUND[dtype]
    assert torch.equal(gated(gate_up[2:3]), out[2:3])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("width", [16, 33, 40, 1536])
@paths("swiglu")
def test_clamped_swiglu(width: int, name: str, path: Path) -> None:
    """Alternating gates from below the limit to above it, and ups on both sides."""
    swiglu, dtype = path[0].swiglu, path[1]
    gate_up = (4 * torch.randn(5, 2 * width)).to(DEVICE, dtype)
    gate_up[0, :6] = torch.tensor([0.0, -120.0, 120.0, 3.0, -88.0, 120.0])
    gate, up = gate_up[:, ::2].double().clamp(max=5.5), gate_up[:, 1::2].double().clamp(-5.5, 5.5)
    out = swiglu(gate_up, 1.7, 5.5)
    assert error_ratio(out, (up + 1) * gate * (1.7 * gate).sigmoid()) < BOUND[dtype]
    assert torch.equal(swiglu(gate_up[2:3], 1.7, 5.5), out[2:3])
    gate_up[0, :4] = torch.nan
    assert swiglu(gate_up, 1.7, 5.5)[0].isnan().nonzero().flatten().tolist() == [0, 1]


# Heads, KV heads, the width of a head, and the rotated pairs.
HEADS = [
    *((3, 1, 96, 5), (3, 1, 64, 16), (3, 1, 96, 24), (3, 1, 96, 48), (9, 3, 64, 32)),
    *((4, 4, 32, 16), (8, 1, 96, 48), (2, 2, 128, 64), (14, 2, 256, 128)),
]


@paths("heads", "normed_heads")
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "pairs"), HEADS)
def test_heads_are_rotated_and_stored(
    heads: int, kv_heads: int, dim: int, pairs: int, is_interleaved: bool, name: str, path: Path
) -> None:
    rotate, dtype = path[0].heads, path[1]
    norms: dict[str, Any] = {}
    qkv = torch.randn(6, heads + 2 * kv_heads, dim).to(DEVICE, dtype)
    exact = qkv.double()
    if name == "normed_heads":
        norms = {k: torch.rand(dim, device=DEVICE) + 0.5 for k in ("q_norm", "k_norm")}
        exact = exact * (exact.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        exact[:, :heads] *= norms["q_norm"].double()
        exact[:, heads:-kv_heads] *= norms["k_norm"].double()
    angles = 10 * torch.rand(6, pairs, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.tensor([33, 5, 47, 16, 17, 0], device=DEVICE)
    keys, values = (torch.zeros(3, 16, kv_heads, dim, dtype=dtype, device=DEVICE) for _ in range(2))
    q = rotate(qkv, cos, sin, slots, keys, values, is_interleaved=is_interleaved, **norms)
    turned = rotated(exact, cos, sin, is_interleaved=is_interleaved)
    assert error_ratio(q, turned[:, :heads]) < BOUND[q.dtype]
    assert error_ratio(keys.flatten(0, 1)[slots], turned[:, heads:-kv_heads]) < BOUND[dtype]
    assert torch.equal(values.flatten(0, 1)[slots], qkv[:, -kv_heads:])
    untouched = [slot for slot in range(48) if slot not in slots.tolist()]
    assert not keys.flatten(0, 1)[untouched].any()
    one = slice(2, 3)
    alone = rotate(
        *(qkv[one], cos[one].contiguous(), sin[one].contiguous(), slots[one], keys, values),
        is_interleaved=is_interleaved,
        **norms,
    )
    assert torch.equal(alone[0], q[2])


@IN_C
def test_the_exponential_is_exact_to_float32() -> None:
    """Tested through silu_mul, which computes x / (1 + e^-x)."""
    x = torch.linspace(-80, 80, 4096).bfloat16()
    out = layers.silu_mul(torch.cat((x, torch.ones_like(x))).view(1, -1))
    assert error_ratio(out[0], F.silu(x.double())) < 2.4e-3
