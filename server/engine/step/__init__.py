"""Computes a scheduled step: rows, batch, compute path and sampler.

This file turns a scheduled step into the model's input tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from turret.kernels.fusion_gate import given_gate_reference
from turret.kernels.gpu.tables import upload
from turret.kernels.paged_attention import SequenceSpan
from turret.kernels.rows import row_linear
from turret.server.adapters.adapter import Adapter
from turret.server.adapters.device import (
    AdapterStep,
    AdapterStore,
    Members,
    StepMembers,
    StepStore,
)
from turret.server.adapters.device.vocabulary import VocabularyChange, VocabularyGroup
from turret.server.adapters.operators.soft_prompt import soft_prompt_of
from turret.server.adapters.operators.token_router import TokenRouter
from turret.server.adapters.operators.vocabulary import added_rows_of
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, Step
from turret.server.models.decoding import LONG, Arch
from turret.server.models.decoding.decoder import Decoder, OwnRows, StepInput
from turret.server.models.decoding.layer_ops import LayerOps

# The rows of a scheduled step, as plain numbers: the same for every device.


class Placed(NamedTuple):
    """A scheduled sequence and the first of its rows."""

    item: Scheduled
    row_start: int

    @property
    def last_row(self) -> int:
        return self.row_start + self.item.num_rows - 1

    @property
    def sampled(self) -> range:
        """The rows from which tokens are drawn: that of the last known token, and the draft's."""
        return range(self.last_row - len(self.item.draft), self.last_row + 1)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn from its last rows."""
        return self.item.samples and self.item.sequence.request.generates


@dataclass(slots=True)
class OwnValues:
    """The indices of some rows, and the rows' embeddings on the host, piece by piece."""

    rows: list[int] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def on(self, device: torch.device) -> OwnRows | None:
        """Start copying both to the device; returns None if there are no rows."""
        if not self.rows:
            return None
        parts = torch.tensor(self.rows), torch.cat(self.values)
        return OwnRows(*(upload(part, device) for part in parts))


@dataclass(slots=True)
class StepRows:
    """The rows of a step as the model needs them.

    Attributes:
        token_ids: The token of each row; any valid id for the rows in ``soft`` and ``added``.
        positions: The position of each row in its sequence, not counting padding, plus ``LONG`` in
            a long sequence.
        kv_slots: The slot in the cache for each row's keys and values.
        spans: Five numbers for each sequence, in one list: its first row, the number of new tokens,
            the number of tokens before them, where its block numbers begin (``blocks_at`` of
            ``collect_rows``), and the number of leading positions that are masked.
        soft: Rows of soft prompts, and their embeddings.
        added: Rows of tokens for which the base's embedding has no row, and their embeddings.
    """

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    kv_slots: list[int] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    soft: OwnValues = field(default_factory=OwnValues)
    added: OwnValues = field(default_factory=OwnValues)

    def add(self, place: Placed, block_size: int, blocks_at: int) -> None:
        """Add a sequence's new rows; soft tokens may be among them."""
        sequence, start = place.item.sequence, place.item.sequence.num_computed
        end = start + place.item.num_rows
        known = sequence.tokens[start : start + place.item.num_new]
        self.token_ids.extend(max(token, 0) for token in known)
        self.token_ids.extend(place.item.draft)
        self.take_added(sequence, place.row_start)
        first = _first_position(sequence)
        self.positions.extend(range(first + start, first + end))
        self.kv_slots.extend(
            sequence.blocks[p // block_size] * block_size + p % block_size
            for p in range(start, end)
        )
        self.spans += (place.row_start, place.item.num_rows, start, blocks_at)
        self.spans.append(sequence.num_padding)
        if start < sequence.num_virtual:
            stop = min(end, sequence.num_virtual)
            self.soft.rows.extend(range(place.row_start, place.row_start + stop - start))
            soft_tokens = soft_prompt_of(sequence.mix).soft_tokens
            assert soft_tokens is not None
            self.soft.values.append(soft_tokens[start:stop])

    def take_added(self, sequence: Sequence, row_start: int) -> None:
        """Record which rows of the sequence that was added last have tokens that the base lacks."""
        if not sequence.vocab_size or (added := added_rows_of(sequence.mix)) is None:
            return
        rows = range(row_start, len(self.token_ids))
        found = [row for row in rows if self.token_ids[row] >= added.first]
        if not found:
            return
        places = torch.tensor([self.token_ids[row] - added.first for row in found])
        self.added.rows += found
        self.added.values.append(added.embedding.index_select(0, places))
        for row in found:
            self.token_ids[row] = 0


def collect_rows(
    placed: SequenceOf[Placed], block_size: int, blocks_at: SequenceOf[int] | None = None
) -> StepRows:
    """Go through the new tokens of a step's sequences, drafts included, in the order of their rows.

    Args:
        placed: The step's sequences and their first rows. Every row belongs to one of them.
        block_size: Positions per KV block.
        blocks_at: Where each sequence's block numbers begin; None if they are not needed.
    """
    rows = StepRows()
    for number, place in enumerate(placed):
        rows.add(place, block_size, 0 if blocks_at is None else blocks_at[number])
    return rows


def collect_decode_rows(
    sequences: SequenceOf[Sequence], block_size: int, positions: list[int]
) -> StepRows:
    """Like ``collect_rows``, for sequences with one new row each, that of a generated token.

    Data that does not depend on that token may have been collected before (``decode_spans``).
    """
    rows = StepRows(positions=positions)
    ids, slots = rows.token_ids, rows.kv_slots
    for sequence in sequences:
        start = sequence.num_computed
        ids.append(sequence.tokens[start])
        rows.take_added(sequence, len(ids) - 1)
        slots.append(sequence.blocks[start // block_size] * block_size + start % block_size)
    return rows


def decode_spans(
    sequences: SequenceOf[Sequence], blocks_at: SequenceOf[int], ahead: int = 0
) -> tuple[list[int], list[int]]:
    """Positions and spans of a decode step, in the format of ``StepRows``.

    Args:
        sequences: The step's sequences, with one new row each.
        blocks_at: Where the block numbers of each sequence begin.
        ahead: The number of tokens that each sequence will get before this step.
    """
    positions: list[int] = []
    spans: list[int] = []
    for row, (sequence, at) in enumerate(zip(sequences, blocks_at, strict=True)):
        start, padding = sequence.num_computed + ahead, sequence.num_padding
        positions.append(_first_position(sequence) + start)
        spans += (row, 1, start, at, padding)
    return positions, spans


def _first_position(sequence: Sequence) -> int:
    """The model's position for the first slot of a sequence."""
    return (LONG if sequence.is_long else 0) - sequence.num_padding


# Rows of a step that need an embedding or head other than the base's.


NOTHING_ADDED: Mapping[Sequence, torch.Tensor] = {}


def changed_rows(
    rows: Iterable[tuple[Sequence, range]],
    store: AdapterStore,
    device: torch.device,
    part: Literal["embedding", "head"],
) -> list[VocabularyGroup]:
    """Group rows by the changes that their mixes make to the embedding or the head.

    Args:
        rows: Sequences and their rows. The store holds the adapters of their mixes.
        store: Holds the adapters.
        device: Where the step is computed.
        part: The part of the model.

    Returns:
        One group per mix that changes the part; none for most steps.
    """
    if not store.vocabularies:
        return []
    numbers: dict[tuple[tuple[str, float], ...], list[int]] = {}
    members: dict[tuple[tuple[str, float], ...], list[tuple[VocabularyChange, float]]] = {}
    for sequence, its_rows in rows:
        found = [
            (adapter.key, weight, change)
            for adapter, weight in sequence.active_mix.members
            # Weight 0 adds nothing, not even an overflow.
            if weight and (change := store.vocabularies.get(adapter.key)) is not None
        ]
        if found:
            mix = tuple((key, weight) for key, weight, _ in found)
            numbers.setdefault(mix, []).extend(its_rows)
            members[mix] = [(change, weight) for _, weight, change in found]
    return [
        VocabularyGroup(upload(torch.tensor(numbers[mix]), device), changes)
        for mix, changes in members.items()
        if any(c.changes_head if part == "head" else c.changes_embedding for c, _ in changes)
    ]


def added_logits(
    rows: Iterable[tuple[Sequence, range]],
    hidden: torch.Tensor,
    decoder: Decoder,
    store: AdapterStore,
) -> Mapping[Sequence, torch.Tensor]:
    """The logits of tokens that the base lacks.

    They are computed separately for each sequence, so its bits do not depend on the others.

    Args:
        rows: Sequences and their rows. The store holds the adapters of their mixes.
        hidden: Final-norm hidden states, ``[at least all rows, hidden]``.
        decoder: Computes logits from hidden states.
        store: Holds the adapters.

    Returns:
        For each sequence whose adapter adds tokens, ``[its rows, tokens]`` fp32.
    """
    found = NOTHING_ADDED
    for sequence, its_rows in rows:
        if not sequence.vocab_size:
            continue
        for adapter, _ in sequence.mix.members:
            change = store.vocabularies.get(adapter.key)
            if change is not None and change.tokens is not None and change.tokens.added is not None:
                states = hidden[its_rows.start : its_rows.stop]
                logits = decoder.some_logits(states, change.tokens.added.head)
                found = {**found, sequence: logits}
    return found


def own_logits(row: torch.Tensor, sequence: Sequence, added: torch.Tensor | None) -> torch.Tensor:
    """A row's logits over the tokens that its sequence may draw.

    Args:
        row: Logits over the base's tokens, ``[..., vocab]``.
        sequence: The sequence of the row.
        added: Logits over the tokens that an adapter adds, ``[..., tokens]``, or None.

    Returns:
        ``[..., sequence.vocab_size]`` in separate memory, or ``row`` itself if the vocabulary is
        the base's.
    """
    if added is not None:
        return torch.cat((row, added), dim=-1)
    return row[..., : sequence.vocab_size].clone() if sequence.vocab_size else row


# The first passes of a step, and the scalings that they give the rows of their sequences.


def scalings(router: TokenRouter, states: torch.Tensor) -> torch.Tensor:
    """The scalings ``α`` of a router's components, for every row and module.

    Args:
        router: On the device of the states.
        states: After the final norm, ``[rows, hidden]``, any float dtype.

    Returns:
        ``[rows, modules, components]`` fp32. A row's bits do not depend on the other rows.
    """
    values = states.float()
    last = len(router.weights) - 1
    for number, (weight, bias) in enumerate(zip(router.weights, router.biases, strict=True)):
        values = row_linear(values, weight) + bias
        if number < last:
            values = values.relu_()
    modules = 1 if router.is_shared else router.modules
    logits = values[:, : modules * router.components].reshape(-1, router.components)
    gates = given_gate_reference(
        logits,
        temperature=router.temperature,
        top_k=router.top_k,
        is_renormalised=router.is_renormalised,
    )
    gates = gates.view(len(states), modules, router.components) * router.scale
    return gates.expand(-1, router.modules, -1)


def first_scalings(router: TokenRouter, num_rows: int, device: torch.device) -> torch.Tensor:
    """Scalings of the adapter's own first pass, ``[rows, modules, components]`` fp32."""
    assert router.first_pass is not None, "the first pass is not the base's own"
    # Write the values on the device, because a copy from the host would wait for the device.
    each = [torch.full((1,), value, device=device) for value in router.first_pass]
    return torch.cat(each).expand(num_rows, router.modules, -1)


class SequenceScalings(NamedTuple):
    """The scalings of a sequence's new rows, ``[rows, modules, components]`` fp32.

    ``key`` is the key of the adapter whose components they scale.
    """

    key: str
    scalings: torch.Tensor


# Scalings per sequence, for sequences that have any.
StepScalings = Mapping[Sequence, SequenceScalings]
NO_SCALINGS: StepScalings = {}


def scalings_of(
    step: Step,
    store: AdapterStore,
    device: torch.device,
    run: Callable[[Step, StepScalings], tuple[SequenceOf[Placed], torch.Tensor]],
) -> StepScalings:
    """Compute the first passes of a step, and from their states the scalings of its sequences.

    Args:
        step: The step.
        store: Holds the adapters.
        device: Where the step is computed.
        run: Computes the first passes as a step with their own scalings. Returns the places of its
            sequences, and its states after the final norm, ``[at least all rows, hidden]``.
    """
    items = [
        (item, item.sequence.first_pass)
        for item in step.scheduled
        if item.sequence.first_pass is not None
    ]
    if not items:
        return NO_SCALINGS
    store.prepare(adapters_of(step))
    # An adapter that takes part in its own first pass has constant scalings there.
    constants = {
        first: SequenceScalings(key, first_scalings(router, item.num_rows, device))
        for item, first in items
        for key, router in _routers(first, store)
    }
    firsts = tuple(replace(item, sequence=first) for item, first in items)
    placed, states = run(Step(firsts, (), 0), constants)
    states_of = {p.item.sequence: states[p.row_start : p.last_row + 1] for p in placed}
    # A router runs once for all sequences of its adapter.
    waiting: dict[str, tuple[TokenRouter, list[Sequence], list[torch.Tensor]]] = {}
    for item, first in items:
        for key, router in _routers(item.sequence, store):
            _, sequences, parts = waiting.setdefault(key, (router, [], []))
            sequences.append(item.sequence)
            parts.append(states_of[first])
    found: dict[Sequence, SequenceScalings] = {}
    for key, (router, sequences, parts) in waiting.items():
        each = scalings(router, torch.cat(parts)).split([len(part) for part in parts])
        found |= {s: SequenceScalings(key, some) for s, some in zip(sequences, each, strict=True)}
    return found


def adapters_of(step: Step) -> list[Adapter]:
    """Every adapter that a step uses, once."""
    members = [item.sequence.active_mix.members for item in step.scheduled]
    return list({adapter.key: adapter for mix in members for adapter, _ in mix}.values())


def _routers(sequence: Sequence, store: AdapterStore) -> list[tuple[str, TokenRouter]]:
    """The adapters of a sequence that route tokens; the store holds them."""
    found = [(a.key, store.routers.get(a.key)) for a, _ in sequence.mix.members]
    return [(key, router) for key, router in found if router is not None]


def scalings_of_rows(placed: SequenceOf[Placed], scalings: StepScalings) -> dict[str, torch.Tensor]:
    """The scalings of every row of a step, by adapter (see ``StepMembers``)."""
    if not scalings:
        return {}
    num_rows = max(place.last_row for place in placed) + 1
    of_rows: dict[str, torch.Tensor] = {}
    for place in placed:
        if place.item.sequence in scalings:
            key, values = scalings[place.item.sequence]
            if key not in of_rows:
                of_rows[key] = values.new_zeros(num_rows, *values.shape[1:])
            of_rows[key][place.row_start : place.last_row + 1] = values
    return of_rows


# Maximum number of rows of a short segment. Short segments of one mix are placed side by side, so
# that they share reads of its adapters.
MAX_SHORT_ROWS = 8

# Sequences and their rows.
Rows = SequenceOf[tuple[Sequence, range]]


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's input, and the place of each sequence in it."""

    input: StepInput
    placed: tuple[Placed, ...]


class BatchBuilder:
    """Builds batches for one model, cache geometry and adapter store."""

    def __init__(
        self,
        arch: Arch,
        ops: LayerOps,
        block_size: int,
        store: StepStore,
        device: torch.device,
    ) -> None:
        self._arch = arch
        self._ops = ops
        self._block_size = block_size
        self._store = store
        self._device = device

    def build(self, step: Step, scalings: StepScalings = NO_SCALINGS) -> Batch:
        """Order the rows and prepare the metadata.

        Short segments with adapters come first, by mix, then rows without adapters, then long
        segments with adapters.

        Args:
            step: The scheduled step.
            scalings: The scalings that first passes have computed.
        """
        short, base, long = [], [], []
        for item in step.scheduled:
            if not item.sequence.active_mix.members:
                base.append(item)
            elif item.num_rows <= MAX_SHORT_ROWS:
                short.append(item)
            else:
                long.append(item)
        short.sort(key=lambda item: item.sequence.active_mix.key)
        placed, row = [], 0
        for item in (*short, *base, *long):
            placed.append(Placed(item, row))
            row += item.num_rows
        adapters = None
        if short or long:
            of_rows = scalings_of_rows(placed, scalings)
            adapters = self._bind_adapters(short, placed[len(short) + len(base) :], of_rows)
        return Batch(self._input(placed, row, adapters), tuple(placed))

    def _input(
        self, placed: list[Placed], num_rows: int, adapters: AdapterStep | None
    ) -> StepInput:
        rows = collect_rows(placed, self._block_size)
        spans, its_rows = [], []
        for place in placed:
            sequence, num_new = place.item.sequence, place.item.num_rows
            start, context = place.row_start, sequence.num_computed
            used = sequence.blocks[: -(-(context + num_new) // self._block_size)]
            spans.append(SequenceSpan(start, num_new, context, used, sequence.num_padding))
            its_rows.append((sequence, range(start, start + num_new)))
        attention = {
            window: self._ops.plan_attention(
                spans,
                num_rows=num_rows,
                block_size=self._block_size,
                window=window,
                device=self._device,
            )
            for window in set(self._arch.windows)
        }
        return StepInput(
            token_ids=self._tensor(rows.token_ids),
            positions=self._tensor(rows.positions),
            kv_slots=self._tensor(rows.kv_slots),
            attention=attention,
            adapters=adapters,
            soft=rows.soft.on(self._device),
            added=rows.added.on(self._device),
            embeddings=changed_rows(its_rows, self._store, self._device, "embedding"),
        )

    def _bind_adapters(
        self, short: list[Scheduled], long: list[Placed], scalings: dict[str, torch.Tensor]
    ) -> AdapterStep:
        sequences = [item.sequence for item in short] + [p.item.sequence for p in long]
        adapters = {a.key: a for sequence in sequences for a, _ in sequence.active_mix.members}
        self._store.prepare(adapters.values())
        return self._store.step(
            StepMembers(
                short=[m for item in short for m in [members_of(item.sequence)] * item.num_rows],
                long=[
                    (p.row_start, p.row_start + p.item.num_rows, members_of(p.item.sequence))
                    for p in long
                ],
                scalings=scalings,
            )
        )

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def members_of(sequence: Sequence) -> Members:
    """Key and weight of each adapter that adds something to the tokens that are computed next."""
    return [(a.key, weight) for a, weight in sequence.active_mix.members if weight != 0.0]


def runs_of(rows: Rows) -> list[tuple[int, int, Members]]:
    """Runs of rows, one for each sequence: first row, end, and mix."""
    return [(its.start, its.stop, members_of(sequence)) for sequence, its in rows]
