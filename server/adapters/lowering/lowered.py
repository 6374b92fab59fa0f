"""What a method makes of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint
from turret.server.adapters.facts import AdapterFacts
from turret.server.adapters.head import Head
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.words import Text


@dataclass(frozen=True, slots=True)
class Lowered:
    """An adapter as operators.

    Attributes:
        operators: CPU tensors that own their memory.
        ranks: Distinct ranks, ascending.
        target_modules: Distinct last components of the adapted paths, ascending.
        base_model: The base the checkpoint names, or "".
        warnings: Warnings for the operator; nothing here makes the result inexact.
        num_soft_tokens: Soft tokens that go before the prompt.
        num_prefix_positions: Positions before the prompt whose keys and values it brings.
        scalings: What a method folded into ``b`` of a module as its scaling; 1 where it is missing.
        components: Digests of the adapters it is built from.
        depends_on_base: Whether the base's weights or biases went into the operators, which are
            then lowered again when a merge changes the base. True where a method does not say.
        head: The labels and problem type of its classification head, or None.
        vocab_size: Rows of its vocabulary, where that has another size than the base's; else 0.
    """

    operators: AdapterOperators
    ranks: tuple[int, ...]
    target_modules: tuple[str, ...]
    base_model: str
    warnings: tuple[Text, ...] = ()
    num_soft_tokens: int = 0
    num_prefix_positions: int = 0
    scalings: Mapping[str, float] = field(default_factory=dict)
    components: tuple[str, ...] = ()
    depends_on_base: bool = True
    head: Head | None = None
    vocab_size: int = 0

    @property
    def num_bytes(self) -> int:
        return self.operators.num_bytes

    def facts(self, checkpoint: AdapterCheckpoint, method: str) -> AdapterFacts:
        """The facts to keep, without weights, about the adapter and its checkpoint."""
        return AdapterFacts(
            digest=checkpoint.digest,
            method=method,
            ranks=self.ranks,
            target_modules=self.target_modules,
            base_model=self.base_model,
            warnings=self.warnings,
            num_soft_tokens=self.num_soft_tokens,
            num_prefix_positions=self.num_prefix_positions,
            bytes_disk=checkpoint.bytes_disk,
            bytes_host=self.num_bytes,
            components=self.components,
            invocation=self.operators.invocation or (),
            labels=() if self.head is None else self.head.labels,
            problem_type="" if self.head is None else self.head.problem_type,
            vocab_size=self.vocab_size,
            first_pass=_first_pass(self.operators),
            chat_template=checkpoint.chat_template,
        )


def _first_pass(operators: AdapterOperators) -> str:
    router = operators.router
    if router is None:
        return ""
    return "base" if router.first_pass is None else "adapter"
