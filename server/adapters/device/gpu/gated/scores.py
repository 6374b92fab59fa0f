"""What gates are scored by, on the device: tensors of each adapter's own, found by their addresses.

Queries, keys and prototypes differ in length from adapter to adapter. Tables by slot of the pack
say where they lie, so that a step launches the same whichever adapters it has, and what was
captured stays valid when they come and go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby

import torch

from turret.kernels.gpu.gates.gate_words import (
    NO_WORDS,
    WORDS,
    Words,
    prototype_words,
    query_words,
    told_words,
)
from turret.kernels.gpu.tables.staged_buffer import host_tensor, upload
from turret.server.adapters.device.gpu.gated.components import components_of, moves_of
from turret.server.adapters.device.gpu.pack import grown
from turret.server.adapters.device.gpu.pieces import by_layers
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.gate import Gate, GivenScore, PrototypeScore, QueryScore

_ALIGNMENT = 16
# Gates of one form in one slice of a projection, each with its layer.
_Alike = Sequence[tuple[int, Gate]]


class ScoreTables:
    """The scores of all gated adapters that are on the device.

    Args:
        layout: Shape of the base.
        device: Where the kernels run.

    Attributes:
        tables: Per projection in which an adapter has had gates, ``[layers, slots, slices, WORDS]``
            int64; see ``gate_words``.
    """

    def __init__(self, layout: ProjectionLayout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self.tables: dict[str, torch.Tensor] = {}
        # Tensors by adapter; keeps the addresses in the tables valid.
        self._kept: dict[str, list[torch.Tensor]] = {}

    def put(self, key: str, operators: AdapterOperators, slot: int, num_slots: int) -> None:
        """Copies an adapter's score tensors and enters their addresses in its slot."""
        kept = self._kept[key] = []
        components, words = components_of(operators), dict[str, list[int]]()
        for name in self._layout.projections:
            found = [
                (layer, s, gate)
                for layer, s, ops in self._layout.of(operators, name)
                if (gate := ops.get(Gate)) is not None
            ]
            if found or name in self.tables:
                words[name] = self._words(name, found, components, kept)
        flat = host_tensor([*chain(*words.values())], torch.int64)
        parts = upload(flat, self._device).split([len(part) for part in words.values()])
        for name, part in zip(words, parts, strict=True):
            layers, slices = self._layout.num_layers, len(self._layout.projections[name])
            table = self._grown(name, num_slots)
            table[:, slot] = part.view(layers, slices, WORDS)

    def remove(self, key: str) -> None:
        """Releases an adapter's tensors. No step reads their addresses in the tables any more."""
        self._kept.pop(key, None)

    def _grown(self, name: str, num_slots: int) -> torch.Tensor:
        table = self.tables.get(name)
        if table is None:
            shape = (self._layout.num_layers, 0, len(self._layout.projections[name]), WORDS)
            table = torch.zeros(shape, dtype=torch.int64, device=self._device)
        if table.shape[1] < num_slots:
            table = grown(table, num_slots)
        self.tables[name] = table
        return table

    def _words(
        self,
        name: str,
        found: Iterable[tuple[int, int, Gate]],
        components: Sequence[int],
        kept: list[torch.Tensor],
    ) -> list[int]:
        """An adapter's words in a projection, ``[layers, slices, WORDS]`` in one row."""
        count = len(self._layout.projections[name])
        words = [[NO_WORDS] * count for _ in range(self._layout.num_layers)]
        by_slice = sorted(found, key=lambda at: at[1])
        for (s, _), run in groupby(by_slice, lambda at: (at[1], _form(at[2]))):
            alike = [(layer, gate) for layer, _, gate in run]
            for (layer, _), own in zip(alike, _scored(alike, components, kept), strict=True):
                words[layer][s] = own
        return [word for layer in words for own in layer for word in own]


def _form(gate: Gate) -> tuple[object, ...]:
    """The properties that gates must share to be copied together."""
    return type(gate.score), gate.rank_indptr, *(t.shape for t in gate.score.tensors())


def _scored(alike: _Alike, components: Sequence[int], kept: list[torch.Tensor]) -> Iterable[Words]:
    """The words of gates of one form; what they point at is added to ``kept``."""
    score = alike[0][1].score
    if isinstance(score, QueryScore):
        moves = moves_of(components, alike[0][1])

        def laid(keys: torch.Tensor) -> torch.Tensor:
            """Keys by the component's ranks in the pack."""
            own = keys.new_zeros(len(keys), sum(components), keys.shape[2])
            for ranks, target in moves:
                own[:, target] = keys[:, ranks]
            return own

        queries = _apart(((i, _tensor(gate, 0)) for i, gate in alike), kept)
        keys = _apart(((i, _tensor(gate, 1)) for i, gate in alike), kept, laid)
        return [query_words(q, k, len(score.query)) for q, k in zip(queries, keys, strict=True)]
    if isinstance(score, PrototypeScore):
        places = _apart(((i, _tensor(gate, 0)) for i, gate in alike), kept)
        return [
            prototype_words(place, len(components), own.top_k, own.temperature)
            for place, own in zip(places, (gate.score for _, gate in alike), strict=True)
            if isinstance(own, PrototypeScore)
        ]
    modules = (gate.score for _, gate in alike)
    return [told_words(own.module) for own in modules if isinstance(own, GivenScore)]


def _tensor(gate: Gate, number: int) -> torch.Tensor:
    return gate.score.tensors()[number]


def _apart(
    found: Iterable[tuple[int, torch.Tensor]],
    kept: list[torch.Tensor],
    laid: Callable[[torch.Tensor], torch.Tensor] = lambda stack: stack,
) -> list[int]:
    """Copy tensors of several layers, few at a time, to aligned memory of their own.

    Args:
        found: Layers, rising, and a tensor of each.
        kept: List that the copies are added to.
        laid: Turns the tensors of some layers, ``[layers, …]``, into what is to be copied.

    Returns:
        Where each begins.
    """
    places: list[int] = []
    for _, stack in by_layers(found):
        values = laid(stack).flatten(1)
        size, item = values.shape[1], values.itemsize
        step = -(-size * item // _ALIGNMENT) * _ALIGNMENT
        own = values.new_empty(len(values), step // item)
        own[:, :size] = values
        kept.append(own)
        places += range(own.data_ptr(), own.data_ptr() + len(values) * step, step)
    return places
