"""The embedding and the head for those rows of a step whose adapters change them.

Rows are grouped by mix. A group's calls use only its own rows and its own adapters' tensors. In
each call, the bits of a row do not depend on the other rows. The members of a mix are added in the
request's order. A row therefore has the same bits as if it were computed alone. Rows outside the
groups, including those of the base alone, are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from turret.server.adapters.operators import BaseRows
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.vocabulary import VocabularyOperators


@dataclass(frozen=True, slots=True)
class VocabularyChange:
    """One adapter's changes to the embedding and the head; tensors are on the step's device."""

    head: ModuleOperators | None
    tokens: VocabularyOperators | None

    @property
    def changes_embedding(self) -> bool:
        return self.tokens is not None and self.tokens.changes_embedding

    @property
    def changes_head(self) -> bool:
        return self.head is not None or (self.tokens is not None and self.tokens.head is not None)


@dataclass(frozen=True, slots=True)
class VocabularyGroup:
    """Rows that share one mix: their numbers, ``[n]`` int64, and its members with weights."""

    rows: torch.Tensor
    members: Sequence[tuple[VocabularyChange, float]]


def change_embeddings(
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    embedding: torch.Tensor,
    groups: Sequence[VocabularyGroup],
) -> None:
    """Set the groups' rows of ``hidden`` to ``e(t) + Σ_k w_k (e_k(t) − e(t))``, in place.

    Args:
        hidden: The base's embeddings, ``[num_rows, hidden]``.
        token_ids: ``[num_rows]`` int64.
        embedding: The base's matrix, ``[vocab, hidden]``.
        groups: The groups; a row is in at most one.
    """
    for group in groups:
        tokens = token_ids.index_select(0, group.rows)
        base = F.embedding(tokens, embedding).float()
        total = base.clone()
        for change, weight in group.members:
            if change.tokens is None:
                continue
            if change.tokens.embedding is not None:
                total += weight * change.tokens.embedding.change(tokens, base)
            if change.tokens.low_rank is not None:
                total += weight * change.tokens.low_rank.change(tokens, base)
        hidden.index_copy_(0, group.rows, total.to(hidden.dtype))


def change_logits(
    x: torch.Tensor,
    y: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    groups: Sequence[VocabularyGroup],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of a step whose adapters change the head.

    Args:
        x: Final hidden states, ``[num_rows, hidden]``.
        y: The base's logits of these states, ``[num_rows, vocab]``, dtype of ``x``.
        head: The base's head, ``[rows, hidden]`` → ``[rows, vocab]``.
        groups: The groups; a row is in at most one.
        out: Memory for the logits, ``[at least num_rows, vocab]`` fp32; None to allocate it.

    Returns:
        ``[num_rows, vocab]`` fp32.
    """
    logits = y.float() if out is None else out[: len(y)].copy_(y)
    for group in groups:
        inputs, base = x.index_select(0, group.rows), y.index_select(0, group.rows)
        total = base.to(torch.float32, copy=True)
        for change, weight in group.members:
            if change.tokens is not None and change.tokens.head is not None:
                change.tokens.head.add(total, inputs, base, weight)
            if change.head is not None:
                change.head.add(total, inputs, BaseRows(inputs, head, result=base), weight)
        logits.index_copy_(0, group.rows, total)
    return logits


def vocabulary_change(operators: AdapterOperators, device: torch.device) -> VocabularyChange | None:
    """An adapter's changes to embedding and head, or None; on a GPU, their tensors are copied."""
    if not operators.changes_vocabulary:
        return None
    change = VocabularyChange(head=operators.head, tokens=operators.tokens)
    return change if device.type == "cpu" else _moved(change, device, {})


def _moved(value: Any, device: torch.device, done: dict[int, Any]) -> Any:
    """``value`` with every tensor on the device; tied tensors are moved once."""
    if id(value) in done:
        return done[id(value)]
    result = value
    if isinstance(value, torch.Tensor):
        result = value.to(device)
    elif isinstance(value, ModuleOperators):
        result = value.with_tensors(tensor.to(device) for tensor in value.tensors())
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _moved(getattr(value, f.name), device, done) for f in fields(value)}
        result = replace(value, **parts)
    done[id(value)] = result
    return result
