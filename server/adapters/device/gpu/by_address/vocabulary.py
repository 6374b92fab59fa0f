"""Embeddings and heads that adapters change, on the gpu path: words by slot, for a few launches.

What differs between two steps of a kind is which adapters the rows have, which is in tables, and
what those adapters have, which their words say: so decode steps are captured, and a graph stays
valid while adapters come and go.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields

import torch

from turret.kernels.gpu.tables.member_table import MemberRun, MemberTable, RowMember
from turret.kernels.gpu.tables.staged_buffer import upload
from turret.kernels.gpu.vocabulary.embedding_changes import embedding_changes
from turret.kernels.gpu.vocabulary.head_changes import head_changes
from turret.kernels.gpu.vocabulary.head_inputs import head_inputs
from turret.kernels.gpu.vocabulary.head_low_rank import head_expand, head_shrink
from turret.kernels.gpu.vocabulary.vocabulary_words import RANK_BLOCK, WORDS
from turret.server.adapters.device.gpu.tables import GpuTables
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.vocabulary import VocabularyChange
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.vocabulary import VocabularyRows

# What the kernels know of a head as a linear module; others are torch's, and rare there.
_SERVED = {"low_rank", "gain", "input_gain", "bias"}
_LEAST_SLOTS = 4
_LEAST_WIDTH = 64

# Runs of rows: first, end, and their mix.
Runs = Sequence[tuple[int, int, Members]]


@dataclass(frozen=True, slots=True)
class StepVocabulary:
    """What the adapters of a step change of embedding and head.

    Attributes:
        words: What each adapter changes, by slot.
        embeddings: The members of each row that change its embedding, or None if no row has any.
        heads: The same of each sampled row and its head.
        width: Ranks of the low-rank updates of a row's head at most, rounded up; 0 is none.
        gains_inputs: Whether an adapter scales what its head multiplies.
    """

    words: torch.Tensor
    embeddings: MemberTable | None
    heads: MemberTable | None
    width: int
    gains_inputs: bool

    @property
    def signature(self) -> Hashable:
        """What the step launches, and where what it reads lies: not which adapters it has."""
        tables = [None if t is None else t.buffer.data_ptr() for t in (self.embeddings, self.heads)]
        words = self.words.data_ptr(), self.words.shape
        return (words, *tables, self.width, self.gains_inputs)

    def change_embeddings(
        self, hidden: torch.Tensor, token_ids: torch.Tensor, embedding: torch.Tensor
    ) -> None:
        """Change the rows' embeddings in place.

        Args:
            hidden: The base's, ``[num_rows, hidden]``.
            token_ids: ``[num_rows]`` int64.
            embedding: The base's matrix, ``[vocab, hidden]``.
        """
        if self.embeddings is not None:
            embedding_changes(hidden, token_ids, embedding, self.words, self.embeddings)

    def change_logits(
        self,
        x: torch.Tensor,
        base: torch.Tensor,
        logits: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Change the sampled rows' logits in place.

        Args:
            x: Final hidden states, ``[num_rows, hidden]``.
            base: The base's logits of them, ``[num_rows, vocab]``, dtype of ``x``.
            logits: The same in fp32, memory of its own.
            head: The base's head, ``[rows, hidden]`` → ``[rows, vocab]``.
        """
        if self.heads is None:
            return
        words, table = self.words, self.heads
        moved = head(head_inputs(x, words, table)) if self.gains_inputs else None
        head_changes(x, base, logits, words, table, moved=moved)
        if self.width:
            v = head_shrink(x, words, table, self.width)
            head_expand(v, logits, words, table, x)


class GpuVocabulary:
    """The words of a store's adapters that change embedding or head.

    Args:
        device: Where the kernels run.
    """

    def __init__(self, device: torch.device) -> None:
        self._words = torch.zeros(0, WORDS, dtype=torch.int64, device=device)
        self._slots: dict[str, int] = {}
        # Their tensors live as long as the words that say where they lie.
        self._changes: dict[str, VocabularyChange] = {}

    def put(self, key: str, change: VocabularyChange) -> None:
        """Note where an adapter's tensors lie."""
        taken = set(self._slots.values())
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        if slot >= len(self._words):
            larger = self._words.new_zeros(max(_LEAST_SLOTS, 2 * len(self._words)), WORDS)
            larger[: len(self._words)] = self._words
            self._words = larger
        self._words[slot] = upload(torch.tensor(_words(change)), self._words.device)
        self._slots[key], self._changes[key] = slot, change

    def remove(self, key: str) -> None:
        """Forget an adapter; unknown ones are ignored. Its words stay, and no step reads them."""
        self._slots.pop(key, None)
        self._changes.pop(key, None)

    def has_kernels(self, mix: Members) -> bool:
        """Whether kernels change what a mix changes of the head: all of it, or torch does."""
        found = [self._changes[key].head for key, _ in mix if key in self._changes]
        return all(head is None or _parts(head) <= _SERVED for head in found)

    def bind(self, rows: Runs, sampled: Runs, tables: GpuTables) -> StepVocabulary | None:
        """Load a step's tables; None if kernels change no embedding and no head.

        Args:
            rows: All rows of the step, one run behind the other.
            sampled: The rows that logits are wanted of, likewise.
            tables: Where the metadata goes.
        """
        if not self._changes:
            return None
        embeddings = [(start, end, self._of_embedding(mix)) for start, end, mix in rows]
        heads = [(start, end, self._of_head(mix)) for start, end, mix in sampled]
        if not any(mix for _, _, mix in (*embeddings, *heads)):
            return None
        used = {key for _, _, mix in sampled if self.has_kernels(mix) for key, _ in mix}
        ops = [self._changes[key].head for key in used if key in self._changes]
        return StepVocabulary(
            self._words,
            _loaded("embeddings", embeddings, tables),
            _loaded("heads", heads, tables),
            _width(max(map(self._ranks, (mix for _, _, mix in sampled)), default=0)),
            any(head is not None and head.input_gain is not None for head in ops),
        )

    def _of_embedding(self, mix: Members) -> list[RowMember]:
        return [
            RowMember(self._slots[key], weight)
            for key, weight in mix
            if key in self._changes and self._changes[key].changes_embedding
        ]

    def _of_head(self, mix: Members) -> list[RowMember]:
        members, first = [], 0
        for key, weight in mix if self.has_kernels(mix) else ():
            if key in self._changes and self._changes[key].changes_head:
                members.append(RowMember(self._slots[key], weight, first))
                first += _ranks(self._changes[key].head)
        return members

    def _ranks(self, mix: Members) -> int:
        """Of the low-rank updates that a mix has of the head, as ``head_shrink`` lays them."""
        if not self.has_kernels(mix):
            return 0
        return sum(_ranks(self._changes[key].head) for key, _ in mix if key in self._changes)


def _loaded(key: str, runs: Sequence[MemberRun], tables: GpuTables) -> MemberTable | None:
    members = max((len(mix) for _, _, mix in runs), default=0)
    if not members:
        return None
    table = tables.member_table(key, members)
    table.load(runs)
    return table


def _width(ranks: int) -> int:
    """Room for so many, as few widths as can be: each is another graph."""
    return max(_LEAST_WIDTH, 1 << (ranks - 1).bit_length()) if ranks else 0


def _ranks(head: ModuleOperators | None) -> int:
    return 0 if head is None else -(-head.rank // RANK_BLOCK) * RANK_BLOCK


def _parts(head: ModuleOperators) -> set[str]:
    """Names of the operators that it has."""
    return {field.name for field in fields(head) if getattr(head, field.name) is not None}


def _words(change: VocabularyChange) -> list[int]:
    """What kernels are told of an adapter; see ``vocabulary_words.py``."""
    tokens, head = change.tokens, change.head
    low_rank = None if tokens is None else tokens.low_rank
    update = [0, 0, 0, 0]
    if low_rank is not None:
        gain = 0 if low_rank.gain is None else low_rank.gain.data_ptr()
        update = [low_rank.a.data_ptr(), low_rank.b.data_ptr(), low_rank.rank, gain]
    linear = [0] * 6
    if head is not None:
        vectors = (head.gain, head.input_gain, head.bias)
        linear[3:] = (0 if vector is None else vector.data_ptr() for vector in vectors)
        if head.low_rank is not None:
            a, b = head.low_rank.a, head.low_rank.b
            linear[:3] = a.data_ptr(), b.data_ptr(), head.rank
    embedding = _row_words(None if tokens is None else tokens.embedding)
    rows = _row_words(None if tokens is None else tokens.head)
    return [*embedding, *update, *rows, *linear]


def _row_words(rows: VocabularyRows | None) -> tuple[int, int, int]:
    if rows is None or not len(rows.values):
        return 0, 0, 0
    ids = 0 if rows.ids is None else rows.ids.data_ptr()
    return ids, rows.values.data_ptr(), len(rows.values)
