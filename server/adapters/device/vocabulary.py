"""The embedding and the head of one step's rows, where their adapters change them.

Rows are grouped by mix. A group's calls take only its own rows and only its own adapters' tensors,
each call gives a row the same bits whatever the other rows are, and the members of a mix are added
in the request's order: so a row's bits are those it has alone. Rows outside the groups, those of
the bare base among them, are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from turret.kernels.adapters.circulant import circulant_reference, spectrum
from turret.kernels.adapters.dense import dense_reference
from turret.kernels.adapters.hadamard_expand import hadamard_expand_reference
from turret.kernels.adapters.hadamard_shrink import hadamard_shrink_reference
from turret.kernels.adapters.input_blocks import input_blocks_reference
from turret.kernels.adapters.kronecker import kronecker_reference
from turret.kernels.adapters.modulated_base import modulated_reference
from turret.kernels.adapters.pair_rotation import pair_rotation_reference
from turret.kernels.adapters.sparse import Jagged, sparse_reference
from turret.kernels.rows.linear import max_reduction, row_addmm_, row_linear
from turret.kernels.rows.product import row_product
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.vocabulary import (
    EmbeddingLowRank,
    VocabularyOperators,
    VocabularyRows,
)


@dataclass(frozen=True, slots=True)
class VocabularyChange:
    """What one adapter of a mix does; its tensors are on the device of the step."""

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
    """``e(t) + Σ_k w_k (e_k(t) − e(t))`` for the rows of the groups, in place.

    Args:
        hidden: The base's embeddings, ``[num_rows, hidden]``.
        token_ids: ``[num_rows]`` int64.
        embedding: The base's matrix, ``[vocab, hidden]``.
        groups: Every row in at most one.
    """
    for group in groups:
        tokens = token_ids.index_select(0, group.rows)
        base = F.embedding(tokens, embedding).float()
        total = base.clone()
        for change, weight in group.members:
            if change.tokens is None:
                continue
            if change.tokens.embedding is not None:
                total += weight * _row_change(change.tokens.embedding, tokens, base)
            if change.tokens.low_rank is not None:
                total += weight * _low_rank_change(change.tokens.low_rank, tokens, base)
        hidden.index_copy_(0, group.rows, total.to(hidden.dtype))


def _row_change(rows: VocabularyRows, tokens: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """``e_k(t) − e(t)``, zero for tokens without a row."""
    if rows.ids is None:
        return F.embedding(tokens, rows.values).float() - base
    places = torch.searchsorted(rows.ids, tokens).clamp_(max=len(rows.ids) - 1)
    is_there = rows.ids.index_select(0, places) == tokens
    change = rows.values.index_select(0, places).float() - base
    return change.masked_fill_(~is_there.unsqueeze(1), 0.0)


def _low_rank_change(
    update: EmbeddingLowRank, tokens: torch.Tensor, base: torch.Tensor
) -> torch.Tensor:
    a = F.embedding(tokens, update.a).float().unsqueeze(1)
    change = row_product(a, update.b.float()).squeeze(1)
    return change if update.gain is None else change + (update.gain - 1.0) * base


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
        y: The base's logits of them, ``[num_rows, vocab]``, dtype of ``x``.
        head: The base's head, ``[rows, hidden]`` → ``[rows, vocab]``.
        groups: Every row in at most one.
        out: Where they go, ``[at least num_rows, vocab]`` fp32; None for memory of their own.

    Returns:
        ``[num_rows, vocab]`` fp32.
    """
    logits = y.float() if out is None else out[: len(y)].copy_(y)
    for group in groups:
        inputs, base = x.index_select(0, group.rows), y.index_select(0, group.rows)
        total = base.to(torch.float32, copy=True)
        for change, weight in group.members:
            if change.tokens is not None and change.tokens.head is not None:
                _add_rows(total, base, change.tokens.head, weight, inputs)
            if change.head is not None:
                _add_linear(total, base, change.head, weight, inputs, head)
        logits.index_copy_(0, group.rows, total)
    return logits


def _add_rows(
    total: torch.Tensor, base: torch.Tensor, rows: VocabularyRows, weight: float, x: torch.Tensor
) -> None:
    """``Σ w (v_t x − h_t x)`` for the head's other rows ``v``."""
    # A whole matrix has the base's shape, which was probed at the start.
    found = row_linear(x, rows.values, probe=rows.ids is None).float()
    if rows.ids is None:
        total += weight * (found - base.float())
    else:
        change = found - base.index_select(1, rows.ids).float()
        total.index_add_(1, rows.ids, change, alpha=weight)


def _add_linear(
    total: torch.Tensor,
    base: torch.Tensor,
    ops: ModuleOperators,
    weight: float,
    x: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """The operators of a linear module, as ``AdapterStep`` applies them to a layer's."""
    if ops.gain is not None:
        total += weight * (ops.gain - 1.0) * base.float()
    if ops.input_gain is not None:
        total += weight * head((x.float() * (ops.input_gain - 1.0)).to(x.dtype)).float()
    if ops.input_blocks is not None:
        change = head(input_blocks_reference(x, ops.input_blocks.blocks).to(x.dtype)).float()
        total += weight * (change if ops.gain is None else change * ops.gain)
    if ops.pairs is not None:
        total += weight * pair_rotation_reference(base, ops.pairs.sine, ops.pairs.group)
    if ops.circulant is not None:
        kernel = ops.circulant.kernel
        total += weight * circulant_reference(x, spectrum(kernel), kernel.shape[2])
    if ops.dense is not None:
        total += weight * dense_reference(x, ops.dense.weight)
    if ops.modulated is not None:
        total += weight * modulated_reference(x, ops.modulated.a, ops.modulated.b, head)
    if ops.bias is not None:
        total += weight * ops.bias
    if ops.low_rank is not None:
        v = row_linear(x, ops.low_rank.a, probe=False)
        update = torch.zeros_like(base)
        for start, end in _windows(v.shape[1], max_reduction(v.dtype)):
            row_addmm_(update, v[:, start:end], ops.low_rank.b[start:end])
        total += weight * update.float()
    if ops.hadamard is not None:
        w1a, w1b, w2a, w2b = (factor.unsqueeze(0) for factor in ops.hadamard.tensors())
        u = hadamard_shrink_reference(x, w1b.unsqueeze(0), w2b.unsqueeze(0), 0)
        hadamard_expand_reference(total, u, [w1a], [w2a], 0, weight)
    if ops.kronecker is not None:
        w1, *second = (factor.unsqueeze(0) for factor in ops.kronecker.tensors())
        factors = second[0] if len(second) == 1 else (second[0], second[1])
        kronecker_reference(x, total, w1, factors, 0, weight)
    if ops.sparse is not None:
        sparse_reference(x, total, Jagged.of(*ops.sparse.tensors()), weight)


def _windows(rank: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rank, size):
        yield start, min(start + size, rank)


def vocabulary_change(operators: AdapterOperators, device: torch.device) -> VocabularyChange | None:
    """What an adapter does to the vocabulary, if anything; on the CPU, the host's own tensors."""
    if not operators.changes_vocabulary:
        return None
    return _moved(VocabularyChange(head=operators.head, tokens=operators.tokens), device, {})


def _moved(value: Any, device: torch.device, done: dict[int, Any]) -> Any:
    """Every tensor inside on the device; what is there twice (tied rows) is moved once."""
    if id(value) in done:
        return done[id(value)]
    result = value
    if isinstance(value, torch.Tensor):
        result = value.to(device)
    elif isinstance(value, tuple):
        result = tuple(_moved(item, device, done) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _moved(getattr(value, f.name), device, done) for f in fields(value)}
        result = replace(value, **parts)
    done[id(value)] = result
    return result
