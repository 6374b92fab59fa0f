"""Which rows of a step need another embedding or head than the base's."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from turret.kernels.gpu.tables.staged_buffer import upload
from turret.server.adapters.device.store import AdapterStore
from turret.server.adapters.device.vocabulary import VocabularyChange, VocabularyGroup
from turret.server.engine.scheduling.sequence import Sequence


def plan_vocabulary(
    rows: Iterable[tuple[Sequence, range]], store: AdapterStore, device: torch.device
) -> list[VocabularyGroup]:
    """Groups rows by what their mixes do to the vocabulary.

    Args:
        rows: Sequences and their rows; the store holds what their mixes name.
        store: Holds the adapters.
        device: Where the step is computed.

    Returns:
        One group per mix that changes anything; none for most steps.
    """
    numbers: dict[tuple[tuple[str, float], ...], list[int]] = {}
    members: dict[tuple[tuple[str, float], ...], list[tuple[VocabularyChange, float]]] = {}
    for sequence, its_rows in rows:
        found = [
            (adapter.key, weight, change)
            for adapter, weight in sequence.active_mix.members
            # Weight 0 adds nothing, not even an overflow.
            if weight and (change := store.vocabulary(adapter.key)) is not None
        ]
        if found:
            mix = tuple((key, weight) for key, weight, _ in found)
            numbers.setdefault(mix, []).extend(its_rows)
            members[mix] = [(change, weight) for _, weight, change in found]
    return [
        VocabularyGroup(upload(torch.tensor(numbers[mix]), device), members[mix]) for mix in numbers
    ]


def changed_embeddings(
    rows: Iterable[tuple[Sequence, range]], store: AdapterStore, device: torch.device
) -> list[VocabularyGroup]:
    """The groups of rows whose embedding is another; see ``plan_vocabulary``."""
    groups = plan_vocabulary(rows, store, device)
    return [g for g in groups if any(change.changes_embedding for change, _ in g.members)]


def changed_heads(
    rows: Iterable[tuple[Sequence, range]], store: AdapterStore, device: torch.device
) -> list[VocabularyGroup]:
    """The groups of rows whose head is another; see ``plan_vocabulary``."""
    groups = plan_vocabulary(rows, store, device)
    return [g for g in groups if any(change.changes_head for change, _ in g.members)]
