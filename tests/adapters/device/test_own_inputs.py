"""Slices of a fused projection that multiply inputs of their own, through the base's real weight.

Planted faults, and how many of the tests here each one fails (tried by hand):

- rows that need the base's own result change too: 6
- changed rows of prompts go by the whole weight: 4
- rows of prompts that do not change go slice by slice: 2
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from gpu_path import OneStepTables, use_coarse_tiles
from kernel_traffic import error_ratio
from triton.runtime.interpreter import InterpretedFunction

from turret.kernels.gpu.epilogues import Epilogue, GatedSilu, Heads
from turret.kernels.gpu.kv_write import KvWrite
from turret.kernels.gpu.shared import tuning as tuning_module
from turret.server.adapters.device.gpu.store import GpuStore
from turret.server.adapters.device.layout import ProjectionLayout, SliceShape
from turret.server.adapters.device.members import Members
from turret.server.adapters.operators.adapter_operators import (
    AdapterOperators,
    InputBlocks,
    ModuleOperators,
)
from turret.server.adapters.operators.updates import LowRank
from turret.server.models.decoding.adapted_linear import AdaptedLinear
from turret.server.models.weights.nf4 import Nf4Linear, Nf4Weight

CPU = torch.device("cpu")
INNER, HEAD_DIM = 128, 16
# Three heads of queries, one of keys and one of values; gates and ups.
OUTS = {"qkv": (48, 16, 16), "gate_up": (72, 72)}
LAYOUT = ProjectionLayout(
    2,
    {
        name: tuple(SliceShape(f"{name}.{s}", out, INNER) for s, out in enumerate(outs))
        for name, outs in OUTS.items()
    },
)
MIXES: list[Members] = [
    [],
    [("norm", 1.0)],
    [("turn", 0.5)],
    [("low", 1.0)],
    [("norm", 0.5), ("turn", -1.0)],
    [("norm", 1.0), ("low", 0.5)],
    [("last", 1.0)],
    [("second layer", 1.0)],
]
# Of these the base's result on the row's own input is scaled.
SCALED: list[Members] = [[("norm", 1.0), ("scale", 0.5)], [("turned and scaled", 1.0)]]


@dataclasses.dataclass(eq=False)
class Resident:
    key: str
    operators: AdapterOperators
    bytes_device: int = 0


def steps(*shape: int, size: float) -> torch.Tensor:
    """Small multiples of a power of two: in fp16 their products with codes add exactly."""
    return torch.randint(-2, 3, shape) * size


def operators(kind: str, out: int, dtype: torch.dtype) -> ModuleOperators:
    gain, blocks = 1 + steps(INNER, size=0.25), InputBlocks(steps(32, 4, 4, size=0.125).to(dtype))
    if kind in ("norm", "last"):
        return ModuleOperators(input_gain=gain)
    if kind in ("turn", "second layer"):
        return ModuleOperators(input_blocks=blocks)
    if kind == "low":
        factors = steps(5, INNER, size=0.125), steps(5, out, size=0.125)
        return ModuleOperators(low_rank=LowRank(*(factor.to(dtype) for factor in factors)))
    scale = 1 + steps(out, size=0.25)
    return ModuleOperators(gain=scale, input_blocks=blocks if kind != "scale" else None)


def residents(dtype: torch.dtype) -> dict[str, Resident]:
    """Of some, only the last slice or the second layer is changed."""
    found = {}
    for kind in ("norm", "turn", "low", "last", "second layer", "scale", "turned and scaled"):
        modules = {
            LAYOUT.module(layer, f"{name}.{s}"): operators(kind, out, dtype)
            for layer in range(LAYOUT.num_layers)
            for name, outs in OUTS.items()
            for s, out in enumerate(outs)
            if (kind != "last" or s == len(outs) - 1) and (kind != "second layer" or layer)
        }
        found[kind] = Resident(kind, AdapterOperators(modules))
    return found


class Projection:
    """A fused projection of the first layer, and a store with all adapters or one."""

    def __init__(
        self, name: str, dtype: torch.dtype, has_bias: bool = False, only: str = ""
    ) -> None:
        torch.manual_seed(3)
        self.name, self.dtype, self.adapters = name, dtype, residents(dtype)
        self.store = GpuStore(LAYOUT, dtype, CPU, 1 << 28)
        self.store.prepare([self.adapters[only]] if only else self.adapters.values())
        slices = [Nf4Weight.quantize(torch.randn(out, INNER)) for out in OUTS[name]]
        self.base = Nf4Linear(slices, dtype, CPU, gpu=True)
        self.bias = steps(sum(OUTS[name]), size=0.5).to(dtype) if has_bias else None
        self.linear = AdaptedLinear(0, name, self.base, self.bias)

    def rows(self, count: int) -> torch.Tensor:
        return steps(count, INNER, size=0.5).to(self.dtype)

    def __call__(
        self, x: torch.Tensor, mixes: list[Members], decode: int, end: Epilogue | None = None
    ) -> torch.Tensor:
        """A row of each mix, the first ones decoding."""
        runs = [(row, row + 1, mix) for row, mix in enumerate(mixes)]
        step = self.store.bind(runs, OneStepTables(64, CPU))
        if end is None:
            return self.linear(x, step, decode)
        return self.linear.ended(x, step, decode, end)

    def in_float64(self, x: torch.Tensor, mix: Members) -> torch.Tensor:
        """One row, ``y = G ⊙ (W x) + Σ_k w_k Δ_k(x)`` slice by slice."""
        x, results = x.double(), []
        for s, _ in enumerate(OUTS[self.name]):
            path = LAYOUT.module(0, f"{self.name}.{s}")
            weight = self.base.dequantize(s).double()
            gain, total = 1.0, torch.zeros(len(weight), dtype=torch.float64)
            for key, w in mix:
                ops = self.adapters[key].operators.modules.get(path, ModuleOperators())
                own = 1.0 if ops.gain is None else ops.gain.double()
                gain = gain + w * (own - 1.0)
                if ops.low_rank is not None:
                    total += w * (ops.low_rank.b.double().T @ (ops.low_rank.a.double() @ x))
                if ops.input_gain is not None:
                    total += w * (weight @ (x * (ops.input_gain.double() - 1)))
                if ops.input_blocks is not None:
                    turned = x @ torch.block_diag(*ops.input_blocks.blocks.double())
                    total += w * own * (weight @ turned)
            results.append(gain * (weight @ x) + total)
        y = torch.cat(results)
        return y if self.bias is None else y + self.bias.double()


@pytest.fixture(autouse=True)
def coarse_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_coarse_tiles(monkeypatch)
    yield
    monkeypatch.undo()
    tuning_module.tuning.cache_clear()


@pytest.fixture
def launched() -> Iterator[Counter[str]]:
    """Counts Triton's launches by kernel, and library products by columns."""
    counts: Counter[str] = Counter()
    original, linear = InterpretedFunction.__getitem__, F.linear

    def launch(kernel: Any, grid: Any) -> Any:
        counts[kernel.fn.__name__.removesuffix("_kernel")] += 1
        return original(kernel, grid)

    def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        counts[f"{len(weight)} columns"] += 1
        return linear(x, weight)

    with (
        patch.object(InterpretedFunction, "__getitem__", launch),
        patch.object(F, "linear", multiply),
    ):
        yield counts


@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize("decode", [0, 7, 10])
def test_rows_are_those_of_float64(name: str, decode: int) -> None:
    projection = Projection(name, torch.float32, has_bias=True)
    mixes = [*MIXES, *SCALED]
    x = projection.rows(len(mixes))
    found = projection(x, mixes, decode)
    for row, mix in enumerate(mixes):
        assert error_ratio(found[row], projection.in_float64(x[row], mix)) < 2e-6, mix


@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize("way", ["decode", "prompts"])
def test_a_row_has_the_bits_that_it_has_alone(name: str, way: str) -> None:
    """Whether its neighbours change their inputs, are scaled besides, or neither."""
    projection = Projection(name, torch.float16 if way == "decode" else torch.float32)
    mixes, decodes = [*MIXES, *SCALED], way == "decode"
    x = projection.rows(len(mixes))
    alone = [projection(x[i : i + 1], [mix], int(decodes))[0] for i, mix in enumerate(mixes)]
    for rows in ([3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3], [6, 0, 3], range(len(mixes))):
        chosen = [mixes[row] for row in rows]
        together = projection(x[list(rows)], chosen, len(chosen) if decodes else 0)
        for found, row in zip(together, rows, strict=True):
            assert torch.equal(found, alone[row]), (mixes[row], rows)


@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bits_in_a_layer_that_an_adapter_leaves_alone(name: str, dtype: torch.dtype) -> None:
    """Its blocks share a shelf with another's, which has some there."""
    key = "second layer"
    full, alone = Projection(name, dtype), Projection(name, dtype, only=key)
    x, decode = full.rows(3), 3 if dtype == torch.float16 else 0
    mixes: list[Members] = [[(key, 1.0)]] * 3
    assert torch.equal(full(x, mixes, decode), alone(x, mixes, decode))


@pytest.mark.parametrize("name", OUTS)
def test_decoding_rows_read_the_weight_once(name: str, launched: Counter[str]) -> None:
    projection = Projection(name, torch.float16)
    x, slices = projection.rows(3), len(OUTS[name])
    launched.clear()
    projection(x[:2], MIXES[:2], 2)
    assert launched == {"input_gain": 1, "nf4_matmul": 1}
    launched.clear()
    # A launch for each slice with blocks.
    projection(x, MIXES[:3], 3)
    assert launched == {"input_gain": 1, "input_blocks": slices, "nf4_matmul": 1}
    launched.clear()
    projection(x, [*MIXES[:2], MIXES[3]], 3)
    plain = {"nf4_matmul": 1, "segmented_shrink": 1, "segmented_expand": 1}
    assert launched == {"input_gain": 1, **plain}
    launched.clear()
    # One of them needs the base's result as it is: its change goes through each slice besides.
    projection(x, [*MIXES[:2], SCALED[0]], 3)
    assert launched == {"input_gain": 2, "nf4_matmul": 1 + slices, "segmented_expand": 1}


@pytest.mark.parametrize("name", OUTS)
def test_prompts_multiply_parts_of_the_weight(name: str, launched: Counter[str]) -> None:
    projection = Projection(name, torch.float32)
    outs = OUTS[name]
    x = projection.rows(6)
    launched.clear()
    projection(x, [[], MIXES[1], [], MIXES[2], MIXES[5], []], 0)
    own = Counter(f"{out} columns" for out in outs)
    assert launched["nf4_dequantize"] == 1
    assert {k: n for k, n in launched.items() if "columns" in k} == {
        f"{sum(outs)} columns": 1,
        **own,
    }
    launched.clear()
    projection(x, [MIXES[1]] * 6, 0)
    assert {k: n for k, n in launched.items() if "columns" in k} == own


def make_heads(rows: int) -> Heads:
    caches = torch.zeros(2, 8, 4, 1, HEAD_DIM, dtype=torch.float16)
    angles = torch.randn(rows, HEAD_DIM // 2)
    write = KvWrite(
        cos=angles.cos(),
        sin=angles.sin(),
        kv_slots=torch.randperm(32)[:rows],
        k_cache=caches[0],
        v_cache=caches[1],
    )
    return Heads(write=write)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("mixes", [MIXES[:3], [*MIXES[:7]], [*MIXES[:2], SCALED[0]]])
def test_heads_are_turned_where_the_product_or_the_updates_end(
    mixes: list[Members], has_bias: bool, launched: Counter[str]
) -> None:
    projection = Projection("qkv", torch.float16, has_bias)
    x, heads = projection.rows(len(mixes)), make_heads(len(mixes))
    launched.clear()
    q = projection(x, mixes, len(mixes), heads)
    (end,) = launched.keys() & {"nf4_rotate", "expand_rotated", "rope_kv_write"}
    scaled = SCALED[0] in mixes
    assert end == (
        "rope_kv_write" if scaled else "expand_rotated" if len(mixes) > 3 else "nf4_rotate"
    )
    stored = heads.write.k_cache.clone(), heads.write.v_cache.clone()
    expected = heads(projection(x, mixes, len(mixes)))
    assert torch.equal(q, expected)
    assert torch.equal(heads.write.k_cache, stored[0])
    assert torch.equal(heads.write.v_cache, stored[1])
    assert stored[0].any()


@pytest.mark.parametrize("mixes", [MIXES[:3], [*MIXES[:7]]])
def test_gates_end_where_the_product_or_the_updates_end(
    mixes: list[Members], launched: Counter[str]
) -> None:
    projection = Projection("gate_up", torch.float16)
    x = projection.rows(len(mixes))
    launched.clear()
    found = projection(x, mixes, len(mixes), GatedSilu())
    assert ("expand_gated" in launched) == (len(mixes) > 3)
    assert "silu_mul" not in launched
    assert torch.equal(found, GatedSilu()(projection(x, mixes, len(mixes))))
