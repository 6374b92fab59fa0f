"""Where the running adapters' tensors lie in host memory, for the compiled CPU kernels.

An adapter's entry is a table of pointers to its operators. Copied are only the factors that the
kernels read in another order, of Hadamard, Kronecker, circulant and sparse updates.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turret.kernels.cpu.circulant import CirculantFactors
from turret.kernels.cpu.layers import PROJECTIONS, NativePlace
from turret.kernels.cpu.row_adapters import (
    HadamardFactors,
    KroneckerFactors,
    ModuleSizes,
    ModuleTable,
    ProjectionShape,
)
from turret.kernels.cpu.sparse import SparseBlocks, blocks_bytes
from turret.kernels.rows.tables import COLUMNS, padded
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.part import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.updates import Hadamard, Kronecker, piece_sums


class ModuleNumbers:
    """The fused projections of all layers, as the kernels number their modules.

    Attributes:
        num_modules: Modules of all layers.
        sizes: Their sizes.
        max_slices: Most slices that a projection has.
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
        """Of the projections of all layers, for ``turret.kernels.cpu.layers``."""
        return (NativePlace * (self._num_layers * len(PROJECTIONS)))(
            *(
                NativePlace(self.shape(layer, name).address, self.first(layer, name))
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
        operators: Held because the table points into them.
        modules: The table.
        updates: Projections with an update, gain or bias in some layer.
        gains: Projections with a gain or pairs in some layer, which the base's own result meets.
        input_changes: Projections with an input gain or input blocks in some layer.
        shared_gains: Those of them in which all slices have one input gain, in every layer.
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
                _put(modules, self._numbers.first(layer, name) + s, ops, pieces)
                parts = (ops.low_rank, ops.hadamard, ops.kronecker, ops.circulant, ops.pairs)
                parts = (*parts, ops.sparse, ops.dense, ops.gain, ops.bias)
                if any(part is not None for part in parts):
                    updates.add(name)
                if ops.gain is not None or ops.pairs is not None:
                    gains.add(name)
                if ops.input_gain is not None or ops.input_blocks is not None:
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
        modules = operators.modules.values()
        copied = [_transposed(ops.hadamard) for ops in modules if ops.hadamard is not None]
        copied += [_transposed(ops.kronecker) for ops in modules if ops.kronecker is not None]
        kernels = [ops.circulant.kernel for ops in modules if ops.circulant is not None]
        others = sum(_spectrum_bytes(kernel) for kernel in kernels)
        sparse = [ops.sparse for ops in modules if ops.sparse is not None]
        others += sum(blocks_bytes(entries.columns, entries.row_starts) for entries in sparse)
        return others + sum(tensor.nbytes for found in copied for tensor in found)


def _spectrum_bytes(kernel: torch.Tensor) -> int:
    """Bytes of the fp32 transforms that the kernels read in place of a circulant's kernel."""
    rows, columns, size = kernel.shape
    return rows * columns * 8 * padded(size // 2 + 1, COLUMNS)


class _PieceSums:
    """Knows the factors that add pieces of the input up (MiSS), which modules share."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.Size], bool] = {}

    def __contains__(self, a: torch.Tensor) -> bool:
        """Whether ``A[r, i]``, ``[rank, in]``, is 1 for ``i mod rank = r`` and else 0."""
        key = a.data_ptr(), a.shape
        if key not in self._known:
            rank, inner = a.shape
            # Others differ in their first element already.
            is_like = a.numel() > 0 and a[0, 0].item() == 1
            self._known[key] = is_like and torch.equal(a, piece_sums(rank, inner, a.dtype))
        return self._known[key]


def _put(table: ModuleTable, module: int, ops: ModuleOperators, pieces: _PieceSums) -> None:
    low_rank, hadamard, kronecker = ops.low_rank, ops.hadamard, ops.kronecker
    table.put(
        module,
        a=None if low_rank is None or low_rank.a in pieces else low_rank.a,
        b=None if low_rank is None else low_rank.b,
        gain=ops.gain,
        bias=ops.bias,
        input_gain=ops.input_gain,
        hadamard=None if hadamard is None else _hadamard(hadamard),
        kronecker=None if kronecker is None else _kronecker(kronecker),
        input_blocks=None if ops.input_blocks is None else ops.input_blocks.blocks,
        pairs=None if ops.pairs is None else (ops.pairs.sine, ops.pairs.group),
        circulant=None if ops.circulant is None else CirculantFactors.of(ops.circulant.kernel),
        sparse=None if ops.sparse is None else SparseBlocks.of(*ops.sparse.tensors()),
        dense=None if ops.dense is None else ops.dense.weight,
    )


def _shares_gain(found: Sequence[tuple[int, int, ModuleOperators]], num_slices: int) -> bool:
    """Whether in every layer all slices have the input gain, one tensor, and no other change."""
    by_layer: dict[int, list[torch.Tensor | None]] = {}
    for layer, _, ops in found:
        gain = None if ops.input_blocks is not None else ops.input_gain
        by_layer.setdefault(layer, []).append(gain)
    return all(
        len(gains) == num_slices and gains[0] is not None and all(g is gains[0] for g in gains)
        for gains in by_layer.values()
    )


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
