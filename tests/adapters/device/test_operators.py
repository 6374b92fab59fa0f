"""Every operator alone: ``add`` compared with float64 and row by row, and its dense form.

The tests run with compiled kernels and with torch alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_traffic import MAX_ERROR, error_ratio
from kernel_traffic import circulant as dense_circulant
from torch import Tensor

from turret.kernels.cpu import native
from turret.server.adapters.operators.circulant import Circulant
from turret.server.adapters.operators.constant_kv import ConstantKv
from turret.server.adapters.operators.dense import Dense
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.input_blocks import InputBlocks
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.modulated_base import ModulatedBase
from turret.server.adapters.operators.operator import BaseRows, Operator, ServedWeight
from turret.server.adapters.operators.pair_rotation import PairRotation
from turret.server.adapters.operators.sparse import Sparse
from turret.server.adapters.operators.vectors import Bias, Gain, InputGain

ROWS = 17
# Makes an operator and its ΔW in float64, from a dtype and the base's weight in float64.
Make = Callable[[torch.dtype, Tensor], tuple[Operator, Tensor]]
Case = tuple[int, int, Make]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


def low_rank(rank: int, inner: int, out: int) -> Case:
    def make(dtype: torch.dtype, weight: Tensor) -> tuple[Operator, Tensor]:
        made = LowRank(noise(rank, inner, dtype=dtype), noise(rank, out, dtype=dtype))
        return made, made.b.double().T @ made.a.double()

    return inner, out, make


def hadamard(rank: int, inner: int, out: int) -> Case:
    def make(dtype: torch.dtype, weight: Tensor) -> tuple[Operator, Tensor]:
        shapes = ((out, rank), (rank, inner)) * 2
        made = Hadamard(*(noise(*shape, dtype=dtype) for shape in shapes))
        w1a, w1b, w2a, w2b = (factor.double() for factor in made.tensors())
        return made, (w1a @ w1b) * (w2a @ w2b)

    return inner, out, make


def kronecker(out_l: int, in_m: int, out_k: int, in_n: int, rank: int) -> Case:
    def make(dtype: torch.dtype, weight: Tensor) -> tuple[Operator, Tensor]:
        w1 = noise(out_l, in_m, dtype=dtype)
        if not rank:
            made = Kronecker(w1, noise(out_k, in_n, dtype=dtype))
            return made, torch.kron(w1.double(), made.tensors()[1].double())
        left, right = noise(out_k, rank, dtype=dtype), noise(rank, in_n, dtype=dtype)
        return Kronecker(w1, (left, right)), torch.kron(w1.double(), left.double() @ right.double())

    return in_m * in_n, out_l * out_k, make


def sparse(inner: int, out: int, count: int, is_skewed: bool) -> Case:
    def make(dtype: torch.dtype, weight: Tensor) -> tuple[Operator, Tensor]:
        # Some outputs have many entries, and some inputs occur twice.
        rows = (torch.rand(count) ** (3 if is_skewed else 1) * out).long().sort().values
        columns = torch.randint(0, inner, (count,))
        starts = torch.searchsorted(rows, torch.arange(out + 1)).to(torch.int32)
        values = noise(count, 1, dtype=dtype)[:, 0]
        dense = torch.zeros(out, inner, dtype=torch.float64)
        dense.index_put_((rows, columns), values.double(), accumulate=True)
        return Sparse(values, columns.to(torch.uint16), starts), dense

    return inner, out, make


def circulant(rows: int, columns: int, size: int) -> Case:
    def make(dtype: torch.dtype, weight: Tensor) -> tuple[Operator, Tensor]:
        made = Circulant(noise(rows, columns, size, dtype=dtype))
        return made, dense_circulant(made.kernel.double())

    return columns * size, rows * size, make


def blocks(count: int, size: int, total: int) -> Case:
    def make(dtype: torch.dtype, weight: Tensor) -> tuple[Operator, Tensor]:
        made = InputBlocks(noise(count, size, size, dtype=dtype))
        each = made.blocks.double().expand(total, -1, -1)
        return made, weight @ torch.block_diag(*each).T

    return total * size, 48, make


def dense(dtype: torch.dtype, weight: Tensor) -> tuple[Operator, Tensor]:
    made = Dense(noise(*weight.shape, dtype=dtype))
    return made, made.weight.double()


def modulated(dtype: torch.dtype, weight: Tensor) -> tuple[Operator, Tensor]:
    out, inner = weight.shape
    made = ModulatedBase(torch.randn(3, inner).to(dtype), torch.randn(3, out).to(dtype))
    return made, weight * (made.b.double().T @ made.a.double())


def pairs(group: int) -> Make:
    def make(dtype: torch.dtype, weight: Tensor) -> tuple[Operator, Tensor]:
        made, out = PairRotation(torch.randn(len(weight)), group), len(weight)
        others = [o + group // 2 if o % group < group // 2 else o - group // 2 for o in range(out)]
        return made, made.sine.double()[:, None] * weight[others]

    return make


def gain(dtype: torch.dtype, weight: Tensor) -> tuple[Operator, Tensor]:
    made = Gain(1 + torch.randn(len(weight)))
    return made, (made.values.double() - 1)[:, None] * weight


def input_gain(dtype: torch.dtype, weight: Tensor) -> tuple[Operator, Tensor]:
    made = InputGain(1 + torch.randn(weight.shape[1]))
    return made, (made.values.double() - 1)[None, :] * weight


CASES: dict[str, Case] = {
    **{f"low rank {r}": low_rank(r, 72, 40) for r in (1, 8, 130)},
    "hadamard of one": hadamard(1, 40, 24),
    "hadamard": hadamard(20, 90, 57),
    "kronecker of one": kronecker(1, 1, 40, 56, 0),
    "kronecker": kronecker(24, 24, 5, 3, 0),
    "kronecker of factors": kronecker(8, 16, 50, 36, 4),
    "no entries": sparse(40, 24, 0, False),
    "entries": sparse(56, 70, 300, False),
    "entries in few rows": sparse(3000, 150, 5000, True),
    **{f"circulant {s}": circulant(*s) for s in ((3, 5, 8), (1, 2, 33), (2, 2, 64), (5, 7, 1))},
    "blocks": blocks(15, 8, 15),
    "a shared block": blocks(1, 8, 15),
    "dense": (43, 33, dense),
    "modulated": (72, 40, modulated),
    "pairs of neighbours": (72, 40, pairs(2)),
    "pairs": (72, 40, pairs(40)),
    "gain": (72, 40, gain),
    "input gain": (72, 40, input_gain),
}


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
    inner, out, make = CASES[name]
    weight = noise(out, inner, dtype=dtype)
    operator, delta = make(dtype, weight.double())
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
    inner, out, make = CASES[name]
    weight = noise(out, inner)
    operator, delta = make(torch.float32, weight.double())
    total = torch.randn(out, inner)
    expected = total.double() + 0.25 * delta
    operator.add_dense(total, ServedWeight(lambda: weight), 0.25)
    assert error_ratio(total, expected) < 1e-6
    made = operator.with_tensors(iter(operator.tensors()))
    assert [id(t) for t in made.tensors()] == [id(t) for t in operator.tensors()]


def test_blocks_are_scaled_by_the_gain_of_their_module() -> None:
    inner, out, make = CASES["blocks"]
    weight, x, gain = noise(out, inner), torch.randn(ROWS, inner), 1 + torch.randn(out)
    operator, delta = make(torch.float32, weight.double())
    y, total = torch.zeros(ROWS, out), torch.zeros(out, inner)
    operator.add(y, x, BaseRows(x, lambda rows: rows @ weight.T, gain=gain), 1.0)
    scaled = gain.double()[:, None] * delta
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
