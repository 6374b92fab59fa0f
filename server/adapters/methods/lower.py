"""Lowers a checkpoint to operators: the method's own part, and the parts that all methods share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint
from turret.server.adapters.component import FindComponent, find_no_component
from turret.server.adapters.lowering.lowered import Lowered
from turret.server.adapters.methods import check_common, method_for
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.dense import Dense
from turret.server.adapters.operators.vocabulary import EMBEDDING, HEAD, VocabularyOperators
from turret.server.adapters.peft_format.classifier_checkpoint import (
    ClassifierPart,
    take_classifier,
)
from turret.server.adapters.peft_format.expert_checkpoint import ExpertPart, take_experts
from turret.server.adapters.peft_format.lora_rules import INVOCATION
from turret.server.adapters.peft_format.refusals import check_rank
from turret.server.adapters.peft_format.resized_vocabulary import FittedCheckpoint, fit_vocabulary
from turret.server.adapters.peft_format.vocabulary_checkpoint import VocabularyPart, take_vocabulary
from turret.server.errors import AdapterCheckpointError, BudgetExceededError
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
        checkpoint: See ``Lower``, also for the next three.
        base: The base.
        max_rank: The maximum rank.
        find_component: Finds components.
        max_dense_bytes: The maximum size of updates that are as large as the weights they change;
            None for any.

    Returns:
        The method's name, and the operators.

    Raises:
        AdapterCheckpointError: Unsupported or inconsistent (names everything at fault).
        AdapterMismatchError: The adapter was made for another base.
        AdapterComponentError: Some components are not registered (names all).
        BudgetExceededError: A rank over ``max_rank``, or bytes over ``max_dense_bytes``.
    """
    method = method_for(checkpoint)
    check_common(checkpoint, method)
    if method.is_dense(checkpoint.config):
        _check_dense(checkpoint, base, max_dense_bytes)
    base = replace(base, text_prefix=checkpoint.text_prefix)
    classifier = take_classifier(checkpoint, base)
    experts = take_experts(classifier.rest, base, max_rank, is_lora=method.on_vocabulary)
    experts.findings.raise_if_any()
    fitted = fit_vocabulary(experts.rest, base)
    fitted.findings.raise_if_any()
    part = take_vocabulary(fitted.rest, base, is_lora=method.on_vocabulary)
    findings = classifier.findings
    findings.add_all(part.findings)
    lowered = None
    try:
        lowered = method.lower(part.rest, part.base, max_rank, find_component)
    except AdapterCheckpointError as error:
        if not findings.fields:
            raise
        for field, why in error.violations:
            assert isinstance(why, Text)
            findings.add(field, why)
    findings.raise_if_any()
    assert lowered is not None  # otherwise there was a fault
    joined = _with_head(_with_experts(_joined(lowered, part), experts), classifier)
    joined = _with_vocabulary(joined, fitted)
    # The reader has checked the ranks of linear modules; this checks all others.
    check_rank(checkpoint.path, max(joined.ranks, default=0), max_rank)
    return method.name, replace(
        joined, warnings=(*joined.warnings, *_dense_warnings(joined.operators))
    )


def _with_vocabulary(lowered: Lowered, fitted: FittedCheckpoint) -> Lowered:
    if not fitted.size:
        return lowered
    findings = fitted.findings
    if lowered.operators.invocation is not None:
        findings.add(INVOCATION, say("CONFLICTS_WITH", other="added tokens"))
        findings.raise_if_any()
    operators, leaves = lowered.operators, set[str]()
    if fitted.added is not None:
        tokens = operators.tokens or VocabularyOperators()
        operators = replace(operators, tokens=replace(tokens, added=fitted.added))
        leaves = {module.rpartition(".")[2] for module in (EMBEDDING, HEAD)}
    return replace(
        lowered,
        operators=operators,
        target_modules=tuple(sorted({*lowered.target_modules, *leaves})),
        vocab_size=fitted.size,
    )


def _with_head(lowered: Lowered, part: ClassifierPart) -> Lowered:
    if part.classifier is None:
        return lowered
    operators = replace(lowered.operators, classifier=part.classifier)
    return replace(lowered, operators=operators, head=part.head)


def _with_experts(lowered: Lowered, part: ExpertPart) -> Lowered:
    if part.updates is None:
        return lowered
    leaves = {name.rpartition(".")[2] for name in part.updates}
    return replace(
        lowered,
        operators=replace(lowered.operators, experts=part.updates),
        ranks=tuple(sorted({*lowered.ranks, *part.ranks})),
        target_modules=tuple(sorted({*lowered.target_modules, *leaves})),
    )


def _joined(lowered: Lowered, part: VocabularyPart) -> Lowered:
    """Joins both parts into one adapter, and moves the head out of the modules."""
    operators = lowered.operators
    if part.operators is None and not part.modules and HEAD not in operators.modules:
        return lowered
    head = operators.modules.get(HEAD)
    modules = {name: module for name, module in operators.modules.items() if name != HEAD}
    tokens = operators.tokens if part.operators is None else part.operators
    return replace(
        lowered,
        operators=replace(operators, modules=modules, head=head, tokens=tokens),
        ranks=tuple(sorted({*lowered.ranks, *([part.rank] if part.rank else [])})),
        target_modules=tuple(sorted({*lowered.target_modules, *part.modules})),
    )


def _check_dense(checkpoint: AdapterCheckpoint, base: BaseModel, max_bytes: int | None) -> None:
    """Rejects an adapter whose dense updates exceed the budget, before any of them is made.

    Args:
        checkpoint: A checkpoint of a method whose updates are dense.
        base: The base model.
        max_bytes: Maximum size of the updates; 0 if the server allows none, None for no limit.

    Raises:
        BudgetExceededError: The updates would take more.
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
        raise BudgetExceededError(say("DENSE_OVER_BUDGET", **facts, host_bytes=max_bytes))
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
