"""The running adapters where they lie in host memory, for the compiled CPU kernels.

Nothing is copied: an adapter's entry is a table of pointers to its operators, and each row of a
step reads the factors of its own adapters. The other operators are in ``unstacked.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from turret.kernels.cpu.low_rank import LowRankStep, ModuleTable, ProjectionShape, RowSegment
from turret.server.adapters.adapter_store import BaseProduct, OnMoved, Resident
from turret.server.adapters.bank import Members, StepMembers
from turret.server.adapters.operators import AdapterOperators
from turret.server.adapters.packed_group import PackLayout
from turret.server.adapters.stored_adapters import StoredAdapters
from turret.server.adapters.unstacked import BoundUnstacked, Unstacked


@dataclass(slots=True)
class _Entry:
    """An adapter in the store.

    ``groups`` are those with a low-rank update, gain or bias in some layer; ``input_gains`` those
    with an input gain. ``operators`` are held because the table points into them.
    """

    adapter: Resident
    operators: AdapterOperators
    table: ModuleTable
    groups: frozenset[str]
    input_gains: frozenset[str]
    last_step: int


class GatheredAdapters(StoredAdapters[_Entry]):
    """See ``AdapterStore``.

    Args:
        layout: Shape of the base.
        dtype: Serving dtype, bf16.
        device: The CPU.
        max_bytes: Budget of what is in the store.
        on_moved: Told of every adapter that entered or left.
    """

    def __init__(
        self,
        layout: PackLayout,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int,
        on_moved: OnMoved = lambda _: None,
    ) -> None:
        super().__init__(max_bytes, Unstacked(layout, device), on_moved)
        self._layout = layout
        self._projections = Projections(layout)

    def stored_bytes(self, operators: AdapterOperators) -> int:
        """Bytes an adapter takes: of its operators, most of which are not copied."""
        return operators.num_bytes + self._unstacked.extra_bytes(operators)

    def step(self, members: StepMembers) -> GatheredStep:
        segments = self._segments(members)
        entries = {key: self._entries[key] for segment in segments for key, _ in segment[2]}
        input_gains: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for group in frozenset().union(*(e.input_gains for e in entries.values())):
            rows, numbers = [], []
            for number, (start, end, mix) in enumerate(segments):
                if any(group in entries[key].input_gains for key, _ in mix):
                    rows.extend(range(start, end))
                    numbers.extend([number] * (end - start))
            input_gains[group] = torch.tensor(rows), torch.tensor(numbers)
        low_rank = LowRankStep(
            [
                RowSegment(start, end, [(entries[key].table, weight) for key, weight in mix])
                for start, end, mix in segments
            ],
            self._projections.max_slices,
        )
        long = members.long
        return GatheredStep(
            low_rank=low_rank,
            projections=self._projections,
            groups=frozenset().union(*(e.groups for e in entries.values())),
            input_gains=input_gains,
            others=slice(len(members.short), long[0][0] if long else None),
            unstacked=self._unstacked.bind(members),
        )

    @staticmethod
    def _segments(members: StepMembers) -> list[tuple[int, int, Members]]:
        """The adapted rows by mix; the rows of one request share one ``Members``."""
        segments: list[tuple[int, int, Members]] = []
        for row, mix in enumerate(members.short):
            if segments and segments[-1][2] is mix:
                segments[-1] = (segments[-1][0], row + 1, mix)
            else:
                segments.append((row, row + 1, mix))
        return [*segments, *members.long]

    def _is_current(self, entry: _Entry) -> bool:
        """Whether the tensors that it points to are those that are in host memory now."""
        return entry.operators is entry.adapter.operators

    def _insert(self, adapter: Resident) -> None:
        self._drop_evicted()
        super()._insert(adapter)

    def _store(self, adapter: Resident, operators: AdapterOperators) -> None:
        table = ModuleTable(self._projections.num_modules)
        groups, input_gains = set(), set()
        for name in self._layout.groups:
            for layer, s, ops in self._layout.of(operators, name):
                low_rank = ops.low_rank
                table.put(
                    self._projections.module(layer, name) + s,
                    a=None if low_rank is None else low_rank.a,
                    b=None if low_rank is None else low_rank.b,
                    gain=ops.gain,
                    bias=ops.bias,
                    input_gain=ops.input_gain,
                )
                if low_rank is not None or ops.gain is not None or ops.bias is not None:
                    groups.add(name)
                if ops.input_gain is not None:
                    input_gains.add(name)
        table.close()
        self._entries[adapter.key] = _Entry(
            adapter, operators, table, frozenset(groups), frozenset(input_gains), self._step
        )

    def _drop_evicted(self) -> None:
        """Let go of adapters that left host memory: the store alone would keep their tensors."""
        gone = [
            key
            for key, entry in self._entries.items()
            if entry.adapter.operators is not entry.operators and entry.last_step < self._step
        ]
        for key in gone:
            self.drop(key)


class Projections:
    """The fused projections of all layers, as the kernels number their modules."""

    def __init__(self, layout: PackLayout) -> None:
        self._layout = layout
        self._modules_per_layer = 0
        self._first_module: dict[str, int] = {}
        for name, slices in layout.groups.items():
            self._first_module[name] = self._modules_per_layer
            self._modules_per_layer += len(slices)
        self.num_modules = layout.num_layers * self._modules_per_layer
        self.max_slices = max(len(slices) for slices in layout.groups.values())
        self._shapes = {
            (layer, name): ProjectionShape(
                slices[0].in_features,
                [shape.out_features for shape in slices],
                self.module(layer, name),
            )
            for layer in range(layout.num_layers)
            for name, slices in layout.groups.items()
        }

    def module(self, layer: int, group: str) -> int:
        """Number of the group's first module."""
        return layer * self._modules_per_layer + self._first_module[group]

    def shape(self, layer: int, group: str) -> ProjectionShape:
        return self._shapes[layer, group]

    def columns(self, group: str) -> list[slice]:
        """The columns of each slice in a fused result."""
        found, start = [], 0
        for shape in self._layout.groups[group]:
            found.append(slice(start, start + shape.out_features))
            start += shape.out_features
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class GatheredStep:
    """See ``AdapterStep``.

    Attributes:
        low_rank: The segments.
        projections: Of the model.
        groups: Those in which some adapter of the step has a low-rank update, gain or bias.
        input_gains: Per group with input gains, their rows and each row's segment.
        others: Rows of the base model alone.
        unstacked: The other operators.
    """

    low_rank: LowRankStep
    projections: Projections
    groups: frozenset[str]
    input_gains: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    others: slice
    unstacked: BoundUnstacked

    def apply(
        self,
        layer: int,
        group: str,
        x: torch.Tensor,
        y: torch.Tensor,
        bias: torch.Tensor | None,
        base: BaseProduct,
    ) -> None:
        if group in self.groups:
            self.low_rank.adapt(self.projections.shape(layer, group), x, y, bias)
            if bias is not None:
                y[self.others] += bias
        elif bias is not None:
            y += bias
        if group in self.input_gains:
            # W (l ⊙ x) = W x + W ((l − 1) ⊙ x): exact beside any other operator of the mix.
            rows, segments = self.input_gains[group]
            first = self.projections.module(layer, group)
            for s, columns in enumerate(self.projections.columns(group)):
                scaled = self.low_rank.input_gain(first + s, x, rows, segments)
                y[:, columns].index_add_(0, rows, base(scaled)[:, columns])
        self.unstacked.apply(layer, group, x, y)
