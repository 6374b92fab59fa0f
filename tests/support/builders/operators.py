"""Random operators of every kind, their ΔW in float64, and adapters that use them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from turret.server.adapters.operators import Operator
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.circulant import Circulant
from turret.server.adapters.operators.constant_kv import ConstantKv
from turret.server.adapters.operators.dense import Dense
from turret.server.adapters.operators.gate import Gate, GivenScore, PrototypeScore, QueryScore
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.input_blocks import InputBlocks
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.modulated_base import ModulatedBase
from turret.server.adapters.operators.pair_rotation import PairRotation
from turret.server.adapters.operators.soft_prompt import PrefixKv, SoftPrompt
from turret.server.adapters.operators.sparse import Sparse
from turret.server.adapters.operators.token_router import TokenRouter
from turret.server.adapters.operators.vectors import Bias, Gain, InputGain
from turret.server.adapters.operators.vocabulary import (
    EmbeddingLowRank,
    VocabularyOperators,
    VocabularyRows,
)
from turret.server.models.decoding import Arch

# Makes an operator for a module with these numbers of outputs and inputs, in this dtype.
Make = Callable[[int, int, torch.dtype], Operator]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


def low_rank(rank: int) -> Make:
    return lambda out, inner, dtype: LowRank(
        noise(rank, inner, dtype=dtype), noise(rank, out, dtype=dtype)
    )


def hadamard(rank: int) -> Make:
    return lambda out, inner, dtype: Hadamard(
        *(noise(*shape, dtype=dtype) for shape in ((out, rank), (rank, inner)) * 2)
    )


def kronecker(out_l: int, in_m: int, rank: int = 0) -> Make:
    """``w1`` is ``[out_l, in_m]``; ``w2`` is a whole matrix if the rank is 0."""

    def make(out: int, inner: int, dtype: torch.dtype) -> Kronecker:
        w1, second = noise(out_l, in_m, dtype=dtype), (out // out_l, inner // in_m)
        if not rank:
            return Kronecker(w1, noise(*second, dtype=dtype))
        factors = noise(second[0], rank, dtype=dtype), noise(rank, second[1], dtype=dtype)
        return Kronecker(w1, factors)

    return make


def sparse(count: int, *, is_skewed: bool = False) -> Make:
    """Some inputs occur twice; with ``is_skewed``, a few outputs have most of the entries."""

    def make(out: int, inner: int, dtype: torch.dtype) -> Sparse:
        rows = (torch.rand(count) ** (3 if is_skewed else 1) * out).long().sort().values
        starts = torch.searchsorted(rows, torch.arange(out + 1)).to(torch.int32)
        columns = torch.randint(0, inner, (count,)).to(torch.uint16)
        values = torch.randn(count).div(max(1, count / out) ** 0.5).to(dtype)
        return Sparse(values, columns, starts)

    return make


def circulant(size: int) -> Make:
    return lambda out, inner, dtype: Circulant(
        noise(out // size, inner // size, size, dtype=dtype) / (inner / size) ** 0.5
    )


def blocks(size: int, *, is_shared: bool = False) -> Make:
    return lambda out, inner, dtype: InputBlocks(
        noise(1 if is_shared else inner // size, size, size, dtype=dtype)
    )


def pairs(group: int) -> Make:
    return lambda out, inner, dtype: PairRotation(torch.randn(out), group)


def dense(out: int, inner: int, dtype: torch.dtype) -> Dense:
    return Dense(noise(out, inner, dtype=dtype))


def modulated(rank: int) -> Make:
    return lambda out, inner, dtype: ModulatedBase(
        torch.randn(rank, inner).to(dtype), torch.randn(rank, out).to(dtype)
    )


def gain(out: int, inner: int, dtype: torch.dtype) -> Gain:
    return Gain(1 + torch.randn(out))


def input_gain(out: int, inner: int, dtype: torch.dtype) -> InputGain:
    return InputGain(1 + torch.randn(inner))


def bias(out: int, inner: int, dtype: torch.dtype) -> Bias:
    return Bias(torch.randn(out))


def gate(*ends: int) -> Make:
    """A gate by queries; ``ends`` are the cumulative ranks of its components."""
    return lambda out, inner, dtype: Gate(
        noise(16, inner, dtype=dtype),
        noise(16, out, dtype=dtype),
        QueryScore(noise(4, inner, dtype=dtype), torch.randn(16, 4)),
        (0, *ends),
    )


def router(*ends: int) -> Make:
    """A gate by prototypes, two of which count."""
    return lambda out, inner, dtype: Gate(
        noise(16, inner, dtype=dtype),
        noise(16, out, dtype=dtype),
        PrototypeScore(torch.randn(len(ends), inner), 2, 0.7),
        (0, *ends),
    )


def dense_circulant(kernel: Tensor) -> Tensor:
    """The dense matrix of kernels ``[out / b, in / b, b]``; row j is shifted by j positions."""
    rows = [kernel.roll(j, dims=2) for j in range(kernel.shape[2])]
    return torch.stack(rows, dim=1).flatten(2).flatten(0, 1)


def delta_of(operator: Operator, weight: Tensor) -> Tensor:
    """``ΔW`` in float64, ``[out, in]``, for the base's weight in float64."""
    out, inner = weight.shape
    tensors = [tensor.double() for tensor in operator.tensors()]
    match operator:
        case LowRank():
            a, b = tensors
            return b.T @ a
        case Hadamard():
            w1a, w1b, w2a, w2b = tensors
            return (w1a @ w1b) * (w2a @ w2b)
        case Kronecker():
            w1, *second = tensors
            return torch.kron(w1, second[0] @ second[1] if len(second) == 2 else second[0])
        case Sparse():
            rows = torch.repeat_interleave(operator.row_starts.long().diff())
            places = rows, operator.columns.long()
            zeros = torch.zeros(out, inner, dtype=torch.float64)
            return zeros.index_put_(places, operator.values.double(), accumulate=True)
        case Circulant():
            return dense_circulant(tensors[0])
        case InputBlocks():
            size = operator.blocks.shape[1]
            return weight @ torch.block_diag(*tensors[0].expand(inner // size, -1, -1)).T
        case Dense():
            return tensors[0]
        case ModulatedBase():
            return weight * (operator.b.double().T @ operator.a.double())
        case PairRotation():
            half = operator.group // 2
            others = [o + half if o % operator.group < half else o - half for o in range(out)]
            return tensors[0][:, None] * weight[others]
        case Gain():
            return (tensors[0] - 1)[:, None] * weight
        case InputGain():
            return (tensors[0] - 1)[None, :] * weight
    raise AssertionError(operator)


def change_of(operators: ModuleOperators, weight: Tensor) -> Tensor:
    """``ΔW`` of all operators but biases, in float64; a gain also scales that of input blocks."""
    total = torch.zeros_like(weight)
    for operator in operators.operators:
        if isinstance(operator, Bias):
            continue
        delta = delta_of(operator, weight)
        if isinstance(operator, InputBlocks) and operators.gain is not None:
            delta = operators.gain.double()[:, None] * delta
        total += delta
    return total


def everywhere(
    arch: Arch, make: Callable[[int, int], ModuleOperators], *projections: str
) -> AdapterOperators:
    """The result of ``make`` for each linear module of the layers, or of some projections."""
    names = projections or tuple(arch.linears())
    slices = [one for name in names for one in arch.linears()[name]]
    return AdapterOperators(
        {
            f"model.layers.{layer}.{path}": make(out, inner)
            for layer in range(arch.num_layers)
            for path, out, inner in slices
        }
    )


def every_operator(arch: Arch, dtype: torch.dtype) -> dict[str, AdapterOperators]:
    """Adapters that together use every operator."""

    def adapter(*makes: Make) -> AdapterOperators:
        return everywhere(
            arch,
            lambda out, inner: ModuleOperators(*(make(out, inner, dtype) for make in makes)),
        )

    numbers = itertools.count()

    def given(out: int, inner: int, dtype: torch.dtype) -> Operator:
        gate = router(4, 8, 12)(out, inner, dtype)
        assert isinstance(gate, Gate)
        return replace(gate, score=GivenScore(next(numbers)))

    some = functools.partial(noise, dtype=dtype)
    weighed = adapter(given)
    kv = (arch.num_layers, 5, arch.num_kv_heads, arch.head_dim)
    return {
        "low": adapter(low_rank(4), gain, bias),
        "other": adapter(hadamard(3), kronecker(8, 8, 2), sparse(64), input_gain),
        "gated": adapter(gate(5, 12)),
        "routed": adapter(router(4, 8, 12)),
        "router": replace(weighed, router=_router(arch.hidden_size, len(weighed.modules))),
        "turned": adapter(blocks(8)),
        "scaled": adapter(blocks(8), gain),
        "paired": adapter(circulant(8), dense, modulated(2), pairs(8)),
        "words": _vocabulary(arch, some),
        "constants": AdapterOperators({}, attention={1: ConstantKv(some(*kv[1:]), some(*kv[1:]))}),
        "soft": AdapterOperators({}, SoftPrompt(soft_tokens=some(3, arch.hidden_size))),
        "prefix": AdapterOperators({}, SoftPrompt(prefix=PrefixKv(some(*kv), some(*kv)))),
    }


def _vocabulary(arch: Arch, some: Callable[..., Any]) -> AdapterOperators:
    """Changes of embedding and head, in every form that kernels support."""
    vocab, hidden = arch.vocab_size, arch.hidden_size
    head = ModuleOperators(
        LowRank(some(4, hidden), some(4, vocab)),
        input_gain=torch.rand(hidden),
        bias=torch.rand(vocab),
    )
    tokens = VocabularyOperators(
        embedding=VocabularyRows(None, some(vocab, hidden)),
        low_rank=EmbeddingLowRank(some(vocab, 4), some(hidden, 4), torch.rand(hidden)),
        head=VocabularyRows(torch.arange(3), some(3, hidden)),
    )
    return AdapterOperators({}, head=head, tokens=tokens)


def _router(hidden: int, modules: int) -> TokenRouter:
    """A router of three components."""
    return TokenRouter(
        (torch.randn(16, hidden),),
        (torch.randn(16),),
        components=3,
        modules=modules,
        is_shared=True,
        temperature=0.7,
        top_k=2,
        is_renormalised=True,
        scale=1.5,
    )
