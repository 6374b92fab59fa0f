"""An adapter's changes to the rows of the embedding matrix and of the output head.

Both matrices are ``[vocab, hidden]``, with one row per token. In a mix, every change counts as a
weighted difference from the base's row: ``e(t) + Σ_k w_k (e_k(t) − e(t))``. New tokens have no row
in the base, so at most one adapter of a mix may have new tokens, whose rows are used unweighted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from turret.kernels.rows import row_linear, row_product
from turret.lazy_torch import torch
from turret.server.adapters.operators import Tensors

# Names of the two vocabulary matrices, the embedding and the head, in checkpoints and modules.
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class VocabularyRows(Tensors):
    """Rows that replace those of the base.

    They come from PEFT's ``trainable_token_indices``, or from ``modules_to_save``, of which only
    the rows that differ from the base's are kept.

    Attributes:
        ids: Token ids, ``[n]`` int64, ascending; None for every token, in order.
        values: ``[n, hidden]``, serving dtype, contiguous.
    """

    ids: torch.Tensor | None
    values: torch.Tensor

    def change(self, tokens: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """``e_k(t) − e(t)`` of an embedding, zero for tokens without a row.

        Args:
            tokens: ``[rows]`` int64.
            base: The base's embeddings of them, ``[rows, hidden]`` fp32.
        """
        if self.ids is None:
            return torch.nn.functional.embedding(tokens, self.values).float() - base
        places = torch.searchsorted(self.ids, tokens).clamp_(max=len(self.ids) - 1)
        is_there = self.ids.index_select(0, places) == tokens
        change = self.values.index_select(0, places).float() - base
        return change.masked_fill_(~is_there.unsqueeze(1), 0.0)

    def add(self, y: torch.Tensor, x: torch.Tensor, base: torch.Tensor, weight: float) -> None:
        """``y += weight · (v_t x − h_t x)`` for the rows ``v`` that replace the head's ``h``.

        Args:
            y: ``[rows, vocab]`` fp32.
            x: Final hidden states, ``[rows, hidden]``.
            base: The base's logits of them, ``[rows, vocab]``.
            weight: The adapter's weight in the mix.
        """
        # A whole matrix needs no trial: it has the shape of the base's, which was tried at startup.
        found = row_linear(x, self.values).float()
        if self.ids is None:
            y += weight * (found - base.float())
        else:
            change = found - base.index_select(1, self.ids).float()
            y.index_add_(1, self.ids, change, alpha=weight)


@dataclass(frozen=True, slots=True)
class EmbeddingLowRank(Tensors):
    """``e(t) ← gain ⊙ e(t) + b a[t]``: LoRA on an embedding, and DoRA with a gain.

    Attributes:
        a: ``[vocab, rank]``, serving dtype, contiguous.
        b: ``[hidden, rank]``, serving dtype, contiguous, the scaling (and gain) folded in.
        gain: ``[hidden]`` fp32, or None (1).
    """

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def change(self, tokens: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """The change to the base's embeddings of some tokens; see ``VocabularyRows.change``."""
        a = torch.nn.functional.embedding(tokens, self.a).float().unsqueeze(1)
        change = row_product(a, self.b.float()).squeeze(1)
        return change if self.gain is None else change + (self.gain - 1.0) * base


@dataclass(frozen=True, slots=True)
class AddedRows(Tensors):
    """Rows of tokens for which the base has none.

    Attributes:
        first: The first of these rows, which is the number of the base's rows.
        embedding: ``[n, hidden]``, serving dtype, contiguous.
        head: Same shape; with tied embeddings it may be ``embedding``.
    """

    first: int
    embedding: torch.Tensor
    head: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyOperators(Tensors):
    """One adapter's changes per token.

    Attributes:
        embedding: Rows of the embedding, or None.
        low_rank: Low-rank update of the embedding, or None.
        head: Rows of the output head, or None; with tied embeddings it may be ``embedding``.
        added: Rows after the base's, or None.
    """

    embedding: VocabularyRows | None = None
    low_rank: EmbeddingLowRank | None = None
    head: VocabularyRows | None = None
    added: AddedRows | None = None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor once, for counting bytes and checking values."""
        parts = (self.embedding, self.low_rank, self.head, self.added)
        found = [tensor for part in parts if part is not None for tensor in part.tensors()]
        return tuple({id(tensor): tensor for tensor in found}.values())

    @property
    def changes_embedding(self) -> bool:
        return self.embedding is not None or self.low_rank is not None


def added_rows_of(mix: Any) -> AddedRows | None:
    """The rows that a resident mix adds, or None; at most one member of a mix adds rows."""
    for adapter, _ in mix.members:
        if adapter.facts.vocab_size and (tokens := adapter.operators.tokens) is not None:
            return tokens.added
    return None
