"""The order of a step's rows: rows with the same adapters are adjacent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from builders.facts import adapter_of
from builders.sequences import sequence_of

from turret.server.adapters.adapter import Mix
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, Step
from turret.server.engine.step import MAX_SHORT_ROWS, BatchBuilder


class Recorder:
    """An adapter store that records the adapters of a step's rows."""

    def __init__(self) -> None:
        self.members: Any = None
        self.vocabularies: dict[str, Any] = {}

    def prepare(self, adapters: Any) -> None:
        self.prepared = {adapter.key for adapter in adapters}

    def step(self, members: Any) -> None:
        self.members = members


def scheduled(number: int, num_new: int, *mix: tuple[str, float]) -> Scheduled:
    """A sequence whose token ids all equal ``number``."""
    mixed = Mix(tuple((adapter_of(name), weight) for name, weight in mix))
    sequence = sequence_of([number] * num_new, mix=mixed)
    sequence.blocks = [number, number + 100]
    return Scheduled(sequence, num_new)


def build(items: list[Scheduled]) -> tuple[list[tuple[Sequence, int]], list[int], Recorder]:
    """The sequences with their first rows, the rows' token ids, and the store's record."""
    store = Recorder()
    builder = BatchBuilder(
        SimpleNamespace(windows=[None]),  # type: ignore[arg-type]
        SimpleNamespace(plan_attention=lambda *_, **__: None),  # type: ignore[arg-type]
        16,
        store,  # type: ignore[arg-type]
        torch.device("cpu"),
    )
    batch = builder.build(Step(tuple(items), (), 0))
    placed = [(place.item.sequence, place.row_start) for place in batch.placed]
    return placed, batch.input.token_ids.tolist(), store


def test_rows_of_one_mix_are_adjacent() -> None:
    a, b, both = ("a", 1.0), ("b", 1.0), (("a", 1.0), ("b", 0.5))
    long = MAX_SHORT_ROWS + 1
    items = [
        scheduled(0, 1, b),
        scheduled(1, 1),
        scheduled(2, long, b),
        scheduled(3, 1, a),
        scheduled(4, 2, *both),
        scheduled(5, 1, b),
        scheduled(6, 1, ("a", 0.5)),
        scheduled(7, 1, a),
        scheduled(8, 1, *both),
    ]
    placed, token_ids, store = build(items)
    order = [items.index(next(i for i in items if i.sequence is s)) for s, _ in placed]
    mixes = [items[number].sequence.mix.key for number in order[:-2]]
    # Short prompts: one run per mix, in order of arrival.
    assert len(mixes) == 7
    runs = [mix for i, mix in enumerate(mixes) if i == 0 or mixes[i - 1] != mix]
    assert len(runs) == len(set(runs)) == 4
    assert order.index(3) < order.index(7)
    assert order.index(0) < order.index(5)
    assert order.index(4) < order.index(8)
    # Then the base's prompts, then the long ones.
    assert order[-2:] == [1, 2]
    # Every row has the token and the adapters of its sequence.
    row = 0
    for sequence, start in placed:
        assert start == row
        number = sequence.request.prompt_token_ids[0]
        count = len(sequence.request.prompt_token_ids)
        assert token_ids[row : row + count] == [number] * count
        row += count
        expected = [(adapter.key, weight) for adapter, weight in sequence.mix.members]
        if number not in (1, 2):
            assert list(store.members.short[start:row]) == [expected] * count
    assert store.members.long == [(9, 9 + long, [("b.1", 1.0)])]
    assert store.prepared == {"a.1", "b.1"}


def test_a_step_of_the_base_binds_no_adapter() -> None:
    placed, token_ids, store = build([scheduled(0, 3), scheduled(1, 1)])
    assert [start for _, start in placed] == [0, 3]
    assert token_ids == [0, 0, 0, 1]
    assert store.members is None
