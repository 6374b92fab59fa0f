"""Every pair of operators in one mix and in one adapter, on every path, compared with float64.

The sum is that of ``docs/adapters.md``: ``y = G ⊙ (W x) + b + Σ_k w_k Δ_k(x)``. All pairs are rows
of one step, as single rows and as segments, so each is computed in the same step as all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations, combinations_with_replacement, pairwise
from typing import Any

import pytest
import torch
from builders.facts import Resident, resident
from gpu_path import OneStepTables
from kernel_traffic import circulant, error_ratio
from torch import Tensor

from turret.kernels.cpu.native import library
from turret.server.adapters.device.cpu.store import CpuStore
from turret.server.adapters.device.gpu.store import GpuStore
from turret.server.adapters.device.reference import ReferenceStore
from turret.server.adapters.device.store import Members, ProjectionLayout, SliceShape, StepMembers
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.circulant import Circulant
from turret.server.adapters.operators.dense import Dense
from turret.server.adapters.operators.gate import Gate, PrototypeScore, QueryScore
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.input_blocks import InputBlocks
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.modulated_base import ModulatedBase
from turret.server.adapters.operators.pair_rotation import PairRotation
from turret.server.adapters.operators.sparse import Sparse
from turret.server.models.decoding.adapted_linear import AdaptedLinear
from turret.server.models.weights.base_linear import BaseLinear

CPU = torch.device("cpu")
INNER = 64
OUTS = {"gate_up": (96, 32), "down": (64,)}
LAYOUT = ProjectionLayout(
    1,
    {
        name: tuple(SliceShape(f"{name}.{s}", out, INNER) for s, out in enumerate(outs))
        for name, outs in OUTS.items()
    },
)
KINDS = (
    *(
        "low_rank",
        "hadamard",
        "kronecker",
        "sparse",
        "gate",
        "circulant",
        "dense",
        "modulated",
        "input_blocks",
    ),
    *("input_blocks", "pairs", "gain", "input_gain", "bias"),
)
NOT_TOGETHER = [{"gain", "input_gain"}] + [
    set(pair) for pair in combinations(("input_gain", "input_blocks", "pairs"), 2)
]
# The number of rows of each mix in a segment, which makes it a long one.
SEGMENT = 9


def operators_of(kind: str, out: int, dtype: torch.dtype) -> Any:
    def noise(*shape: int) -> Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

    if kind == "low_rank":
        return LowRank(noise(5, INNER), noise(5, out))
    if kind == "hadamard":
        return Hadamard(noise(out, 3), noise(3, INNER), noise(out, 3), noise(3, INNER))
    if kind == "kronecker":
        return Kronecker(noise(8, 4), (noise(out // 8, 2), noise(2, INNER // 4)))
    if kind == "sparse":
        # Some rows have no entries, others have many; one input occurs twice.
        rows, columns = torch.randint(0, out, (90,)).sort().values, torch.randint(0, INNER, (90,))
        starts = torch.searchsorted(rows, torch.arange(out + 1)).to(torch.int32)
        return Sparse(noise(90, 1)[:, 0], columns.to(torch.uint16), starts)
    if kind == "gate":
        score = QueryScore(noise(4, INNER), torch.randn(16, 4))
        return Gate(noise(16, INNER), noise(16, out), score, (0, 6, 16))
    if kind == "router":
        score = PrototypeScore(torch.randn(3, INNER), 2, 0.7)
        return Gate(noise(16, INNER), noise(16, out), score, (0, 4, 9, 16))
    if kind == "input_blocks":
        return InputBlocks(0.5 * noise(INNER // 4, 4, 4))
    if kind == "circulant":
        return Circulant(noise(out // 16, INNER // 16, 16) / (INNER / 16) ** 0.5)
    if kind == "dense":
        return Dense(noise(out, INNER))
    if kind == "modulated":
        # A rank takes a launch of the base here, and time in the interpreter.
        rank = 1 if dtype == torch.float32 else 3
        factors = torch.randn(rank, INNER), torch.randn(rank, out)
        return ModulatedBase(*(factor.to(dtype) for factor in factors))
    if kind == "pairs":
        return PairRotation(0.5 * torch.randn(out), 8)
    if kind == "bias":
        return torch.randn(out)
    return 1 + 0.5 * torch.randn(INNER if kind == "input_gain" else out)


# The kinds "router" and "gate" set the same field: all gates of an adapter use the same score.
FIELDS = {"router": "gate"}


def adapter_of(kinds: Sequence[str], dtype: torch.dtype) -> AdapterOperators:
    return AdapterOperators(
        {
            LAYOUT.module(0, f"{name}.{s}"): ModuleOperators(
                **{FIELDS.get(kind, kind): operators_of(kind, out, dtype) for kind in kinds}
            )
            for name, outs in OUTS.items()
            for s, out in enumerate(outs)
        }
    )


def residents(dtype: torch.dtype) -> dict[str, Resident]:
    """Two adapters with each operator, and one with each pair that an adapter may combine."""
    kinds = {f"{kind} {number}": (kind,) for kind in KINDS for number in (1, 2)}
    kinds |= {
        " and ".join(pair): pair for pair in combinations(KINDS, 2) if set(pair) not in NOT_TOGETHER
    }
    kinds["gate 2"] = ("router",)
    return {key: resident(key, adapter_of(pair, dtype)) for key, pair in kinds.items()}


def mixes(adapters: dict[str, Resident]) -> list[Members]:
    pairs = combinations_with_replacement(KINDS, 2)
    two = [((f"{a} 1", 0.7), (f"{b} 2", -0.6)) for a, b in pairs]
    return [*two, *(((key, 0.8),) for key in adapters if " and " in key)]


def in_float64(
    weight: Tensor, bias: Tensor, mix: Sequence[tuple[ModuleOperators, float]], x: Tensor
) -> Tensor:
    """The documented sum for one module."""
    weight, x = weight.double(), x.double()
    y = x @ weight.T
    gain = sum((w * (ops.gain.double() - 1) for ops, w in mix if ops.gain is not None), 1.0)
    return gain * y + bias.double() + sum(w * _change(weight, ops, x) for ops, w in mix)


def _change(weight: Tensor, ops: ModuleOperators, x: Tensor) -> Tensor:
    total = torch.zeros(len(x), len(weight), dtype=torch.float64)
    if ops.low_rank is not None:
        total += x @ (ops.low_rank.b.double().T @ ops.low_rank.a.double()).T
    if (loha := ops.get(Hadamard)) is not None:
        w1a, w1b, w2a, w2b = (factor.double() for factor in loha.tensors())
        total += x @ ((w1a @ w1b) * (w2a @ w2b)).T
    if (lokr := ops.get(Kronecker)) is not None:
        w1, left, right = (factor.double() for factor in lokr.tensors())
        total += x @ torch.kron(w1, left @ right).T
    if (entries_of := ops.get(Sparse)) is not None:
        entries = torch.zeros_like(weight)
        places = entries_of.rows(), entries_of.columns.long()
        total += x @ entries.index_put_(places, entries_of.values.double(), accumulate=True).T
    if (gated := ops.get(Gate)) is not None:
        a, b = gated.a.double(), gated.b.double()
        parts = [slice(*ends) for ends in pairwise(gated.rank_indptr)]
        v = x @ a.T
        alphas = _alphas(gated, parts, v, x)
        for k, p in enumerate(parts):
            total += alphas[:, k : k + 1] * (v[:, p] @ b[p])
    if (turned := ops.get(InputBlocks)) is not None:
        change = x @ torch.block_diag(*turned.blocks.double()) @ weight.T
        total += change if ops.gain is None else change * ops.gain.double()
    if (circles := ops.get(Circulant)) is not None:
        total += x @ circulant(circles.kernel.double()).T
    if (whole := ops.get(Dense)) is not None:
        total += x @ whole.weight.double().T
    if (hira := ops.get(ModulatedBase)) is not None:
        total += x @ (weight * (hira.b.double().T @ hira.a.double())).T
    if (paired := ops.get(PairRotation)) is not None:
        first, second = (x @ weight.T).unflatten(1, (-1, 2, 4)).unbind(2)
        total += paired.sine.double() * torch.stack((second, first), 2).flatten(1)
    if ops.input_gain is not None:
        total += (x * (ops.input_gain.double() - 1)) @ weight.T
    return total if ops.bias is None else total + ops.bias.double()


def _alphas(gate: Gate, parts: Sequence[slice], v: Tensor, x: Tensor) -> Tensor:
    score = gate.score
    if isinstance(score, QueryScore):
        q = x @ score.query.double().T
        scores = [(v[:, p] @ score.keys[p].double() * q).sum(1) for p in parts]
        return torch.stack(scores, 1).softmax(1)
    assert isinstance(score, PrototypeScore)
    scores = (x @ score.prototypes.double().T).abs()
    least = scores.topk(score.top_k).values[:, -1:]
    return (scores / score.temperature).masked_fill(scores < least, -torch.inf).softmax(1)


class Product:
    """The product with a base, as on the GPU path."""

    def __init__(self, base: Base) -> None:
        self._base = base

    def with_shrink(self, x: Tensor, num_decode: int, shrink: Any) -> tuple[Tensor, Tensor]:
        return self._base(x), shrink(x)


class Base(BaseLinear):
    """A dense weight, ``[out, in]``.

    Rows are multiplied one at a time, so that their bits are independent.
    """

    def __init__(self, weight: Tensor, slices: tuple[int, ...]) -> None:
        self.widths, self.in_features = (len(weight),), weight.shape[1]
        self._weight, self._slices = weight, slices
        self.product = Product(self)

    def __call__(self, x: Tensor, ahead: object = None, num_decode: int | None = None) -> Tensor:
        return torch.cat([row @ self._weight.T for row in x.split(1)])

    def dequantize(self, index: int) -> Tensor:
        return self._weight.float()

    def served(self, index: int) -> Tensor:
        return self._weight

    def part(self, index: int) -> Base:
        return Base(self._weight.split(self._slices)[index], ())


def project(
    store: Any,
    name: str,
    members: StepMembers,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    linear = AdaptedLinear(0, name, Base(weight, OUTS[name]), bias)
    if not isinstance(store, GpuStore):
        return linear(x, store.step(members))
    runs = [(row, row + 1, mix) for row, mix in enumerate(members.short)]
    return linear(x, store.bind([*runs, *members.long], OneStepTables(2048, CPU)), len(runs))


NEEDS_COMPILER = pytest.mark.skipif(library() is None, reason="there is no C compiler")
# Store, dtype and bound of the error. In bf16, each summand is rounded, by about 3e-3.
PATHS = [
    pytest.param(ReferenceStore, torch.float32, 1e-6, id="torch-fp32"),
    pytest.param(ReferenceStore, torch.bfloat16, 1e-2, id="torch-bf16"),
    pytest.param(CpuStore, torch.bfloat16, 1e-2, id="cpu-bf16", marks=NEEDS_COMPILER),
    pytest.param(GpuStore, torch.float32, 1e-6, id="gpu-fp32"),
    pytest.param(GpuStore, torch.float32, 1e-6, id="gpu-fp32-all", marks=pytest.mark.long),
]


@pytest.mark.usefixtures("coarse_tiles")
@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize(("store", "dtype", "bound"), PATHS)
def test_pairs_of_operators_add_up_as_documented(
    store: Any, dtype: torch.dtype, bound: float, name: str, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(7)
    adapters = residents(dtype)
    chosen = mixes(adapters)
    if store is GpuStore and request.node.get_closest_marker("long") is None:
        # In the interpreter, a slice of a mix takes a tenth of a second, so each projection has
        # only some.
        chosen = chosen[list(OUTS).index(name) :: 6]
    held = store(LAYOUT, dtype, CPU, 1 << 30)
    held.prepare(adapters.values())
    # On the GPU path, single rows are computed like segments.
    short = [] if store is GpuStore else chosen
    firsts = range(len(short), len(short) + len(chosen) * SEGMENT, SEGMENT)
    long = [(first, first + SEGMENT, mix) for first, mix in zip(firsts, chosen, strict=True)]
    x = torch.randn(len(short) + len(chosen) * SEGMENT, INNER).to(dtype)
    width = sum(OUTS[name])
    weight, bias = (torch.randn(width, INNER) / 8).to(dtype), torch.randn(width).to(dtype)
    members = StepMembers(short=short, long=long)
    found = project(held, name, members, x, weight, bias)
    columns = [slice(*ends) for ends in pairwise([0, *accumulate(OUTS[name])])]
    wrong = {}
    for row, (start, end, mix) in enumerate(long):
        rows = [*([row] if short else []), *range(start, end)]
        for s, those in enumerate(columns):
            path = LAYOUT.module(0, f"{name}.{s}")
            operators = [(adapters[key].operators.modules[path], w) for key, w in mix]
            expected = in_float64(weight[those], bias[those], operators, x[rows])
            error = error_ratio(found[rows][:, those], expected)
            if error > bound:
                wrong[mix, s] = error
    assert wrong == {}


@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize(("store", "dtype", "bound"), PATHS[:3])
def test_a_pair_has_the_bits_that_it_has_alone(
    store: Any, dtype: torch.dtype, bound: float, name: str
) -> None:
    torch.manual_seed(8)
    adapters = residents(dtype)
    chosen = mixes(adapters)
    held = store(LAYOUT, dtype, CPU, 1 << 30)
    held.prepare(adapters.values())
    x = torch.randn(len(chosen), INNER).to(dtype)
    width = sum(OUTS[name])
    weight, bias = (torch.randn(width, INNER) / 8).to(dtype), torch.randn(width).to(dtype)
    together = project(held, name, StepMembers(short=chosen, long=[]), x, weight, bias)
    for row, mix in enumerate(chosen):
        one = x[row : row + 1]
        alone = project(held, name, StepMembers(short=[mix], long=[]), one, weight, bias)
        assert torch.equal(alone[0], together[row]), mix
