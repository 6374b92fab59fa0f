"""Kernels of embedding and head against float64, and each row alone.

Planted faults, and how many of the tests here each one fails (tried by hand):

- a token's own row looked for before it: 12
- ranks of a mix's second member where the first's begin: 6
- the base's logits not taken off another row's: 6
- an input gain as it is, not its change: 6
- weights of embeddings ignored: 6
- rows of other adapters in an adapter's tile: 8
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, HALF, MAX_ERROR, error_ratio
from ptx.addresses import address_of

from turret.kernels.gpu.tables.member_table import MemberTable, RowMember
from turret.kernels.gpu.vocabulary.embedding_changes import embedding_changes
from turret.kernels.gpu.vocabulary.head_changes import head_changes
from turret.kernels.gpu.vocabulary.head_inputs import head_inputs
from turret.kernels.gpu.vocabulary.head_low_rank import head_expand, head_shrink
from turret.kernels.gpu.vocabulary.vocabulary_words import WORDS

# Tokens and features: multiples of a tile, and neither.
SHAPES = [(128, 64), (150, 43), (70, 300)]
WIDTH = 64
Mixes = Sequence[Sequence[tuple[int, float]]]
# Slot 0 has some rows and nothing else, slot 1 all rows, slot 2 low-rank updates with gains, slot 3
# everything, slot 4 nothing.
MIXES: Mixes = (
    *([], [(0, 1.0)], [(1, -0.5)], [(2, 0.75)], [(3, 1.0)]),
    *([(4, 1.0)], [(3, 0.5), (0, -1.0), (2, 2.0)], [], [(2, 1.0), (1, 0.25)], [(0, 0.5), (3, 0.5)]),
)


class Case:
    """Five adapters, their words, and a step's tensors."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, rows: int = len(MIXES)) -> None:
        self.vocab, self.hidden = shape
        self.dtype = dtype
        self.table = torch.randn(shape).to(DEVICE, dtype)
        self.head = torch.randn(shape).div_(self.hidden**0.5).to(DEVICE, dtype)
        self.x = torch.randn(rows, self.hidden).to(DEVICE, dtype)
        ids = [0, 3, 17, 18, 64, self.vocab - 1]
        self.ids = torch.tensor(ids, device=DEVICE)
        # Every second row is of a token with a row of its own.
        tokens = [ids[row % 6] if row % 2 else (5 * row) % self.vocab for row in range(rows)]
        self.tokens = torch.tensor(tokens, device=DEVICE)
        self.parts = [
            self._part(ids=self.ids),
            self._part(ids=None),
            self._part(rank=20, gains=True),
            self._part(ids=self.ids, rank=3, gains=True, vectors=True),
            {},
        ]
        self.words = torch.tensor([_words(part) for part in self.parts], device=DEVICE)

    def _part(self, *, rank: int = 0, gains: bool = False, vectors: bool = False, **rows: Any):
        part: dict[str, Any] = {}
        if "ids" in rows:
            ids = rows["ids"]
            count = self.vocab if ids is None else len(ids)
            part["ids"] = ids
            part["embedding"] = torch.randn(count, self.hidden).to(DEVICE, self.dtype)
            part["head"] = torch.randn(count, self.hidden).div_(self.hidden**0.5)
            part["head"] = part["head"].to(DEVICE, self.dtype)
        if rank:
            scale = (rank * self.hidden) ** 0.25
            for name, size in (
                *(("ea", (self.vocab, rank)), ("eb", (self.hidden, rank))),
                *(("ha", (rank, self.hidden)), ("hb", (rank, self.vocab))),
            ):
                part[name] = torch.randn(size).div_(scale).to(DEVICE, self.dtype)
        if gains:
            part["egain"] = torch.rand(self.hidden, device=DEVICE) + 0.5
            part["hgain"] = torch.rand(self.vocab, device=DEVICE) + 0.5
        if vectors:
            part["inputs"] = torch.rand(self.hidden, device=DEVICE) + 0.5
            part["bias"] = torch.randn(self.vocab, device=DEVICE)
        return part

    def members(self, mixes: Mixes) -> MemberTable:
        table = MemberTable(80, 4, DEVICE)
        loaded = []
        for number, mix in enumerate(mixes):
            first, row = 0, []
            for slot, weight in mix:
                row.append(RowMember(slot, weight, first))
                first += -(-self._rank(slot) // 16) * 16
            loaded.append((number, number + 1, row))
        table.load(loaded)
        return table

    def _rank(self, slot: int) -> int:
        return self.parts[slot]["ha"].shape[0] if "ha" in self.parts[slot] else 0

    def changed_embeddings(self, mixes: Mixes, rows: slice = slice(None)) -> torch.Tensor:
        tokens = self.tokens[rows].contiguous()
        hidden = self.table[tokens]
        embedding_changes(hidden, tokens, self.table, self.words, self.members(mixes))
        return hidden

    def exact_embedding(self, row: int, mix: Sequence[tuple[int, float]]) -> torch.Tensor:
        token = int(self.tokens[row])
        base = self.table[token].double()
        total = base.clone()
        for slot, weight in mix:
            part = self.parts[slot]
            if "embedding" in part:
                ids = None if part["ids"] is None else part["ids"].tolist()
                if ids is None or token in ids:
                    place = token if ids is None else ids.index(token)
                    total += weight * (part["embedding"][place].double() - base)
            if "ea" in part:
                total += weight * (part["eb"].double() @ part["ea"][token].double())
                total += weight * (part["egain"].double() - 1.0) * base
        return total

    def changed_logits(self, mixes: Mixes, rows: slice = slice(None)) -> torch.Tensor:
        x = self.x[rows].contiguous()
        # Behind every row lies what must not be read.
        wide = torch.full((len(x), self.vocab + 7), float("nan"), device=DEVICE, dtype=self.dtype)
        base, moved = wide[:, : self.vocab], wide.clone()[:, : self.vocab]
        base.copy_(self._by_head(x))
        logits, table = base.clone().float().contiguous(), self.members(mixes)
        z = head_inputs(x, self.words, table)
        moved.copy_(self._by_head(z))
        head_changes(x, base, logits, self.words, table, moved=moved)
        v = head_shrink(x, self.words, table, WIDTH)
        head_expand(v, logits, self.words, table, x)
        return logits

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """Each row by itself, as the server's own product has it."""
        return torch.stack([(self.head.double() @ row.double()).to(self.dtype) for row in x])

    def exact_logits(self, row: int, mix: Sequence[tuple[int, float]]) -> torch.Tensor:
        x = self.x[row].double()
        base = self._by_head(self.x[row : row + 1])[0].double()
        total = base.clone()
        for slot, weight in mix:
            part = self.parts[slot]
            change = torch.zeros_like(base)
            if "head" in part:
                own = part["head"].double() @ x
                ids = slice(None) if part["ids"] is None else part["ids"]
                change[ids] += own - base[ids]
            if "ha" in part:
                change += part["hb"].double().T @ (part["ha"].double() @ x)
                change += (part["hgain"].double() - 1.0) * base
            if "inputs" in part:
                change += self.head.double() @ (x * (part["inputs"].double() - 1.0))
                change += part["bias"].double()
            total += weight * change
        return total


def _words(part: dict[str, Any]) -> list[int]:
    def at(name: str) -> int:
        tensor = part.get(name)
        return 0 if tensor is None else address_of(tensor)

    count = len(part["embedding"]) if "embedding" in part else 0
    rank = part["ha"].shape[0] if "ha" in part else 0
    words = [at("ids"), at("embedding"), count, at("ea"), at("eb"), rank, at("egain")]
    words += [at("ids"), at("head"), count, at("ha"), at("hb"), rank]
    words += [at("hgain"), at("inputs"), at("bias")]
    assert len(words) == WORDS
    return words


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_against_float64_and_the_rows_alone(shape, dtype):
    case = Case(shape, dtype)
    found = case.changed_embeddings(MIXES)
    for row, mix in enumerate(MIXES):
        if not mix:
            assert torch.equal(found[row], case.table[case.tokens[row]])
        assert error_ratio(found[row], case.exact_embedding(row, mix)) < MAX_ERROR[dtype]
        alone = case.changed_embeddings([mix], slice(row, row + 1))
        assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_against_float64_and_the_rows_alone(shape, dtype):
    case = Case(shape, dtype)
    found = case.changed_logits(MIXES)
    for row, mix in enumerate(MIXES):
        if not mix:
            assert torch.equal(found[row], case._by_head(case.x[row : row + 1])[0].float())
        # The base's own logits are rounded, and so is what an input gain adds.
        assert error_ratio(found[row], case.exact_logits(row, mix)) < MAX_ERROR[dtype]
        alone = case.changed_logits([mix], slice(row, row + 1))
        assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_several_tiles_have_the_bits_they_have_alone(dtype):
    case = Case(SHAPES[0], dtype, 70)
    mixes = [MIXES[row % len(MIXES)] for row in range(70)]
    logits, embeddings = case.changed_logits(mixes), case.changed_embeddings(mixes)
    for row in (0, 4, 16, 63, 64, 69):
        alone = slice(row, row + 1)
        assert torch.equal(case.changed_logits([mixes[row]], alone)[0], logits[row])
        assert torch.equal(case.changed_embeddings([mixes[row]], alone)[0], embeddings[row])


def test_missing_rows_and_an_empty_table_change_nothing_and_breaches_are_refused():
    case = Case(SHAPES[0], HALF)
    untouched = case._by_head(case.x).float()
    found = case.changed_logits(MIXES[:2])
    assert torch.equal(found[2:], untouched[2:])
    assert not torch.equal(found[1], untouched[1])
    assert torch.equal(case.changed_logits([]), untouched)
    assert torch.equal(case.changed_embeddings([]), case.table[case.tokens])
    with pytest.raises(ValueError, match="2 rows of 2 members; 2 of 1"):
        MemberTable(2, 1, DEVICE).load([(0, 2, [RowMember(0, 1.0), RowMember(1, 1.0)])])
    table, words, x = case.members(MIXES), case.words, case.x
    base = untouched.to(HALF)
    for call, message in (
        (lambda: head_changes(x, base, base, words, table), "logits"),
        (lambda: head_changes(x, base.float(), untouched, words, table), "base"),
        (lambda: head_changes(x, base, untouched, words[:, 1:], table), "words"),
        (lambda: head_changes(x, base, untouched, words.float(), table), "words"),
        (lambda: head_expand(base, untouched, words, table, x), "v"),
        (lambda: head_expand(untouched, base, words, table, x), "logits"),
        (lambda: head_changes(x, base, untouched, words, table, moved=base[1:]), "moved"),
        (lambda: head_shrink(x, words, table, 8), "width"),
        (lambda: head_inputs(x.T, words, table), "x"),
        (lambda: embedding_changes(x, case.tokens[1:], case.table, words, table), "token_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
