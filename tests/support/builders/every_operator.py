"""Adapters that together use every operator, with random tensors."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

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
from turret.server.adapters.operators.vectors import Gain
from turret.server.adapters.operators.vocabulary import (
    EmbeddingLowRank,
    VocabularyOperators,
    VocabularyRows,
)
from turret.server.models.decoding.arch import Arch


def every_operator(arch: Arch, dtype: torch.dtype) -> dict[str, AdapterOperators]:
    """Adapters that together use every operator."""

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    everywhere = functools.partial(_everywhere, arch)

    def low_rank(out: int, inner: int) -> ModuleOperators:
        factors = LowRank(some(4, inner), some(4, out))
        return ModuleOperators(low_rank=factors, gain=torch.rand(out), bias=torch.rand(out))

    def other(out: int, inner: int) -> ModuleOperators:
        hadamard = Hadamard(some(out, 3), some(3, inner), some(out, 3), some(3, inner))
        kronecker = Kronecker(some(8, 8), (some(out // 8, 2), some(2, inner // 8)))
        starts = torch.arange(out + 1, dtype=torch.int32)
        entries = Sparse(some(out, 1)[:, 0], torch.zeros(out, dtype=torch.uint16), starts)
        return ModuleOperators(
            hadamard=hadamard, kronecker=kronecker, sparse=entries, input_gain=torch.rand(inner)
        )

    def turned(out: int, inner: int) -> ModuleOperators:
        return ModuleOperators(input_blocks=InputBlocks(some(inner // 8, 8, 8)))

    def paired(out: int, inner: int) -> ModuleOperators:
        return ModuleOperators(
            circulant=Circulant(some(out // 8, inner // 8, 8)),
            dense=Dense(some(out, inner)),
            modulated=ModulatedBase(some(2, inner), some(2, out)),
            pairs=PairRotation(torch.rand(out), 8),
        )

    def scaled(out: int, inner: int) -> ModuleOperators:
        return turned(out, inner).with_operator(Gain(torch.rand(out)))

    def gated(out: int, inner: int) -> ModuleOperators:
        score = QueryScore(some(4, inner), torch.rand(16, 4))
        return ModuleOperators(gate=Gate(some(16, inner), some(16, out), score, (0, 5, 12)))

    def routed(out: int, inner: int) -> ModuleOperators:
        score = PrototypeScore(torch.randn(3, inner), 2, 0.7)
        return ModuleOperators(gate=Gate(some(16, inner), some(16, out), score, (0, 4, 8, 12)))

    numbers = itertools.count()

    def given(out: int, inner: int) -> ModuleOperators:
        score = GivenScore(next(numbers))
        return ModuleOperators(gate=Gate(some(16, inner), some(16, out), score, (0, 4, 8, 12)))

    weighed = everywhere(given)
    router = _router(arch.hidden_size, len(weighed.modules))
    soft = SoftPrompt(soft_tokens=some(3, arch.hidden_size))
    kv = (arch.num_layers, 5, arch.num_kv_heads, arch.head_dim)
    prefix = SoftPrompt(prefix=PrefixKv(some(*kv), some(*kv)))
    return {
        "low": everywhere(low_rank),
        "other": everywhere(other),
        "gated": everywhere(gated),
        "routed": everywhere(routed),
        "router": dataclasses.replace(weighed, router=router),
        "turned": everywhere(turned),
        "scaled": everywhere(scaled),
        "paired": everywhere(paired),
        "words": _vocabulary(arch, some),
        "constants": AdapterOperators({}, attention={1: ConstantKv(some(*kv[1:]), some(*kv[1:]))}),
        "soft": AdapterOperators({}, soft),
        "prefix": AdapterOperators({}, prefix),
    }


def _everywhere(
    arch: Arch, make: Callable[[int, int], ModuleOperators], **more: Any
) -> AdapterOperators:
    """The result of ``make`` for each linear module of the layers."""
    return AdapterOperators(
        {
            f"model.layers.{layer}.{path}": make(out, inner)
            for layer in range(arch.num_layers)
            for slices in arch.linears().values()
            for path, out, inner in slices
        },
        **more,
    )


def _vocabulary(arch: Arch, some: Callable[..., torch.Tensor]) -> AdapterOperators:
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
