"""A whole decode step on the compiled kernels, launched by the server's own executor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_traffic import HALF, error_ratio
from ptx.addresses import address_of
from ptx.launcher import bench_module

from turret.server.adapters.device import gpu_slot_tables as slot_tables
from turret.server.adapters.device import gpu_uploads as uploads

# Rows 0, 1 and 3 have adapters, two of them the same one; row 2 uses the base model.
SLOT_OF_ROW = (1, 2, 0, 1)
CONTEXT = 37
# The bound on errors: a layer rounds about ten times.
BOUND = {torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def make_step(hidden: int) -> Any:
    model = bench_module("cuda.kernel_launches").Model(
        hidden=hidden, heads=4, kv_heads=2, head_dim=hidden // 4, inner=3 * hidden, vocab=128
    )
    make = bench_module("cuda.step").DecodeStep
    return make(model, 1, len(SLOT_OF_ROW), CONTEXT, HALF, torch.device("cpu"))


@pytest.fixture(autouse=True)
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Map the memory at the addresses in slot tables into the emulator."""

    def apart(found: Any, kept: list[torch.Tensor], *more: Any) -> list[int]:
        places = uploads.apart(found, kept, *more)
        for tensor in kept:
            address_of(tensor)
        return places

    monkeypatch.setattr(slot_tables, "apart", apart)


def adapters_of(step: Any, method: str) -> list[Any]:
    """An adapter or None per row; the step then has room for them."""
    scenario = bench_module("cuda.step").Scenario(method, SLOT_OF_ROW, (12, 64), method)
    made = step.adapters(scenario)
    step.forget(made)
    return [made[slot - 1] if slot else None for slot in SLOT_OF_ROW]


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
def test_a_step_repeats_its_bits_and_leaves_base_rows_alone(method):
    step = make_step(64)
    adapted = step.plan(adapters_of(step, method))
    first = step.run(adapted).logits.clone()
    assert torch.isfinite(first).all()
    assert torch.equal(step.run(adapted).logits, first)
    alone = step.run(step.plan([None] * len(SLOT_OF_ROW))).logits
    assert torch.equal(first[2], alone[2]), "a base row depends on its mates"
    for row in (0, 1, 3):
        assert not torch.equal(first[row], alone[row])


@pytest.mark.parametrize("hidden", [64, 320, pytest.param(1024, marks=pytest.mark.long)])
def test_a_step_against_float64(hidden):
    step = make_step(hidden)
    adapters = adapters_of(step, "lora")
    logits = step.run(step.plan(adapters)).logits
    exact = torch.stack([exact_row(step, row, adapter) for row, adapter in enumerate(adapters)])
    assert error_ratio(logits, exact) < BOUND[HALF]


def exact_row(step: Any, row: int, adapter: Any) -> torch.Tensor:
    """The logits of one row in float64, by plain operations."""
    decoder = step._decoder
    (layer,), arch = decoder.layers, decoder.arch
    slices = arch.linears()

    def project(group: str, x: torch.Tensor) -> torch.Tensor:
        base = getattr(layer, group).base.product
        y = base._weight.dequantize(torch.float32).double() @ x
        if adapter is None:
            return y
        low_rank = [adapter.operators.modules[f"model.layers.0.{p}"].low_rank
                    for p, _, _ in slices[group]]  # fmt: skip
        return y + torch.cat([f.b.double().T @ (f.a.double() @ x) for f in low_rank])

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean() + arch.rms_norm_eps).rsqrt()

    (rope,) = arch.ropes.values()
    angles = CONTEXT * rope.inv_freq.double()

    def turn(heads: torch.Tensor) -> torch.Tensor:
        first, second = heads.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    hidden = decoder.embedding[row % arch.vocab_size].double()
    width, kv_heads = arch.head_dim, arch.num_kv_heads
    qkv = project("qkv", norm(hidden)).view(-1, width)
    q = turn(qkv[: arch.num_heads])
    new = turn(qkv[arch.num_heads : -kv_heads]), qkv[-kv_heads:]
    keys, values = (
        torch.cat((held[0, step._blocks[row]].flatten(0, 1)[:CONTEXT].double(), added[None]))
        for held, added in zip((step.cache.keys, step.cache.values), new, strict=True)
    )
    attended = []
    for head in range(arch.num_heads):
        of = head // (arch.num_heads // kv_heads)
        scores = keys[:, of] @ q[head] * width**-0.5
        attended.append(scores.softmax(0) @ values[:, of])
    hidden = hidden + project("o", torch.cat(attended))
    gate, up = project("gate_up", norm(hidden)).chunk(2)
    hidden = hidden + project("down", F.silu(gate) * up)
    return decoder.head.double() @ norm(hidden)
