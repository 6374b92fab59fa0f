"""The operators to which every method is lowered, for each linear module of an adapter.

For one module, one token ``x`` and the request's mix ``{(k, w_k)}``::

    y = G ⊙ (W x) + b + Σ_k w_k · Δ_k(x)          G = 1 + Σ_k w_k (g_k − 1)

``b`` is the base's bias. ``G`` collects the gains ``g_k``, and ``Δ_k`` is the sum over adapter
``k``'s other operators for the module. In the code, gains and biases are operators like all others.
The code that applies operators does not depend on the names of methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TypeVar

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseModule
from turret.server.adapters.operators import BaseRows, Operator, ServedWeight
from turret.server.adapters.operators.classifier import Classifier
from turret.server.adapters.operators.constant_kv import ConstantKv
from turret.server.adapters.operators.input_blocks import InputBlocks
from turret.server.adapters.operators.low_rank import ExpertLowRank, LowRank
from turret.server.adapters.operators.pair_rotation import PairRotation
from turret.server.adapters.operators.soft_prompt import SoftPrompt
from turret.server.adapters.operators.token_router import TokenRouter
from turret.server.adapters.operators.vectors import Bias, Gain, InputGain, Vector
from turret.server.adapters.operators.vocabulary import VocabularyOperators

O = TypeVar("O", bound=Operator)  # noqa: E741

_VECTORS: Mapping[str, type[Vector]] = {one.name: one for one in (Gain, InputGain, Bias)}


@dataclass(frozen=True, slots=True, init=False)
class ModuleOperators:
    """One adapter's changes to one linear module.

    Args:
        given: Operators, at most one of each kind; None stands for no operator.
        named: More operators; their names only help the reader. A tensor becomes the operator that
            its name selects: ``gain``, ``input_gain`` or ``bias``.

    Attributes:
        operators: All operators.
    """

    operators: tuple[Operator, ...]

    def __init__(self, *given: Operator | None, **named: Operator | torch.Tensor | None) -> None:
        made = [
            _VECTORS[name](part) if isinstance(part, torch.Tensor) else part
            for name, part in named.items()
        ]
        found = tuple(part for part in (*given, *made) if part is not None)
        object.__setattr__(self, "operators", found)
        kinds = [type(part) for part in found]
        assert len(set(kinds)) == len(kinds), "one operator of a kind"
        changes = {InputGain, InputBlocks, PairRotation} & set(kinds)
        assert len(changes) < 2, "an input is changed in one way"
        assert not {Gain, InputGain} <= set(kinds), "a module has one kind of gain"

    def get(self, kind: type[O]) -> O | None:
        """The operator of a kind, or None."""
        for part in self.operators:
            if isinstance(part, kind):
                return part
        return None

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        """Applies all operators; see ``Operator.add``. Sets the gain of ``base``."""
        base.gain = self.gain
        for part in self.operators:
            part.add(y, x, base, weight)

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        """Adds all dense forms; see ``Operator.add_dense``. Sets the gain of ``served``."""
        served.gain = self.gain
        for part in self.operators:
            part.add_dense(total, served, weight)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor, operator by operator."""
        return tuple(tensor for part in self.operators for tensor in part.tensors())

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> ModuleOperators:
        """The same operators with other tensors, given in the order of ``tensors()``."""
        return ModuleOperators(*(part.with_tensors(tensors) for part in self.operators))

    def with_operator(self, operator: Operator) -> ModuleOperators:
        """The same operators with this one added, or replacing the one of its kind."""
        others = (part for part in self.operators if type(part) is not type(operator))
        return ModuleOperators(*others, operator)

    @property
    def low_rank(self) -> LowRank | None:
        return self.get(LowRank)

    @property
    def is_low_rank(self) -> bool:
        """Whether there is a low-rank update and nothing else."""
        return len(self.operators) == 1 and self.low_rank is not None

    @property
    def gain(self) -> torch.Tensor | None:
        found = self.get(Gain)
        return None if found is None else found.values

    @property
    def input_gain(self) -> torch.Tensor | None:
        found = self.get(InputGain)
        return None if found is None else found.values

    @property
    def bias(self) -> torch.Tensor | None:
        found = self.get(Bias)
        return None if found is None else found.values

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.operators)

    @property
    def rank(self) -> int:
        """Rank of the low-rank update (the only operator that takes up ranks of a pack)."""
        return self.low_rank.rank if self.low_rank is not None else 0


@dataclass(frozen=True)
class AdapterOperators:
    """All changes of one adapter.

    Attributes:
        modules: Full module path in the base (``model.layers.0.self_attn.q_proj``) → operators.
        soft_prompt: Soft tokens, or keys and values, to put before the prompt, or None.
        attention: Number of a layer → additional keys and values of its attention, or None.
        experts: Path of a fused projection of experts (``model.layers.0.mlp.experts.down_proj``) →
            the updates of all its experts, or None.
        head: Changes to the output head as a linear module, or None.
        tokens: Changes to rows of the embedding and the head, or None.
        invocation: Tokens; the adapter applies only from their last occurrence in the prompt on.
            None if it applies everywhere.
        classifier: A classification head for the final hidden states, or None.
        router: Computes the scalings of gates with a ``GivenScore``, or None.
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

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        # Cached, because the scheduler reads this of every running adapter at each admission.
        others = (self.soft_prompt, self.head, self.tokens, self.classifier, self.router)
        experts = () if self.experts is None else self.experts.values()
        constants = () if self.attention is None else self.attention.values()
        given = (other for other in others if other is not None)
        return sum(
            part.num_bytes for part in [*self.modules.values(), *experts, *constants, *given]
        )

    @cached_property
    def num_low_rank_bytes(self) -> int:
        """Bytes of the low-rank updates of ``modules``."""
        updates = (module.low_rank for module in self.modules.values())
        return sum(update.num_bytes for update in updates if update is not None)

    @cached_property
    def rank(self) -> int:
        """Rank of the largest low-rank update of ``modules``, or 0."""
        return max((module.rank for module in self.modules.values()), default=0)

    @property
    def changes_vocabulary(self) -> bool:
        """Whether the adapter changes the embedding or the head."""
        return self.head is not None or self.tokens is not None


_WORDS = {"experts": "update of experts", "attention": "prompt that layers attend to"}


def beyond_updates(operators: AdapterOperators) -> tuple[str, ...]:
    """Names of an adapter's changes other than those to weights and biases, e.g. a soft prompt."""
    return _beyond(operators, lambda part: part.has_dense)


def beyond_low_rank(operators: AdapterOperators, *others: type[Operator]) -> tuple[str, ...]:
    """Names of an adapter's parts other than low-rank updates and operators of kinds ``others``."""
    return _beyond(operators, lambda part: isinstance(part, (LowRank, *others)))


def _beyond(operators: AdapterOperators, is_fit: Callable[[Operator], bool]) -> tuple[str, ...]:
    parts = {field.name for field in fields(operators) if field.init} - {"modules"}
    found = {name for name in parts if getattr(operators, name) is not None}
    for module in operators.modules.values():
        found |= {part.name for part in module.operators if not is_fit(part)}
    return tuple(sorted(_WORDS.get(name, name.replace("_", " ")) for name in found))


def is_low_rank(module: ModuleOperators) -> bool:
    """Whether ``ΔW`` is only ``B A``, or 0."""
    return all(isinstance(part, LowRank | Bias) for part in module.operators)


def has_update(module: ModuleOperators) -> bool:
    """Whether the module has a ``ΔW``, not only a bias."""
    return any(not isinstance(part, Bias) for part in module.operators)


def add_delta(
    total: torch.Tensor, operators: ModuleOperators, module: BaseModule, weight: float = 1.0
) -> torch.Tensor:
    """Adds ``weight · ΔW`` in place, where ``ΔW`` is the sum of the operators' dense forms.

    For DoRA this is ``g ⊙ (W + s·B A) − W``, because ``B`` already contains ``g``.

    Args:
        total: ``[out_features, in_features]``, fp32, on the CPU.
        operators: Operators in any dtype; computed in fp32.
        module: The base's module; dequantised at most once, and only if an operator needs it.
        weight: The member's weight.

    Returns:
        ``total``.
    """
    operators.add_dense(total, ServedWeight(module.dequantize), weight)
    return total


def frobenius_norm(matrix: torch.Tensor) -> float:
    """The root of the sum of all squares, summed in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
