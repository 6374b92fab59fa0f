"""Which rows of a step need another embedding or head than the base's, and what they get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from turret.kernels.gpu.tables import upload
from turret.server.adapters.device.store import AdapterStore
from turret.server.adapters.device.vocabulary import VocabularyChange, VocabularyGroup
from turret.server.engine.scheduling.sequence import Sequence

NOTHING_ADDED: Mapping[Sequence, torch.Tensor] = {}


class Projects(Protocol):
    """What a plan needs of a decoder."""

    def some_logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor: ...


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


def added_logits(
    rows: Iterable[tuple[Sequence, range]],
    hidden: torch.Tensor,
    decoder: Projects,
    store: AdapterStore,
) -> Mapping[Sequence, torch.Tensor]:
    """The logits of tokens that the base lacks.

    Each sequence's are computed on their own: they are those it has alone.

    Args:
        rows: Sequences and their rows; the store holds what their mixes name.
        hidden: Final-norm hidden states, ``[at least all rows, hidden]``.
        decoder: Projects them.
        store: Holds the adapters.

    Returns:
        For each sequence whose adapter adds tokens, ``[its rows, tokens]`` fp32.
    """
    found = NOTHING_ADDED
    for sequence, its_rows in rows:
        if not sequence.vocab_size:
            continue
        for adapter, _ in sequence.mix.members:
            change = store.vocabulary(adapter.key)
            if change is not None and change.tokens is not None and change.tokens.added is not None:
                states = hidden[its_rows.start : its_rows.stop]
                logits = decoder.some_logits(states, change.tokens.added.head)
                found = {**found, sequence: logits}
    return found


def own_logits(row: torch.Tensor, sequence: Sequence, added: torch.Tensor | None) -> torch.Tensor:
    """A row's logits over the tokens that its sequence is drawn of.

    Args:
        row: Over the base's tokens, ``[..., vocab]``.
        sequence: Whose row it is.
        added: Over those that an adapter adds, ``[..., tokens]``, or None.

    Returns:
        ``[..., sequence.vocab_size]``, memory of its own; ``row`` where those are the base's.
    """
    if added is not None:
        return torch.cat((row, added), dim=-1)
    return row[..., : sequence.vocab_size].clone() if sequence.vocab_size else row
