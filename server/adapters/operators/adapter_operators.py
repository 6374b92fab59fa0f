"""The operators that every adapter method lowers to, per linear module of the base model.

For one module, one token ``x`` and the request's mix ``{(k, w_k)}``::

    y = G ⊙ (W x) + b + Σ_k w_k · Δ_k(x)          G = 1 + Σ_k w_k (g_k − 1)

Nothing below this file knows the name of a method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from turret.server.adapters.operators.classifier import Classifier
from turret.server.adapters.operators.gate import Gate
from turret.server.adapters.operators.soft_prompt import SoftPrompt
from turret.server.adapters.operators.token_router import TokenRouter
from turret.server.adapters.operators.updates import (
    Circulant,
    Dense,
    ExpertLowRank,
    Hadamard,
    Kronecker,
    LowRank,
    Sparse,
)
from turret.server.adapters.operators.vocabulary import VocabularyOperators


@dataclass(frozen=True, slots=True)
class InputBlocks:
    """``Δ(x) = g ⊙ W (D x)``: the base multiplies ``x + D x`` instead of ``x`` (OFT, BOFT).

    ``D`` is block-diagonal: with ``x`` read as a matrix with a row of ``b`` inputs per block,
    ``(D x)_n = x_n blocks_n``. ``g`` is the gain of the same adapter's module, or 1: an adapter's
    gain applies to what its own blocks change and to nobody else's.

    Attributes:
        blocks: ``[in / b, b, b]``, or ``[1, b, b]`` for one that serves all; serving dtype,
            contiguous. Of a rotation ``R`` it is ``R − I``, so that rounding is relative to the
            change.
    """

    blocks: torch.Tensor

    @property
    def size(self) -> int:
        """Inputs of a block."""
        return self.blocks.shape[1]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.blocks,)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> InputBlocks:
        return InputBlocks(next(tensors))


@dataclass(frozen=True, slots=True)
class PairRotation:
    """``Δ(x)_o = sine_o (W x)_p(o)``: with a gain, pairs of outputs are turned and scaled (RoAd).

    ``p(o)`` is half a group behind an output of the first half of its group, and half a group
    before one of the second.

    Attributes:
        sine: ``[out_features]``, fp32, signs included.
        group: Outputs of a group, even.
    """

    sine: torch.Tensor
    group: int

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.sine,)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> PairRotation:
        return PairRotation(next(tensors), self.group)


@dataclass(frozen=True, slots=True)
class ModulatedBase:
    """``Δ(x) = (W ⊙ bᵀ a) x = Σ_r b_r ⊙ W (a_r ⊙ x)`` (HiRA): the base multiplies ``r`` more rows.

    Attributes:
        a: ``[rank, in_features]``, serving dtype, contiguous.
        b: ``[rank, out_features]``, serving dtype, contiguous.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.a, self.b)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> ModulatedBase:
        return ModulatedBase(next(tensors), next(tensors))


@dataclass(frozen=True, slots=True)
class ModuleOperators:
    """What one adapter does to one linear module.

    Attributes:
        low_rank: The low-rank update, or None.
        hadamard: The Hadamard update, or None.
        kronecker: The Kronecker update, or None.
        sparse: Entries of the weight, or None.
        gate: Low-rank updates weighted per token, or None.
        circulant: The block-circulant update, or None.
        dense: An update as large as the weight, or None.
        modulated: The base's weight times a low-rank matrix, entry by entry, or None.
        input_blocks: Blocks that turn the base's input, or None.
        pairs: Outputs of the base that are added to others, or None. Not beside a change of input.
        gain: ``g``, ``[out_features]``, fp32, applied to the bias-free base result, or None (1).
        input_gain: ``l``, ``[in_features]``, fp32: the base multiplies ``l ⊙ x`` instead of ``x``
            (IA3 on feed-forward inputs); other operators see ``x``. None is 1. Not beside a gain:
            the sum above does not say whether that would scale what the input gain changes.
        bias: Added to the base bias, ``[out_features]``, fp32, or None (0).
    """

    low_rank: LowRank | None = None
    hadamard: Hadamard | None = None
    kronecker: Kronecker | None = None
    sparse: Sparse | None = None
    gate: Gate | None = None
    circulant: Circulant | None = None
    dense: Dense | None = None
    modulated: ModulatedBase | None = None
    input_blocks: InputBlocks | None = None
    pairs: PairRotation | None = None
    gain: torch.Tensor | None = None
    input_gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        changes = [self.input_gain, self.input_blocks, self.pairs]
        assert changes.count(None) >= 2, "an input is changed in one way"
        assert self.gain is None or self.input_gain is None, "a module has one kind of gain"

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor, in the order of the fields and of their own tensors."""
        found: list[torch.Tensor] = []
        for name in self.__slots__:
            part = getattr(self, name)
            if isinstance(part, torch.Tensor):
                found.append(part)
            elif part is not None:
                found += part.tensors()
        return tuple(found)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> ModuleOperators:
        """The same operators with other tensors, given in the order of ``tensors()``."""
        made: dict[str, Any] = {}
        for name in self.__slots__:
            part = getattr(self, name)
            if isinstance(part, torch.Tensor):
                made[name] = next(tensors)
            elif part is not None:
                made[name] = part.with_tensors(tensors)
        return ModuleOperators(**made)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def rank(self) -> int:
        """Rank of the low-rank update (the only operator that takes up ranks of the pack)."""
        return self.low_rank.rank if self.low_rank is not None else 0


@dataclass(frozen=True, slots=True)
class ConstantKv:
    """Keys and values of one layer that every token attends to, in a softmax of their own.

    Adds ``softmax(q keysᵀ) values`` to what attention gives, per head (LLaMA-Adapter, arXiv
    2303.16199).

    Attributes:
        keys: ``[positions, kv_heads, head_dim]``, serving dtype, contiguous: not rotated, and the
            scale of the scores folded in.
        values: Same shape, the gate folded in.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.keys, self.values)


@dataclass(frozen=True, slots=True)
class AdapterOperators:
    """Everything one adapter does.

    Attributes:
        modules: Full module path in the base (``model.layers.0.self_attn.q_proj``) → operators.
        soft_prompt: What it puts before the prompt, or None.
        attention: Number of a layer → keys and values that its attention has besides, or None.
        experts: Path of a fused projection of experts (``model.layers.0.mlp.experts.down_proj``) →
            what it does to each, or None.
        head: What it does to the output head as a linear module, or None.
        tokens: What it does to rows of the embedding and the head, or None.
        invocation: Tokens from whose last occurrence in the prompt on it acts, and not before; None
            if it acts everywhere.
        classifier: A classification head for its final states, or None.
        router: What gates with a ``GivenScore`` are told by, or None.
        num_bytes: Bytes of all tensors.
        num_low_rank_bytes: Bytes of the low-rank updates among them.
        rank: Rank of the largest low-rank update of ``modules``, or 0.
    """

    modules: Mapping[str, ModuleOperators]
    soft_prompt: SoftPrompt | None = None
    attention: Mapping[int, ConstantKv] | None = None
    experts: Mapping[str, ExpertLowRank] | None = None
    head: ModuleOperators | None = None
    tokens: VocabularyOperators | None = None
    invocation: tuple[int, ...] | None = None
    classifier: Classifier | None = None
    router: TokenRouter | None = None
    # Summed once: the scheduler asks for those of all running adapters with every admission.
    num_bytes: int = field(init=False)
    num_low_rank_bytes: int = field(init=False)
    rank: int = field(init=False)

    def __post_init__(self) -> None:
        modules = self.modules.values()
        others = (self.soft_prompt, self.head, self.tokens, self.classifier, self.router)
        experts = () if self.experts is None else self.experts.values()
        constants = () if self.attention is None else self.attention.values()
        parts = [*modules, *experts, *constants, *(other for other in others if other is not None)]
        set_once = object.__setattr__
        set_once(self, "num_bytes", sum(part.num_bytes for part in parts))
        low_rank = [module.low_rank for module in modules if module.low_rank is not None]
        set_once(self, "num_low_rank_bytes", sum(update.num_bytes for update in low_rank))
        set_once(self, "rank", max((module.rank for module in modules), default=0))

    @property
    def changes_vocabulary(self) -> bool:
        """Whether the embedding or the head is another one under this adapter."""
        return self.head is not None or self.tokens is not None
