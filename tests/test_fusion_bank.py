"""The bank of gated adapters: a row gets the same bits in any company and kind of segment."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from turret.kernels.row_linear import row_multiple
from turret.server.adapters.bank import Members, StepMembers
from turret.server.adapters.fusion_bank import FusionBank
from turret.server.adapters.operators import AdapterOperators, Gate, ModuleOperators
from turret.server.adapters.packed_group import PackLayout, SliceShape

INNER = 192
OUTS = {"q": 96, "k": 32, "v": 32}
LAYOUT = PackLayout(1, {"qkv": tuple(SliceShape(n, out, INNER) for n, out in OUTS.items())})
# Per adapter and module: ranks of its components. One crosses rank windows, one has empty parts.
RANKS = {
    "a": {"q": (4, 8), "v": (4, 0)},
    "b": {"q": (16, 16, 1), "k": (16, 0, 1), "v": (16, 16, 1)},
    "c": {"k": (200, 120)},
}
D_K = {"a": 16, "b": 32, "c": 48}
NUM_ROWS = 90


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    row_multiple.cache_clear()
    yield
    torch.set_num_threads(before)
    row_multiple.cache_clear()


def gate_of(ranks: tuple[int, ...], out: int, d_k: int, dtype: torch.dtype) -> Gate:
    held = sum(ranks)
    full = -(-held // 16) * 16

    def noise(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns) / columns**0.5
        values[held:] = 0 if rows == full else values[held:]
        return values.to(dtype)

    a, b = noise(full, INNER), noise(full, out)
    keys = b.float() @ torch.randn(d_k, out).T
    return Gate(a, b, torch.randn(d_k, INNER).to(dtype) / 14, keys, (0, *accumulate(ranks)))


def bank_of(dtype: torch.dtype) -> tuple[FusionBank, dict[str, dict[str, Gate]]]:
    bank, gates = FusionBank(LAYOUT, torch.device("cpu")), {}
    for key, modules in RANKS.items():
        gates[key] = {n: gate_of(r, OUTS[n], D_K[key], dtype) for n, r in modules.items()}
        operators = {f"model.layers.0.{n}": ModuleOperators(gate=g) for n, g in gates[key].items()}
        bank.insert(key, AdapterOperators(MappingProxyType(operators)))
    return bank, gates


def apply(bank: FusionBank, members: StepMembers, x: Tensor, y: Tensor) -> Tensor:
    y = y.clone()
    bound = bank.bind(members)
    assert bound is not None
    bound.apply(0, "qkv", x, y)
    return y


MIXES: tuple[Members, ...] = (
    (("a", 1.0),),
    (("b", 1.0),),
    (("c", -0.5),),
    (("b", 0.3), ("other", 1.0), ("a", 2.0)),
    (("other", 1.0),),
    (("c", 1.0), ("b", 1.0), ("a", 1.0)),
)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_keeps_its_bits_in_any_company(dtype: torch.dtype) -> None:
    bank, _ = bank_of(dtype)
    x, y = torch.randn(NUM_ROWS, INNER).to(dtype), torch.randn(NUM_ROWS, 160).to(dtype)
    mixes = [MIXES[i % len(MIXES)] for i in range(NUM_ROWS)]
    together = apply(bank, StepMembers(short=mixes, long=[]), x, y)
    for i in range(NUM_ROWS):
        if mixes[i] == (("other", 1.0),):
            assert torch.equal(together[i], y[i])
            continue
        row = slice(i, i + 1)
        alone = apply(bank, StepMembers(short=[mixes[i]], long=[]), x[row], y[row])
        assert torch.equal(alone[0], together[i]), i
    for mix in (MIXES[0], MIXES[3], MIXES[5]):
        segment = StepMembers(short=[], long=[(5, 84, mix)])
        long = apply(bank, segment, x, y)
        assert torch.equal(long[:5], y[:5])
        assert torch.equal(long[84:], y[84:])
        for i in (5, 6, 40, 83):
            row = slice(i, i + 1)
            alone = apply(bank, StepMembers(short=[mix], long=[]), x[row], y[row])
            assert torch.equal(alone[0], long[i]), (mix, i)


def test_rows_get_the_formula() -> None:
    bank, gates = bank_of(torch.float32)
    x, y = torch.randn(3, INNER), torch.randn(3, 160)
    mix = MIXES[3]
    found = apply(bank, StepMembers(short=[mix] * 3, long=[]), x, y)
    expected, column = y.double(), 0
    for module, out in OUTS.items():
        columns = slice(column, column + out)
        column += out
        for key, weight in mix:
            gate = gates.get(key, {}).get(module)
            if gate is None:
                continue
            a, b, query, keys = (tensor.double() for tensor in gate.tensors())
            ends = gate.rank_indptr
            parts = [slice(ends[k], ends[k + 1]) for k in range(len(ends) - 1)]
            v = x.double() @ a.T
            q = x.double() @ query.T
            scores = torch.stack([(v[:, p] @ keys[p] * q).sum(1) for p in parts], 1)
            alphas = scores.softmax(1)
            for k, p in enumerate(parts):
                expected[:, columns] += weight * alphas[:, k : k + 1] * (v[:, p] @ b[p])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_removed_adapter_is_gone() -> None:
    bank, _ = bank_of(torch.float32)
    members = StepMembers(short=[(("a", 1.0),)], long=[])
    assert bank.bind(members) is not None
    bank.remove("a")
    bank.remove("never there")
    assert bank.bind(members) is None
