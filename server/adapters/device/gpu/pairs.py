"""Pair rotations on the gpu path: tables with a slot per adapter of the pack, as for gains."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from turret.kernels.gpu.adapters.pair_rotation import pair_rotation
from turret.kernels.gpu.tables.segment_table import SegmentTable
from turret.server.adapters.device.gpu.pack import GpuPack
from turret.server.adapters.device.hadamard_shelf import grown
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.part import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators


@dataclass(frozen=True, slots=True)
class GpuStepPairs:
    """The projections in which a step has pairs.

    Attributes:
        tables: Per projection, ``sine`` and the outputs of a group; see ``GpuPairs``.
        columns: Per projection, the columns of each slice.
        signature: Names them: the launches of a step.
    """

    tables: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    columns: Mapping[str, Sequence[slice]]
    signature: Hashable

    def changes(self, projection: str) -> bool:
        return projection in self.tables

    def apply(
        self,
        layer: int,
        projection: str,
        before: torch.Tensor,
        y: torch.Tensor,
        table: SegmentTable,
    ) -> None:
        """Add what ``before``, the base's own result, gives to ``y``, in place."""
        if projection in self.tables:
            sine, groups = self.tables[projection]
            for s, columns in enumerate(self.columns[projection]):
                own = sine[layer, :, columns]
                pair_rotation(before[:, columns], y[:, columns], own, groups[layer, :, s], table)


class GpuPairs(Part):
    """The tables, made when an adapter has pairs in a projection.

    Per projection ``sine``, ``[layers, pack slots, sum(out)]`` fp32, and the outputs of a group,
    ``[layers, pack slots, slices]`` int32.

    Args:
        layout: Shape of the base.
        pack: Knows every adapter's slot; an adapter enters it first.
        device: Where the tables are.
    """

    def __init__(self, layout: ProjectionLayout, pack: GpuPack, device: torch.device) -> None:
        self._layout = layout
        self._pack = pack
        self._device = device
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._held: dict[str, frozenset[str]] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        slot, held = self._pack.places[key].slot, set()
        for name in self._layout.projections:
            modules = self._layout.of(operators, name)
            found = [(layer, s, ops.pairs) for layer, s, ops in modules if ops.pairs is not None]
            if not found and name not in self._tables:
                continue
            sine, groups = self._grown(name)
            for held_slot in self._pack.slots(key):
                sine[:, held_slot] = 0
                groups[:, held_slot] = 0
            for layer, s, pairs in found:
                sine[layer, slot, self._layout.columns(name)[s]] = pairs.sine
                groups[layer, slot, s].fill_(pairs.group)
                held.add(name)
        if held:
            self._held[key] = frozenset(held)

    def _grown(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The projection's tables, with a place for every slot of the pack."""
        if name not in self._tables:
            layers, num_slices = self._layout.num_layers, len(self._layout.columns(name))
            sine = torch.zeros(layers, 0, self._layout.width(name), device=self._device)
            groups = torch.zeros(layers, 0, num_slices, dtype=torch.int32, device=self._device)
            self._tables[name] = sine, groups
        sine, groups = self._tables[name]
        if sine.shape[1] < self._pack.num_slots:
            wide = grown(sine, self._pack.num_slots), grown(groups, self._pack.num_slots)
            self._tables[name] = wide
        return self._tables[name]

    def remove(self, key: str) -> None:
        self._held.pop(key, None)

    def of(self, key: str) -> frozenset[str]:
        """Projections in which an adapter has pairs."""
        return self._held.get(key, frozenset())

    def bind(self, mixes: Sequence[Members]) -> GpuStepPairs:
        """The projections in which the mixes of a step have pairs."""
        keys = {key for mix in mixes for key, _ in mix}
        names = sorted({name for key in keys for name in self._held.get(key, ())})
        tables = {name: self._tables[name] for name in names}
        columns = {name: self._layout.columns(name) for name in names}
        addresses = [(t.data_ptr(), t.shape) for pair in tables.values() for t in pair]
        return GpuStepPairs(tables, columns, (tuple(names), tuple(addresses)))
