"""The running adapters where they lie in host memory, for the compiled CPU kernels.

An adapter's entry is a table of pointers to its operators, and each row of a step reads the factors
of its own adapters. Copied are only the factors that the kernels read transposed, of Hadamard and
Kronecker updates. Learned fusions, embeddings and heads are in ``unstacked.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from turret.kernels.cpu.row_adapters import (
    HadamardFactors,
    KroneckerFactors,
    ModuleSizes,
    ModuleTable,
    ProjectionShape,
    RowAdapters,
    RowSegment,
)
from turret.server.adapters.device.extras import StepExtras, TorchExtras
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Members, StepMembers
from turret.server.adapters.device.shelves import Shelves
from turret.server.adapters.device.store import BaseProduct, OnMoved, Resident, StoredAdapters
from turret.server.adapters.operators import AdapterOperators, Hadamard, Kronecker


@dataclass(slots=True)
class _Entry:
    """An adapter in the store.

    ``groups`` are those with an update, gain or bias in some layer; ``input_gains`` those with an
    input gain. ``operators`` are held because the table points into them.
    """

    adapter: Resident
    operators: AdapterOperators
    table: ModuleTable
    groups: frozenset[str]
    input_gains: frozenset[str]
    last_step: int


class CpuStore(StoredAdapters[_Entry]):
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
        layout: ProjectionLayout,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int,
        on_moved: OnMoved = lambda _: None,
    ) -> None:
        unstacked = TorchExtras(layout, device, Shelves((), device))
        super().__init__(max_bytes, unstacked, on_moved)
        self._layout = layout
        self._projections = Projections(layout)

    def stored_bytes(self, operators: AdapterOperators) -> int:
        """Bytes an adapter takes: of its operators, and of the factors that are copied."""
        modules = operators.modules.values()
        copied = [_transposed(ops.hadamard) for ops in modules if ops.hadamard is not None]
        copied += [_transposed(ops.kronecker) for ops in modules if ops.kronecker is not None]
        return operators.num_bytes + sum(tensor.nbytes for found in copied for tensor in found)

    def step(self, members: StepMembers) -> CpuStep:
        assert isinstance(self._unstacked, TorchExtras)
        segments = self._segments(members)
        entries = {key: self._entries[key] for segment in segments for key, _ in segment[2]}
        input_gains: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for group in frozenset().union(*(e.input_gains for e in entries.values())):
            places, numbers = [], []
            for number, (start, end, mix) in enumerate(segments):
                if any(group in entries[key].input_gains for key, _ in mix):
                    places.extend(range(start, end))
                    numbers.extend([number] * (end - start))
            input_gains[group] = torch.tensor(places), torch.tensor(numbers)
        rows = RowAdapters(
            [
                RowSegment(start, end, [(entries[key].table, weight) for key, weight in mix])
                for start, end, mix in segments
            ],
            self._projections.max_slices,
            self._projections.sizes,
        )
        long = members.long
        return CpuStep(
            rows=rows,
            projections=self._projections,
            groups=frozenset().union(*(e.groups for e in entries.values())),
            input_gains=input_gains,
            others=slice(len(members.short), long[0][0] if long else None),
            unstacked=self._unstacked.bind(members),
        )

    @staticmethod
    def _segments(members: StepMembers) -> list[tuple[int, int, Members]]:
        """The adapted rows by mix."""
        segments: list[tuple[int, int, Members]] = []
        for row, mix in enumerate(members.short):
            if segments and segments[-1][2] == mix:
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
                low_rank, hadamard, kronecker = ops.low_rank, ops.hadamard, ops.kronecker
                table.put(
                    self._projections.module(layer, name) + s,
                    a=None if low_rank is None else low_rank.a,
                    b=None if low_rank is None else low_rank.b,
                    gain=ops.gain,
                    bias=ops.bias,
                    input_gain=ops.input_gain,
                    hadamard=None if hadamard is None else _hadamard(hadamard),
                    kronecker=None if kronecker is None else _kronecker(kronecker),
                )
                parts = (low_rank, hadamard, kronecker, ops.gain, ops.bias)
                if any(part is not None for part in parts):
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


def _transposed(factors: Hadamard | Kronecker) -> tuple[torch.Tensor, ...]:
    """The factors that the kernels read the other way round."""
    if isinstance(factors, Hadamard):
        return factors.w1a, factors.w2a
    return (factors.w2 if isinstance(factors.w2, torch.Tensor) else factors.w2[0],)


def _hadamard(factors: Hadamard) -> HadamardFactors:
    w1a, w2a = (factor.T.contiguous() for factor in _transposed(factors))
    return HadamardFactors(w1a, factors.w1b, w2a, factors.w2b)


def _kronecker(factors: Kronecker) -> KroneckerFactors:
    (w2,) = (factor.T.contiguous() for factor in _transposed(factors))
    if isinstance(factors.w2, torch.Tensor):
        return KroneckerFactors(factors.w1, w2)
    return KroneckerFactors(factors.w1, (factors.w2[1], w2))


class Projections:
    """The fused projections of all layers, as the kernels number their modules."""

    def __init__(self, layout: ProjectionLayout) -> None:
        self._modules_per_layer = 0
        self._first_module: dict[str, int] = {}
        self._columns: dict[str, list[slice]] = {}
        for name, slices in layout.groups.items():
            self._first_module[name] = self._modules_per_layer
            self._modules_per_layer += len(slices)
            ends = [0, *accumulate(shape.out_features for shape in slices)]
            self._columns[name] = [slice(*pair) for pair in pairwise(ends)]
        self.num_modules = layout.num_layers * self._modules_per_layer
        self.sizes = ModuleSizes(
            [(s.in_features, s.out_features) for slices in layout.groups.values() for s in slices],
            layout.num_layers,
        )
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
        return self._columns[group]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuStep:
    """See ``AdapterStep``.

    Attributes:
        rows: The segments.
        projections: Of the model.
        groups: Those in which some adapter of the step has an update, gain or bias.
        input_gains: Per group with input gains, their rows and each row's segment.
        others: Rows of the base model alone.
        unstacked: The other operators.
    """

    rows: RowAdapters
    projections: Projections
    groups: frozenset[str]
    input_gains: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    others: slice
    unstacked: StepExtras

    def project(
        self,
        layer: int,
        group: str,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        base: BaseProduct,
    ) -> torch.Tensor:
        gained, columns = self.input_gains.get(group), self.projections.columns(group)
        first = self.projections.module(layer, group)
        ahead = self.rows.ahead(first)
        if gained is not None and len(columns) == 1:
            scaled = self.rows.input_gain(first, x, *gained, start=1.0)
            y = base(x.index_copy(0, gained[0], scaled), ahead)
            gained = None
        else:
            y = base(x, ahead)
        if group in self.groups:
            self.rows.adapt(self.projections.shape(layer, group), x, y, bias)
            if bias is not None:
                y[self.others] += bias
        elif bias is not None:
            y += bias
        if gained is not None:
            # Each slice has a gain of its own: W (l ⊙ x) = W x + W ((l − 1) ⊙ x).
            for s, those in enumerate(columns):
                scaled = self.rows.input_gain(first + s, x, *gained, start=0.0)
                y[:, those].index_add_(0, gained[0], base(scaled)[:, those])
        self.unstacked.apply(layer, group, x, y)
        return y
