"""The running adapters where they lie in host memory, for the compiled CPU kernels.

An adapter's entry is a table of pointers to its operators, and each row of a step reads the factors
of its own adapters. Copied are only the factors that the kernels read transposed, of Hadamard and
Kronecker updates. Learned fusions, embeddings and heads are in ``unstacked.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    ``groups`` are those with an update, gain or bias in some layer; ``gains`` those with a gain,
    ``input_gains`` those with an input gain. ``operators`` are held because the table points into
    them.
    """

    adapter: Resident
    operators: AdapterOperators
    table: ModuleTable
    groups: frozenset[str]
    gains: frozenset[str]
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
        scaled, changed = self._input_gains(segments)
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
            scaled=scaled,
            changed=changed,
            others=slice(len(members.short), long[0][0] if long else None),
            unstacked=self._unstacked.bind(members),
        )

    def _input_gains(
        self, segments: Sequence[tuple[int, int, Members]]
    ) -> tuple[dict[str, SegmentRows], dict[str, SegmentRows]]:
        """The rows with input gains per group: of one-input mixes, and of the others.

        One input cannot serve slices with input gains of their own. Nor may a gain in the mix scale
        what another member's input gain changes. Which way a row goes depends on its own mix alone.
        """
        scaled: dict[str, SegmentRows] = {}
        changed: dict[str, SegmentRows] = {}
        mixes = [[self._entries[key] for key, _ in mix] for _, _, mix in segments]
        for group in frozenset().union(*(e.input_gains for mix in mixes for e in mix)):
            has_slices = len(self._projections.columns(group)) > 1
            gained = [n for n, mix in enumerate(mixes) if any(group in e.input_gains for e in mix)]
            sums = [n for n in gained if has_slices or any(group in e.gains for e in mixes[n])]
            inputs = [n for n in gained if n not in sums]
            if inputs:
                scaled[group] = SegmentRows.of(segments, inputs)
            if sums:
                changed[group] = SegmentRows.of(segments, sums)
        return scaled, changed

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
        groups, gains, input_gains = set(), set(), set()
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
                if ops.gain is not None:
                    gains.add(name)
                if ops.input_gain is not None:
                    input_gains.add(name)
        table.close()
        self._entries[adapter.key] = _Entry(
            adapter=adapter,
            operators=operators,
            table=table,
            groups=frozenset(groups),
            gains=frozenset(gains),
            input_gains=frozenset(input_gains),
            last_step=self._step,
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


@dataclass(frozen=True, slots=True)
class SegmentRows:
    """Rows of some segments.

    Attributes:
        rows: Their numbers, ``[n]`` int64.
        segments: The number of each row's segment, ``[n]`` int64.
    """

    rows: torch.Tensor
    segments: torch.Tensor

    @classmethod
    def of(cls, segments: Sequence[tuple[int, int, Members]], chosen: Sequence[int]) -> SegmentRows:
        """The rows of the chosen segments, from (first row, end row, mix) of all."""
        rows = [row for number in chosen for row in range(*segments[number][:2])]
        counts = [segments[number][1] - segments[number][0] for number in chosen]
        numbers = [n for n, count in zip(chosen, counts, strict=True) for _ in range(count)]
        return cls(torch.tensor(rows), torch.tensor(numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuStep:
    """See ``AdapterStep``.

    Attributes:
        rows: The segments.
        projections: Of the model.
        groups: Those in which some adapter of the step has an update, gain or bias.
        scaled: Per group, the rows whose input gains are multiplied into the input.
        changed: Per group, the rows whose input gains are a product of their own, added last.
        others: Rows of the base model alone.
        unstacked: The other operators.
    """

    rows: RowAdapters
    projections: Projections
    groups: frozenset[str]
    scaled: Mapping[str, SegmentRows]
    changed: Mapping[str, SegmentRows]
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
        first = self.projections.module(layer, group)
        ahead = self.rows.ahead(first)
        scaled, changed = self.scaled.get(group), self.changed.get(group)
        if scaled is None:
            y = base(x, ahead)
        else:
            gained = self.rows.input_gain(first, x, scaled.rows, scaled.segments, start=1.0)
            y = base(x.index_copy(0, scaled.rows, gained), ahead)
        if group in self.groups:
            self.rows.adapt(self.projections.shape(layer, group), x, y, bias)
            if bias is not None:
                y[self.others] += bias
        elif bias is not None:
            y += bias
        if changed is not None:
            # W (l ⊙ x) = W x + W ((l − 1) ⊙ x), and each slice has a gain of its own.
            for s, columns in enumerate(self.projections.columns(group)):
                change = self.rows.input_gain(
                    first + s, x, changed.rows, changed.segments, start=0.0
                )
                y[:, columns].index_add_(0, changed.rows, base(change)[:, columns])
        self.unstacked.apply(layer, group, x, y)
        return y
