"""Operators in one block: the same values, without gaps or other retained memory."""

from __future__ import annotations

import pytest
import torch

from turret.server.adapters.lowering.lowered import in_one_block
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.dense import Dense
from turret.server.adapters.operators.gate import Gate, PrototypeScore, QueryScore
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.sparse import Sparse


def low_rank(rank: int, size: int) -> LowRank:
    # Views of a larger tensor, like the tensors of a file.
    wide = torch.randn(2 * rank, size).bfloat16()
    return LowRank(wide[:rank], wide[rank:])


def one_of_each() -> dict[str, ModuleOperators]:
    shared = torch.randn(3, 24).bfloat16()
    factors = [torch.randn(*shape).bfloat16() for shape in ((7, 5), (6, 4), (6, 2), (2, 4))]
    a, b, query, keys = torch.randn(4, 4, 8)
    gate = Gate(a, b, QueryScore(query, keys), (0, 3, 4))
    return {
        "a": ModuleOperators(low_rank=low_rank(3, 24), gain=torch.randn(24)),
        "b": ModuleOperators(hadamard=Hadamard(shared, shared, *(torch.randn(2, 9, 3)))),
        "c": ModuleOperators(kronecker=Kronecker(factors[0], factors[1])),
        "d": ModuleOperators(kronecker=Kronecker(factors[0], (factors[2], factors[3]))),
        "e": ModuleOperators(gate=gate, input_gain=torch.randn(8), bias=torch.randn(8)),
        "f": ModuleOperators(low_rank=LowRank(torch.empty(0, 24), torch.empty(0, 8))),
        "g": ModuleOperators(dense=Dense(torch.randn(5, 3).bfloat16())),
        "i": ModuleOperators(gate=Gate(a, b, PrototypeScore(query, 2, 0.5), (0, 3, 4))),
        "h": ModuleOperators(
            sparse=Sparse(
                torch.randn(3),
                torch.tensor([0, 65535, 7]).to(torch.uint16),
                torch.tensor([0, 1, 1, 3], dtype=torch.int32),
            )
        ),
    }


def test_every_operator_keeps_its_values_in_one_storage() -> None:
    before = one_of_each()
    after, is_finite = in_one_block(before)
    assert is_finite
    assert list(after) == list(before)
    storages = set()
    for name, module in before.items():
        copied = after[name]
        assert list(map(type, module.operators)) == list(map(type, copied.operators))
        assert len(module.tensors()) == len(copied.tensors())
        for old, new in zip(module.tensors(), copied.tensors(), strict=True):
            assert torch.equal(old, new)
            assert old.dtype == new.dtype
            assert new.is_contiguous()
            if new.numel():
                storages.add(new.untyped_storage().data_ptr())
    assert len(storages) == 1
    gate, moved = before["e"].get(Gate), after["e"].get(Gate)
    assert gate is not None
    assert moved is not None
    assert gate.rank_indptr == moved.rank_indptr
    both = after["b"].get(Hadamard)
    assert both is not None
    assert both.w1a is both.w1b  # a shared tensor is stored once


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_detected(value: float) -> None:
    for place in range(3):
        modules = {str(i): ModuleOperators(low_rank=low_rank(2, 64)) for i in range(3)}
        changed = modules[str(place)].low_rank
        assert changed is not None
        changed.b[1, 63] = value
        assert not in_one_block(modules)[1]


def test_a_block_is_no_larger_than_its_tensors() -> None:
    ranks = (1, 3, 8, 16, 64)
    modules = {
        f"{i}": ModuleOperators(low_rank=low_rank(ranks[i % 5], 64 + 8 * i)) for i in range(60)
    }
    after, _ = in_one_block(modules)
    tensors = [tensor for module in after.values() for tensor in module.tensors()]
    block = tensors[0].untyped_storage().nbytes()
    assert block <= 1.05 * sum(tensor.nbytes for tensor in tensors)
