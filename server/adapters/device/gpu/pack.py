"""The packed matrices of the gpu path: allocated once, so that captured steps stay valid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

import torch

from turret.server.adapters.device.gpu.gated.components import (
    components_of,
    gates_of,
    moves_of,
    ranks_of,
)
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.packed.pack import Pack, PackedKinds
from turret.server.adapters.device.packed.pieces import by_layers
from turret.server.adapters.device.packed.placement import RANK_ALIGNMENT, Place, Placement
from turret.server.adapters.device.packed.projection import PackedProjection
from turret.server.adapters.operators.adapter_operators import AdapterOperators

# The kernels take each adapter's ranks by themselves, wherever they begin: there are no windows.
_ONE_WINDOW = 1 << 40
# Slots cost tables of gains and biases; more of them are made if a batch has more adapters.
_RANKS_PER_SLOT = 16
_MIN_SLOTS = 8


class GpuPackedProjection(PackedProjection):
    """A packed projection that also knows how many ranks every adapter has in every module.

    Attributes:
        slice_ranks: ``[layers, slots, slices]`` int32.
    """

    def __init__(
        self, layout: ProjectionLayout, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layout, name, dtype, device)
        self.slice_ranks = self._ranks(1)

    def _ranks(self, num_slots: int) -> torch.Tensor:
        shape = (self._layout.num_layers, num_slots, len(self.slices))
        return torch.zeros(shape, dtype=torch.int32, device=self._device)

    def reserve(self, ranks: int, num_slots: int) -> None:
        """Allocate for so many ranks and slots, slot 0 included; it holds nothing yet."""
        self.grow(ranks, ())
        self.slice_ranks = self._ranks(num_slots)

    def put_tables(self, operators: AdapterOperators, slot: int, num_slots: int) -> None:
        """Copy an adapter's gains, biases and ranks into its slot; clears what the slot held."""
        super().put_tables(operators, slot, num_slots)
        if self.slice_ranks.shape[1] < num_slots:
            grown = self._ranks(num_slots)
            grown[:, : self.slice_ranks.shape[1]] = self.slice_ranks
            self.slice_ranks = grown
        self.slice_ranks[:, slot] = 0
        found = self._layout.of(operators, self.name)
        for s in range(len(self.slices)):
            self._put_ranks(slot, s, ((layer, ops.rank) for layer, of, ops in found if of == s))

    def put_gates(self, operators: AdapterOperators, place: Place, num_slots: int) -> None:
        """Copy the factors of an adapter's gates into a place that holds nothing besides."""
        nothing = AdapterOperators({})
        self.put_tables(nothing, place.slot, num_slots)
        self.put_low_rank(nothing, place.rank_start, place.rank_end)
        found, components = self._layout.of(operators, self.name), components_of(operators)
        for s, b in enumerate(self.b):
            own = [(i, ops.gate) for i, of, ops in found if of == s and ops.gate is not None]
            # A component reads what is behind its own ranks there: zeros.
            self._put_ranks(place.slot, s, ((layer, max(ranks_of(gate))) for layer, gate in own))
            for _, run in groupby(own, lambda at: at[1].rank_indptr):
                alike = list(run)
                moves = moves_of(components, alike[0][1])
                here = slice(place.rank_start, place.rank_end)
                for layers, factor in by_layers((i, gate.a) for i, gate in alike):
                    for ranks, target in moves:
                        self.a[layers, here][:, target, s] = factor[:, ranks]
                for layers, factor in by_layers((i, gate.b) for i, gate in alike):
                    for ranks, target in moves:
                        b[layers, here][:, target] = factor[:, ranks]

    def _put_ranks(self, slot: int, s: int, own: Iterable[tuple[int, int]]) -> None:
        """Note an adapter's ranks in a slice, by layer."""
        # Neighbouring layers of one rank at once: a number in the launch, nothing is uploaded.
        for (rank, _), run in groupby(enumerate(own), lambda at: (at[1][1], at[1][0] - at[0])):
            layers = [layer for _, (layer, _) in run]
            self.slice_ranks[layers[0] : layers[-1] + 1, slot, s].fill_(rank)

    def addresses(self) -> list[object]:
        """Where its matrices are, and how large."""
        return [(t.data_ptr(), t.shape) for t in (self.a, *self.b, self.slice_ranks)]

    def optional_addresses(self, kinds: PackedKinds) -> list[object]:
        """Where the tables are that adapters of some kinds read, and how large."""
        tables = (
            self.gain_delta if self.name in kinds.gains else None,
            self.input_gain_delta if self.name in kinds.input_gains else None,
            self.bias if self.name in kinds.biases else None,
        )
        return [None if t is None else (t.data_ptr(), t.shape) for t in tables]


class GpuPack(Pack[GpuPackedProjection]):
    """A pack as large as its budget from the start.

    What fits by its bytes fits: where free ranks are scattered, adapters move together within the
    matrices, whose addresses do not change. The components of a gated adapter lie behind each other
    in a place of their own. Idle adapters stay until their bytes or their slot are
    needed, because a step reads the ranks of its own adapters and no others.

    Args:
        layout: Shape of the base.
        projections: The matrices, by name.
        max_bytes: Budget.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        projections: Mapping[str, GpuPackedProjection],
        max_bytes: int,
    ) -> None:
        super().__init__(layout, projections, _ONE_WINDOW)
        ranks = max_bytes // self._rank_bytes // RANK_ALIGNMENT * RANK_ALIGNMENT
        self._placement.reserve(ranks, max(ranks // _RANKS_PER_SLOT, _MIN_SLOTS))
        for projection in self.projections.values():
            projection.reserve(ranks, self._placement.num_slots)

    def gates(self, key: str) -> Place | None:
        """Where the components of an adapter's gates lie: ranks and a slot of their own."""
        return self.places.get(_gates_of(key))

    def slots(self, key: str) -> list[int]:
        """All slots of an adapter."""
        found = (self.places.get(name) for name in (key, _gates_of(key)))
        return [place.slot for place in found if place is not None]

    def has_room(self, operators: AdapterOperators) -> bool:
        return self._placement.has_slots(2 if components_of(operators) else 1)

    def extra_bytes(self, operators: AdapterOperators) -> int:
        width = Placement.width_of(sum(components_of(operators)))
        held = sum(gate.a.nbytes + gate.b.nbytes for gate in gates_of(operators))
        return super().extra_bytes(operators) + width * self._rank_bytes - held

    def insert(self, key: str, operators: AdapterOperators) -> None:
        super().insert(key, operators)
        components = components_of(operators)
        if not components:
            return
        place = self._place(_gates_of(key), Placement.width_of(sum(components)))
        for projection in self.projections.values():
            projection.put_gates(operators, place, self.num_slots)

    def remove(self, key: str) -> None:
        super().remove(key)
        self._placement.remove(_gates_of(key))

    def _make_room(self, width: int) -> None:
        moves = self._placement.compact()
        assert self._placement.has_room(width), "the store keeps to its budget"
        for projection in self.projections.values():
            projection.move(moves)


def _gates_of(key: str) -> str:
    """The name of a place of its own."""
    return f"gates of {key}"
