"""Lowers a checkpoint to operators: the method's own part, and the parts that all methods share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.component import FindComponent, find_no_component
from turret.server.adapters.lowering import Lowered
from turret.server.adapters.methods import check_common, method_for
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.dense import Dense
from turret.server.adapters.operators.vocabulary import HEAD, VocabularyOperators
from turret.server.adapters.peft_format.classifier_checkpoint import take_classifier
from turret.server.adapters.peft_format.expert_checkpoint import take_experts
from turret.server.adapters.peft_format.lora_rules import INVOCATION
from turret.server.adapters.peft_format.refusals import check_rank
from turret.server.adapters.peft_format.vocabulary_checkpoint import (
    VocabularyPart,
    fit_vocabulary,
    take_vocabulary,
)
from turret.server.errors import BudgetExceededError
from turret.server.words import Text, say


def lower_checkpoint(
    checkpoint: AdapterCheckpoint,
    base: BaseModel,
    max_rank: int | None = None,
    find_component: FindComponent = find_no_component,
    *,
    max_dense_bytes: int | None = None,
) -> tuple[str, Lowered]:
    """Chooses the method and makes the operators.

    Args:
        checkpoint: The checkpoint as read.
        base: The base as served.
        max_rank: The maximum rank; None for any.
        find_component: Finds an adapter that the config names as a component; raises
            AdapterComponentError if it cannot.
        max_dense_bytes: The maximum size of updates that are as large as the weights they change;
            None for any.

    Returns:
        The method's name, and the operators.

    Raises:
        AdapterCheckpointError: The checkpoint is unsupported or inconsistent. The error lists all
            faults.
        AdapterMismatchError: The adapter was made for another base.
        AdapterComponentError: Some components are not registered. The error lists all of them.
        BudgetExceededError: A rank over ``max_rank``, or bytes over ``max_dense_bytes``.
    """
    method = method_for(checkpoint)
    check_common(checkpoint, method)
    if method.is_dense(checkpoint.config):
        _check_dense(checkpoint, base, max_dense_bytes)
    base = replace(base, text_prefix=checkpoint.text_prefix)
    is_lora = method.on_vocabulary
    findings = Findings(checkpoint.path, base.name)
    # Faults of experts and of the vocabulary's size, on which all other checks depend.
    prerequisites = Findings(checkpoint.path, base.name)
    rest, classifier, head = take_classifier(checkpoint, base, findings)
    rest, experts, expert_ranks = take_experts(rest, base, prerequisites, max_rank, is_lora=is_lora)
    part = VocabularyPart.of(rest, base, prerequisites)
    added, vocab_size = fit_vocabulary(part, rest.config, base, prerequisites)
    prerequisites.raise_if_any()
    rest, base, tokens = take_vocabulary(rest, part, base, findings, is_lora=is_lora)
    reading = method.read(rest, base, max_rank, findings)
    reading.find_component = find_component
    lowered = method.lower(reading)
    operators, ranks = lowered.operators, {*lowered.ranks, *expert_ranks}
    if vocab_size and operators.invocation is not None:
        findings.add(INVOCATION, say("CONFLICTS_WITH", other="added tokens"))
        findings.raise_if_any()
    if tokens is not None and tokens.low_rank is not None:
        ranks.add(tokens.low_rank.rank)
    if added is not None:
        tokens = replace(tokens or VocabularyOperators(), added=added)
    # The method's reader has checked the ranks of linear modules; this checks all others.
    check_rank(checkpoint.path, max(ranks, default=0), max_rank)
    modules = dict(operators.modules)
    operators = replace(
        operators,
        head=modules.pop(HEAD, None),
        modules=modules,
        tokens=tokens,
        experts=experts,
        classifier=classifier,
    )
    return method.name, replace(
        lowered,
        operators=operators,
        ranks=tuple(sorted(ranks)),
        head=head,
        vocab_size=vocab_size,
        warnings=(*lowered.warnings, *_dense_warnings(operators)),
    )


def _check_dense(checkpoint: AdapterCheckpoint, base: BaseModel, max_bytes: int | None) -> None:
    """Rejects an adapter whose dense updates exceed the budget, before any of them is made.

    Args:
        checkpoint: A checkpoint of a method whose updates are dense.
        base: The base model.
        max_bytes: Maximum size of the updates; 0 if the server allows none, None for no limit.

    Raises:
        BudgetExceededError: The updates would take more than that.
    """
    if max_bytes is None:
        return
    adapted = {name for tensor in checkpoint.tensors for name in _folders(tensor)}
    sizes = [base.modules[name] for name in adapted & base.modules.keys()]
    needed = sum(m.out_features * m.in_features for m in sizes) * base.dtype.itemsize
    if needed <= max_bytes:
        return
    kind = str(checkpoint.config.get("peft_type")).upper()
    facts = {"path": checkpoint.path, "method": kind, "bytes": needed}
    if max_bytes:
        raise BudgetExceededError(say("OVER_HOST_MEMORY", **facts, host_bytes=max_bytes))
    raise BudgetExceededError(say("DENSE_NOT_ALLOWED", **facts, flag="--allow-dense-adapters"))


def _folders(path: str) -> Iterator[str]:
    """The paths of all modules that a tensor with this name may belong to."""
    while path := path.rpartition(".")[0]:
        yield path


def _dense_warnings(operators: AdapterOperators) -> tuple[Text, ...]:
    """The warnings about an adapter's whole matrices, if it has any."""
    modules = [*operators.modules.values(), *([operators.head] if operators.head else [])]
    parts = (part for module in modules for part in module.operators)
    total = sum(part.num_bytes for part in parts if isinstance(part, Dense))
    return (say("LARGE_UPDATES", bytes=total),) if total else ()
