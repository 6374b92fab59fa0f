"""A checkpoint to operators: the vocabulary's part, then the method's."""

from __future__ import annotations

from dataclasses import replace

from turret.server.adapters.base import HEAD, BaseModel
from turret.server.adapters.checkpoint import AdapterCheckpoint
from turret.server.adapters.lowered import Lowered
from turret.server.adapters.methods import method_for
from turret.server.adapters.module_checkpoint import check_rank_budget
from turret.server.adapters.vocabulary_checkpoint import VocabularyPart, take_vocabulary
from turret.server.errors import AdapterCheckpointError


def lower_checkpoint(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None
) -> tuple[str, Lowered]:
    """Chooses the method and makes the operators.

    Returns:
        The method's name, and what was made.

    Raises:
        AdapterCheckpointError: Unsupported or inconsistent (names everything at fault).
        AdapterMismatchError: Made for another base.
        BudgetExceededError: A rank over ``max_rank``.
    """
    method = method_for(checkpoint)
    part = take_vocabulary(checkpoint, base)
    violations = part.findings.violations
    lowered = None
    try:
        lowered = method.lower(part.rest, part.base, max_rank)
    except AdapterCheckpointError as error:
        if not violations:
            raise
        for field, why in error.violations:
            violations.add(field, why)
    part.findings.raise_if_any(checkpoint, base)
    assert lowered is not None  # or there was a violation
    check_rank_budget(checkpoint.path, part.rank, max_rank)
    return method.name, _joined(lowered, part)


def _joined(lowered: Lowered, part: VocabularyPart) -> Lowered:
    """One adapter of both parts; the head leaves the modules of the decoder layers."""
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
