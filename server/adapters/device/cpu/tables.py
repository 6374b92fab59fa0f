"""Tables of the running adapters' tensors in host memory, for the compiled CPU kernels.

An adapter's entry is a table of pointers to its operators. Only the factors that the kernels read
in another order are copied: those of Hadamard, Kronecker, circulant and sparse updates.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turret.kernels.cpu import row_adapters
from turret.kernels.cpu.layers import EXPERT_PROJECTIONS, PROJECTIONS, NativePlace
from turret.kernels.cpu.row_adapters import (
    CStruct,
    ExpertAdapters,
    ExpertTable,
    ModuleSizes,
    ModuleTable,
    ProjectionShape,
    blocks_bytes,
)
from turret.kernels.rows.linear import COLUMNS, padded
from turret.server.adapters.device.store import (
    KERNELS,
    ExpertPairs,
    Part,
    ProjectionLayout,
    StepMembers,
)
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.circulant import Circulant
from turret.server.adapters.operators.dense import Dense
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.input_blocks import InputBlocks
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import LowRank, piece_sums
from turret.server.adapters.operators.operator import Operator
from turret.server.adapters.operators.pair_rotation import PairRotation
from turret.server.adapters.operators.sparse import Sparse
from turret.server.adapters.operators.vectors import Bias, Gain, InputGain

# Low-rank updates of experts on the CPU path.


@dataclass(frozen=True, slots=True)
class CpuStepExperts:
    """A step's rows whose adapters change experts."""

    adapters: ExpertAdapters

    def apply(self, pairs: ExpertPairs) -> None:
        """Add the updates of one layer's projection, in place; see ``AdapterStep``."""
        update = _number(pairs.layer, pairs.projection)
        self.adapters.adapt(update, pairs.x, pairs.y, pairs.routing, pairs.rows)


def _number(layer: int, projection: str) -> int:
    """The number of a projection of experts among the updates of an ``ExpertTable``."""
    return layer * len(EXPERT_PROJECTIONS) + EXPERT_PROJECTIONS.index(projection)


class CpuExpertUpdates(Part):
    """The tables of the adapters in the store that change experts, by key."""

    def __init__(self, layout: ProjectionLayout) -> None:
        self._layout = layout
        self._tables: dict[str, ExpertTable] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        """Add an adapter if it changes experts."""
        found: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * (
            self._layout.num_layers * len(EXPERT_PROJECTIONS)
        )
        for name in self._layout.experts:
            for layer, update in self._layout.of_experts(operators, name):
                found[_number(layer, name)] = update.a, update.b
        if any(found):
            self._tables[key] = ExpertTable(found)

    def remove(self, key: str) -> None:
        self._tables.pop(key, None)

    def bind(self, members: StepMembers) -> CpuStepExperts | None:
        """The step's rows, or None if no row's adapter changes experts."""
        spans = [(row, row + 1, mix) for row, mix in enumerate(members.short)]
        rows: list[list[tuple[ExpertTable, float]]] = []
        for start, end, mix in (*spans, *members.long):
            chosen = [(self._tables[key], w) for key, w in mix if key in self._tables]
            if chosen:
                rows += [[] for _ in range(start - len(rows))]
                rows += [chosen] * (end - start)
        return CpuStepExperts(ExpertAdapters(rows)) if rows else None


_INPUT_CHANGES = {InputGain, InputBlocks}
_SERVED = {kind for kind, paths in KERNELS.items() if "cpu" in paths}


class ModuleNumbers:
    """The fused projections of all layers, with the kernels' numbers of their modules.

    Attributes:
        num_modules: Modules of all layers.
        sizes: The sizes of these modules.
        max_slices: The maximum number of slices of a projection.
    """

    def __init__(self, layout: ProjectionLayout) -> None:
        self._per_layer = 0
        self._first: dict[str, int] = {}
        for name, slices in layout.projections.items():
            self._first[name] = self._per_layer
            self._per_layer += len(slices)
        self.num_modules = layout.num_layers * self._per_layer
        self.sizes = ModuleSizes(
            [
                (s.in_features, s.out_features)
                for slices in layout.projections.values()
                for s in slices
            ],
            layout.num_layers,
        )
        self.max_slices = max(len(slices) for slices in layout.projections.values())
        self._shapes = {
            (layer, name): ProjectionShape(
                slices[0].in_features,
                [shape.out_features for shape in slices],
                self.first(layer, name),
            )
            for layer in range(layout.num_layers)
            for name, slices in layout.projections.items()
        }

        self._num_layers = layout.num_layers

    @functools.cached_property
    def places(self) -> ctypes.Array[NativePlace]:
        """Places of all layers' projections, for ``turret.kernels.cpu.layers``."""
        return (NativePlace * (self._num_layers * len(PROJECTIONS)))(
            *(
                NativePlace(self.shape(layer, name).address, self.first(layer, name))
                if name in self._first
                else NativePlace()
                for layer in range(self._num_layers)
                for name in PROJECTIONS
            )
        )

    def first(self, layer: int, projection: str) -> int:
        """Number of the projection's first module."""
        return layer * self._per_layer + self._first[projection]

    def shape(self, layer: int, projection: str) -> ProjectionShape:
        return self._shapes[layer, projection]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterTable:
    """An adapter's operators and the table that points to them.

    Attributes:
        operators: The operators; kept because the table points into them.
        modules: The table.
        updates: Projections with an update, gain or bias in some layer.
        gains: Projections with a gain or pairs in some layer, which change the base's own result.
        input_changes: Projections with an input gain or input blocks in some layer.
        shared_gains: The ``input_changes`` in which all slices share one input gain, in every
            layer.
    """

    operators: AdapterOperators
    modules: ModuleTable
    updates: frozenset[str]
    gains: frozenset[str]
    input_changes: frozenset[str]
    shared_gains: frozenset[str]


class AdapterTables(Part):
    """The tables of the adapters in the cpu path's store, by key."""

    def __init__(self, layout: ProjectionLayout, numbers: ModuleNumbers) -> None:
        self._layout = layout
        self._numbers = numbers
        self._tables: dict[str, AdapterTable] = {}

    def __getitem__(self, key: str) -> AdapterTable:
        return self._tables[key]

    def insert(self, key: str, operators: AdapterOperators) -> None:
        modules = ModuleTable(self._numbers.num_modules)
        pieces = _PieceSums()
        updates, gains, changes, shared = set(), set(), set(), set()
        for name in self._layout.projections:
            found = self._layout.of(operators, name)
            for layer, s, ops in found:
                entries = (_entry(part, pieces) for part in ops.operators)
                given = [entry for entry in entries if entry is not None]
                modules.put(self._numbers.first(layer, name) + s, *given)
                kinds = {type(part) for part in ops.operators} & _SERVED
                if kinds - _INPUT_CHANGES:
                    updates.add(name)
                if kinds & {Gain, PairRotation}:
                    gains.add(name)
                if kinds & _INPUT_CHANGES:
                    changes.add(name)
            if _shares_gain(found, len(self._layout.columns(name))):
                shared.add(name)
        modules.close()
        self._tables[key] = AdapterTable(
            operators, modules, *map(frozenset, (updates, gains, changes, shared))
        )

    def remove(self, key: str) -> None:
        self._tables.pop(key, None)

    def extra_bytes(self, operators: AdapterOperators) -> int:
        """Bytes of the factors that are copied."""
        return sum(
            _copied_bytes(part) for ops in operators.modules.values() for part in ops.operators
        )


def _copied_bytes(part: Operator) -> int:
    """Bytes of an operator's factors that the kernels read in another order."""
    match part:
        case Hadamard():
            return part.w1a.nbytes + part.w2a.nbytes
        case Kronecker():
            return (part.w2 if isinstance(part.w2, torch.Tensor) else part.w2[0]).nbytes
        case Circulant():
            # The kernels read transforms in fp32.
            rows, columns, size = part.kernel.shape
            return rows * columns * 8 * padded(size // 2 + 1, COLUMNS)
        case Sparse():
            return blocks_bytes(part.columns, part.row_starts)
    return 0


class _PieceSums:
    """Recognises factors that sum pieces of the input (MiSS); modules share such factors."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.Size], bool] = {}

    def __contains__(self, a: torch.Tensor) -> bool:
        """Whether ``A[r, i]``, ``[rank, in]``, is 1 for ``i mod rank = r`` and 0 otherwise."""
        key = a.data_ptr(), a.shape
        if key not in self._known:
            rank, inner = a.shape
            # Check one element first: almost every factor of another kind differs there.
            is_like = a.numel() > 0 and a[0, 0].item() == 1
            self._known[key] = is_like and torch.equal(a, piece_sums(rank, inner, a.dtype))
        return self._known[key]


def _entry(part: Operator, pieces: _PieceSums) -> CStruct | None:
    """An operator's entry in its module's table; None if it has no kernel."""
    match part:
        case LowRank():
            return row_adapters.low_rank(None if part.a in pieces else part.a, part.b)
        case Gain() | Bias() | InputGain():
            return CStruct(part.name, (part.values,))
        case Hadamard():
            w1a, w2a = _transposed(part)
            return row_adapters.hadamard(w1a, part.w1b, w2a, part.w2b)
        case Kronecker():
            own = () if isinstance(part.w2, torch.Tensor) else (part.w2[1],)
            return row_adapters.kronecker(part.w1, *own, *_transposed(part))
        case InputBlocks():
            return row_adapters.input_blocks(part.blocks)
        case PairRotation():
            return row_adapters.pairs(part.sine, part.group)
        case Circulant():
            return row_adapters.circulant(part.kernel)
        case Sparse():
            return row_adapters.sparse(*part.tensors())
        case Dense():
            return row_adapters.dense(part.weight)
    return None


def _shares_gain(found: Sequence[tuple[int, int, ModuleOperators]], num_slices: int) -> bool:
    """Whether all slices share one input gain and have no other change, in every layer."""
    by_layer: dict[int, list[torch.Tensor | None]] = {}
    for layer, _, ops in found:
        gain = None if ops.get(InputBlocks) is not None else ops.input_gain
        by_layer.setdefault(layer, []).append(gain)
    return all(
        len(gains) == num_slices and gains[0] is not None and all(g is gains[0] for g in gains)
        for gains in by_layer.values()
    )


def _transposed(part: Hadamard | Kronecker) -> list[torch.Tensor]:
    """The factors that the kernels read transposed, ``[rank, out]`` or ``[in, out]``."""
    if isinstance(part, Hadamard):
        factors = (part.w1a, part.w2a)
    else:
        factors = (part.w2 if isinstance(part.w2, torch.Tensor) else part.w2[0],)
    return [factor.T.contiguous() for factor in factors]
