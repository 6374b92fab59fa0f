"""The packed matrices of the gpu path: allocated once, so that captured steps stay valid."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import torch

from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.packed.pack import Pack, PackedKinds
from turret.server.adapters.device.packed.placement import RANK_ALIGNMENT
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
            own = ((layer, ops.rank) for layer, of, ops in found if of == s)
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
    matrices, whose addresses do not change. Idle adapters stay until their bytes or their slot are
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

    def has_room(self, operators: AdapterOperators) -> bool:
        return self._placement.has_slot

    def _make_room(self, width: int) -> None:
        moves = self._placement.compact()
        assert self._placement.has_room(width), "the store keeps to its budget"
        for projection in self.projections.values():
            projection.move(moves)
