"""Every operator alone and in pairs, on every path, compared with float64 and row by row.

The sum is that of ``docs/adapters.md``: ``y = G ⊙ (W x) + b + Σ_k w_k Δ_k(x)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations, combinations_with_replacement, pairwise
from typing import Any

import pytest
import torch
from builders import operators as made
from builders.facts import Resident, resident
from builders.mixes.gates import gated
from builders.operators import Make, change_of, delta_of, noise
from gpu_path import OneStepTables
from kernel_traffic import MAX_ERROR, error_ratio
from torch import Tensor

from turret.kernels import cpu as native
from turret.kernels.cpu import row_adapters
from turret.kernels.cpu.row_adapters import blocks_bytes
from turret.server.adapters.device import Members, ProjectionLayout, SliceShape, StepMembers
from turret.server.adapters.device.cpu import CpuStore
from turret.server.adapters.device.gpu_store import GpuStore
from turret.server.adapters.device.reference import ReferenceStore
from turret.server.adapters.operators import BaseRows, Operator, ServedWeight
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.constant_kv import ConstantKv
from turret.server.adapters.operators.gate import Gate
from turret.server.adapters.operators.sparse import Sparse
from turret.server.adapters.operators.vectors import Bias
from turret.server.models.decoding.adapted_linear import AdaptedLinear
from turret.server.models.weights import BaseLinear

ROWS = 17
# The outputs and inputs of a module, and its operator.
CASES: dict[str, tuple[int, int, Make]] = {
    **{f"low rank {r}": (40, 72, made.low_rank(r)) for r in (1, 8, 130)},
    # Widths and ranks that fill no whole vector, tile or unit of a kernel.
    **{
        f"hadamard {out} x {inner}, {rank}": (out, inner, made.hadamard(rank))
        for out, inner, rank in (
            *((24, 40, 1), (57, 90, 20), (130, 96, 3), (200, 96, 4), (200, 96, 5), (576, 96, 8)),
            *((576, 96, 17), (81, 75, 6), (300, 64, 16)),
        )
    },
    **{
        f"kronecker {i}x{j}, {k}x{n}, {rank}": (i * k, j * n, made.kronecker(i, j, rank))
        for i, j, k, n, rank in (
            *((1, 1, 40, 56, 0), (24, 24, 5, 3, 0), (8, 16, 50, 36, 4), (13, 4, 10, 24, 3)),
            *((2, 6, 100, 16, 0), (2, 6, 100, 16, 9), (24, 8, 24, 12, 4), (3, 5, 27, 15, 17)),
            *((1, 1, 300, 64, 20), (2, 3, 24, 3, 4), (3, 48, 70, 2, 0)),
        )
    },
    **{
        f"{count} entries in {out} x {inner}": (
            out,
            inner,
            made.sparse(count, is_skewed=count % 2 == 1),
        )
        for out, inner, count in (
            *((24, 40, 0), (24, 40, 1), (70, 56, 300), (33, 300, 901), (5, 1, 3), (90, 200, 7000)),
            *((300, 3000, 40), (150, 3000, 5001)),
        )
    },
    # Blocks that are transformed in parts or as a whole, with frequencies in one vector and more.
    **{
        f"circulant {rows} x {columns} of {size}": (rows * size, columns * size, circulant)
        for rows, columns, size in (
            *((3, 5, 8), (1, 2, 33), (2, 2, 64), (5, 7, 1), (3, 2, 16), (2, 3, 48), (1, 2, 80)),
            *((2, 1, 128), (3, 8, 192), (2, 2, 256), (1, 1, 272), (5, 3, 24), (2, 2, 150)),
        )
        for circulant in [made.circulant(size)]
    },
    "blocks": (48, 120, made.blocks(8)),
    "a shared block": (48, 120, made.blocks(8, is_shared=True)),
    **{
        f"dense {out} x {inner}": (out, inner, made.dense)
        for out, inner in ((32, 64), (70, 96), (33, 43), (5, 1), (150, 200))
    },
    "modulated": (40, 72, made.modulated(3)),
    "pairs of neighbours": (40, 72, made.pairs(2)),
    "pairs": (40, 72, made.pairs(40)),
    "gain": (40, 72, made.gain),
    "input gain": (40, 72, made.input_gain),
}
CPU = torch.device("cpu")
NEEDS_COMPILER = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")


@pytest.fixture(params=["native", "torch"])
def formulation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    return str(request.param)


def added(operator: Operator, x: Tensor, weight: Tensor, mixed: float, start: Tensor) -> Tensor:
    """``start + mixed Δ(x)``, written to some columns of a wider tensor."""

    def product(rows: Tensor) -> Tensor:
        return torch.cat([row @ weight.T for row in rows.split(1)])

    whole = torch.full((len(x), start.shape[1] + 9), 7.0)
    y = whole[:, 5:-4].copy_(start)
    operator.add(y, x, BaseRows(x, product), mixed)
    assert (whole[:, :5] == 7.0).all()
    assert (whole[:, -4:] == 7.0).all()
    return y


@pytest.mark.usefixtures("formulation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_each_row_matches_the_formula_and_has_the_same_bits_alone(
    name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(len(name))
    out, inner, make = CASES[name]
    weight, operator = noise(out, inner, dtype=dtype), make(out, inner, dtype)
    delta = delta_of(operator, weight.double())
    x, start = torch.randn(ROWS, inner).to(dtype), torch.randn(ROWS, out)
    found = added(operator, x, weight, -0.5, start)
    # An operator may round its inputs, or the base's result, to the serving dtype.
    bound = 4 * MAX_ERROR[dtype]
    assert error_ratio(found, start.double() - 0.5 * (x.double() @ delta.T)) < bound
    for rows in (slice(0, 1), slice(16, 17), slice(3, 8), slice(1, 17)):
        assert torch.equal(added(operator, x[rows], weight, -0.5, start[rows]), found[rows])


@pytest.mark.parametrize("name", CASES)
def test_the_dense_form_matches_the_formula(name: str) -> None:
    torch.manual_seed(len(name))
    out, inner, make = CASES[name]
    weight, operator = noise(out, inner), make(out, inner, torch.float32)
    total = torch.randn(out, inner)
    expected = total.double() + 0.25 * delta_of(operator, weight.double())
    operator.add_dense(total, ServedWeight(lambda: weight), 0.25)
    assert error_ratio(total, expected) < 1e-6
    again = operator.with_tensors(iter(operator.tensors()))
    assert [id(t) for t in again.tensors()] == [id(t) for t in operator.tensors()]


def test_blocks_are_scaled_by_the_gain_of_their_module() -> None:
    out, inner, make = CASES["blocks"]
    weight, x, gain = noise(out, inner), torch.randn(ROWS, inner), 1 + torch.randn(out)
    operator = make(out, inner, torch.float32)
    y, total = torch.zeros(ROWS, out), torch.zeros(out, inner)
    operator.add(y, x, BaseRows(x, lambda rows: rows @ weight.T, gain=gain), 1.0)
    scaled = gain.double()[:, None] * delta_of(operator, weight.double())
    assert error_ratio(y, x.double() @ scaled.T) < 1e-6
    operator.add_dense(total, ServedWeight(lambda: weight, gain), 1.0)
    assert error_ratio(total, scaled) < 1e-6


def test_a_bias_changes_no_weight() -> None:
    y, total = torch.zeros(2, 8), torch.zeros(8, 4)
    bias = Bias(torch.randn(8))
    bias.add(y, torch.zeros(2, 4), BaseRows(torch.zeros(2, 4), lambda rows: rows), -2.0)
    bias.add_dense(total, ServedWeight(lambda: total), 1.0)
    assert torch.equal(y, (-2.0 * bias.values).expand(2, -1))
    assert not total.any()


@pytest.mark.usefixtures("formulation")
@pytest.mark.parametrize(
    ("positions", "heads", "kv_heads", "head_dim"),
    [(1, 2, 1, 16), (10, 6, 2, 32), (16, 4, 4, 64), (37, 9, 3, 24)],
)
def test_constants_match_the_formula_with_any_neighbouring_rows(
    positions: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    torch.manual_seed(positions)
    q = torch.randn(70, heads, head_dim)
    keys, values = torch.randn(2, positions, kv_heads, head_dim) * 2
    # Scores as large as possible, positive and negative: e^score would overflow without subtracting
    # the row's maximum.
    q[3] *= 100
    keys[..., 0], q[4], q[4, :, 0] = 3.0, 0.1, -200.0
    constants = ConstantKv(keys, values)
    found = constants.attend(q)
    per_head = heads // kv_heads
    wide = [x.double().repeat_interleave(per_head, 1) for x in (keys, values)]
    weights = torch.einsum("rhd,phd->rhp", q.double(), wide[0]).softmax(-1)
    assert error_ratio(found, torch.einsum("rhp,phd->rhd", weights, wide[1])) < 1e-5
    for rows in (slice(0, 1), slice(3, 4), slice(5, 38), slice(1, 70)):
        assert torch.equal(constants.attend(q[rows]), found[rows])
    held = sum(tensor.nbytes for tensor in constants._wide)
    assert constants.prepared_bytes == held


@pytest.mark.parametrize("name", [name for name in CASES if "entries" in name])
def test_the_size_of_a_copy_is_known_beforehand(name: str) -> None:
    out, inner, make = CASES[name]
    operator = make(out, inner, torch.bfloat16)
    assert isinstance(operator, Sparse)
    *copied, _ = row_adapters.sparse(*operator.tensors()).values
    tensors = [tensor for tensor in copied if isinstance(tensor, Tensor)]
    size = blocks_bytes(operator.columns, operator.row_starts)
    assert size == sum(tensor.nbytes for tensor in tensors)


# Projections in the stores of adapters.


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

    def __init__(self, weight: Tensor, slices: Sequence[int]) -> None:
        self.widths, self.in_features = (len(weight),), weight.shape[1]
        self._weight, self._slices = weight, list(slices)
        self.product = Product(self)

    def __call__(self, x: Tensor, ahead: object = None, num_decode: int | None = None) -> Tensor:
        return torch.cat([row @ self._weight.T for row in x.split(1)])

    def dequantize(self, index: int) -> Tensor:
        return self._weight.float()

    def served(self, index: int) -> Tensor:
        return self._weight

    def part(self, index: int) -> Base:
        return Base(self._weight.split(self._slices)[index], ())


class Projection:
    """A fused projection with a random weight and bias, and its formula in float64.

    Args:
        outs: The widths of its modules.
        inner: The number of inputs.
        dtype: The serving dtype.
    """

    def __init__(self, outs: Sequence[int], inner: int, dtype: torch.dtype) -> None:
        self.outs, self._dtype = outs, dtype
        slices = tuple(SliceShape(f"p.{s}", out, inner) for s, out in enumerate(outs))
        self._layout = ProjectionLayout(1, {"p": slices})
        self.paths = [self._layout.module(0, one.path) for one in slices]
        self._weight = (torch.randn(sum(outs), inner) / 8).to(dtype)
        self._bias = torch.randn(sum(outs)).to(dtype)
        self._linear = AdaptedLinear(0, "p", Base(self._weight, outs), self._bias)

    def store(self, kind: Any, adapters: Mapping[str, Resident]) -> Any:
        held = kind(self._layout, self._dtype, CPU, 1 << 30)
        held.prepare(adapters.values())
        return held

    def run(self, store: Any, members: StepMembers, x: Tensor) -> Tensor:
        if not isinstance(store, GpuStore):
            return self._linear(x, store.step(members))
        runs: list[tuple[int, int, Members]] = [
            (row, row + 1, mix) for row, mix in enumerate(members.short)
        ]
        if members.long:
            runs += [(len(runs), members.long[0][0], ()), *members.long]
        tables = OneStepTables(2048, CPU)
        return self._linear(x, store.bind(runs, tables), len(members.short))

    def of_base(self, x: Tensor) -> Tensor:
        return self._linear(x, None)

    def errors(
        self, adapters: Mapping[str, Resident], mix: Members, x: Tensor, found: Tensor
    ) -> list[float]:
        """The error of each module's outputs for rows that share a mix."""
        x, errors = x.double(), []
        bounds = pairwise([0, *accumulate(self.outs)])
        for path, (start, end) in zip(self.paths, bounds, strict=True):
            weight = self._weight[start:end].double()
            exact = x @ weight.T + self._bias[start:end].double()
            for key, factor in mix:
                ops = adapters[key].operators.modules.get(path, ModuleOperators())
                plain = [part for part in ops.operators if not isinstance(part, Gate)]
                exact += factor * (x @ change_of(ModuleOperators(*plain), weight).T)
                if ops.bias is not None:
                    exact += factor * ops.bias.double()
                if (gate := ops.get(Gate)) is not None:
                    exact += factor * gated(gate, x)
            errors.append(error_ratio(found[:, start:end], exact))
        return errors


# Two rows, a row of the base, a segment with more rows than a tile, and a mix of three adapters.
SHORT: list[Members] = [[("0", 1.0)], [("1", 1.0)]]
LONG: list[tuple[int, int, Members]] = [
    (3, 43, [("2", -0.5), ("1", 2.0)]),
    (43, 44, [("low", 1.0), ("0", 0.25), ("1", 1.0)]),
]
NUM_ROWS = 44


@NEEDS_COMPILER
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", CASES)
def test_the_cpu_path_matches_the_formula(name: str) -> None:
    """The operator is on the first of two modules."""
    torch.manual_seed(len(name))
    dtype = torch.bfloat16
    out, inner, make = CASES[name]
    projection = Projection((out, 40), inner, dtype)
    makes = {"low": made.low_rank(5), **dict.fromkeys("012", make)}
    adapters = {
        key: resident(
            key, AdapterOperators({projection.paths[0]: ModuleOperators(each(out, inner, dtype))})
        )
        for key, each in makes.items()
    }
    store = projection.store(CpuStore, adapters)
    # Memory after every row must not be read.
    x = torch.full((NUM_ROWS, inner + 64), float("nan"), dtype=dtype)[:, :inner]
    x.copy_(torch.randn(NUM_ROWS, inner))
    found = projection.run(store, StepMembers(short=SHORT, long=LONG), x)
    plain = projection.of_base(x)
    for start, end, mix in [*((row, row + 1, mix) for row, mix in enumerate(SHORT)), *LONG]:
        rows = slice(start, end)
        errors = projection.errors(adapters, mix, x[rows], found[rows])
        assert max(errors) < MAX_ERROR[dtype], mix
        for row in (start, end - 1):
            alone = projection.run(store, StepMembers(short=[mix], long=[]), x[row : row + 1])
            assert torch.equal(alone[0], found[row]), mix
    assert torch.equal(found[2], plain[2])
    assert torch.equal(found[:, out:], plain[:, out:])


INNER = 64
OUTS = [(96, 32), (64,)]
KINDS: dict[str, Make] = {
    "low_rank": made.low_rank(5),
    "hadamard": made.hadamard(3),
    "kronecker": made.kronecker(8, 4, 2),
    "sparse": made.sparse(90),
    "gate": made.gate(6, 16),
    "circulant": made.circulant(16),
    "dense": made.dense,
    # Each rank takes a launch of the base, which is slow in the interpreter.
    "modulated": made.modulated(1),
    "input_blocks": made.blocks(4),
    "pairs": made.pairs(8),
    "gain": made.gain,
    "input_gain": made.input_gain,
    "bias": made.bias,
}
NOT_TOGETHER = [{"gain", "input_gain"}] + [
    set(pair) for pair in combinations(("input_gain", "input_blocks", "pairs"), 2)
]
# The number of rows of each mix in a segment, which makes it a long one.
SEGMENT = 9


def residents(projection: Projection, dtype: torch.dtype) -> dict[str, Resident]:
    """Two adapters with each operator, and one with each pair that an adapter may combine."""
    makes: dict[str, tuple[Make, ...]] = {
        f"{kind} {number}": (make,) for kind, make in KINDS.items() for number in (1, 2)
    }
    for pair in combinations(KINDS, 2):
        if set(pair) not in NOT_TOGETHER:
            makes[" and ".join(pair)] = (KINDS[pair[0]], KINDS[pair[1]])
    makes["gate 2"] = (made.router(4, 9, 16),)
    widths = list(zip(projection.paths, projection.outs, strict=True))
    return {
        key: resident(
            key,
            AdapterOperators(
                {
                    path: ModuleOperators(*(make(out, INNER, dtype) for make in each))
                    for path, out in widths
                }
            ),
        )
        for key, each in makes.items()
    }


def mixes(adapters: dict[str, Resident]) -> list[Members]:
    pairs = combinations_with_replacement(KINDS, 2)
    two = [((f"{a} 1", 0.7), (f"{b} 2", -0.6)) for a, b in pairs]
    return [*two, *(((key, 0.8),) for key in adapters if " and " in key)]


# Store, dtype and bound of the error. In bf16, each summand is rounded, by about 3e-3.
PATHS = [
    pytest.param(ReferenceStore, torch.float32, 1e-6, id="torch-fp32"),
    pytest.param(ReferenceStore, torch.bfloat16, 1e-2, id="torch-bf16"),
    pytest.param(CpuStore, torch.bfloat16, 1e-2, id="cpu-bf16", marks=NEEDS_COMPILER),
    pytest.param(GpuStore, torch.float32, 1e-6, id="gpu-fp32"),
    pytest.param(GpuStore, torch.float32, 1e-6, id="gpu-fp32-all", marks=pytest.mark.long),
]


@pytest.mark.usefixtures("coarse_tiles")
@pytest.mark.parametrize("outs", OUTS)
@pytest.mark.parametrize(("kind", "dtype", "bound"), PATHS)
def test_pairs_of_operators_add_up_as_documented(
    kind: Any,
    dtype: torch.dtype,
    bound: float,
    outs: tuple[int, ...],
    request: pytest.FixtureRequest,
) -> None:
    """All pairs are rows of one step, as single rows and as segments."""
    torch.manual_seed(7)
    projection = Projection(outs, INNER, dtype)
    adapters = residents(projection, dtype)
    chosen = mixes(adapters)
    if kind is GpuStore and request.node.get_closest_marker("long") is None:
        # In the interpreter, a slice of a mix takes a tenth of a second, so each projection tests
        # only some of the mixes.
        chosen = chosen[OUTS.index(outs) :: 6]
    # On the GPU path, single rows are computed like segments.
    short = [] if kind is GpuStore else chosen
    firsts = range(len(short), len(short) + len(chosen) * SEGMENT, SEGMENT)
    long = [(first, first + SEGMENT, mix) for first, mix in zip(firsts, chosen, strict=True)]
    x = torch.randn(len(short) + len(chosen) * SEGMENT, INNER).to(dtype)
    members = StepMembers(short=short, long=long)
    found = projection.run(projection.store(kind, adapters), members, x)
    wrong = {}
    for row, (start, end, mix) in enumerate(long):
        rows = [*([row] if short else []), *range(start, end)]
        errors = projection.errors(adapters, mix, x[rows], found[rows])
        if max(errors) > bound:
            wrong[mix] = errors
    assert wrong == {}


@pytest.mark.parametrize("outs", OUTS)
@pytest.mark.parametrize(("kind", "dtype", "bound"), PATHS[:3])
def test_a_pair_has_the_bits_that_it_has_alone(
    kind: Any, dtype: torch.dtype, bound: float, outs: tuple[int, ...]
) -> None:
    torch.manual_seed(8)
    projection = Projection(outs, INNER, dtype)
    adapters = residents(projection, dtype)
    chosen, store = mixes(adapters), projection.store(kind, adapters)
    x = torch.randn(len(chosen), INNER).to(dtype)
    together = projection.run(store, StepMembers(short=chosen, long=[]), x)
    for row, mix in enumerate(chosen):
        alone = projection.run(store, StepMembers(short=[mix], long=[]), x[row : row + 1])
        assert torch.equal(alone[0], together[row]), mix
