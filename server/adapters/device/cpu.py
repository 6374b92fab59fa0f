"""The cpu path's store, which uses the running adapters in place in host memory.

Nothing is packed: each row of a step reads the factors of its own adapters, through a table of
pointers to their operators. Only the factors that the kernels read in another form are copied:
some of Hadamard and Kronecker updates, and those of circulant and sparse updates. Operators without
a compiled kernel are computed by their own ``add``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from turret.kernels.cpu import num_threads, row_adapters
from turret.kernels.cpu.layers import EXPERT_PROJECTIONS, PROJECTIONS, NativeInputs, NativePlace
from turret.kernels.cpu.row_adapters import (
    CStruct,
    ExpertAdapters,
    ExpertTable,
    ModuleSizes,
    ModuleTable,
    ProjectionShape,
    RowAdapters,
    RowSegment,
    blocks_bytes,
)
from turret.kernels.rows import COLUMNS, padded
from turret.server.adapters.device import (
    KERNELS,
    BaseProduct,
    ExpertPairs,
    Members,
    OnMoved,
    Part,
    ProjectionLayout,
    StepMembers,
    StepStore,
    has_kernel,
)
from turret.server.adapters.device.reference import Reference, StepReference
from turret.server.adapters.operators import Operator
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.circulant import Circulant
from turret.server.adapters.operators.dense import Dense
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.input_blocks import InputBlocks
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import LowRank, piece_sums
from turret.server.adapters.operators.pair_rotation import PairRotation
from turret.server.adapters.operators.sparse import Sparse
from turret.server.adapters.operators.vectors import Bias, Gain, InputGain


def _number(layer: int, projection: str) -> int:
    """The number of a projection of experts among the updates of an ``ExpertTable``."""
    return layer * len(EXPERT_PROJECTIONS) + EXPERT_PROJECTIONS.index(projection)


class CpuExpertUpdates(Part):
    """The tables of those adapters in the store that change experts, by key."""

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

    def bind(self, members: StepMembers) -> ExpertAdapters | None:
        """The step's rows, or None if no row's adapter changes experts."""
        if not self._tables:
            return None
        rows: list[list[tuple[ExpertTable, float]]] = []
        for start, end, mix in members.runs:
            chosen = [(self._tables[key], w) for key, w in mix if key in self._tables]
            if chosen:
                rows += [[] for _ in range(start - len(rows))]
                rows += [chosen] * (end - start)
        return ExpertAdapters(rows) if rows else None


_INPUT_CHANGES = {InputGain, InputBlocks}
_SERVED = {kind for kind, paths in KERNELS.items() if "cpu" in paths}


class ModuleNumbers:
    """The fused projections of all layers, with the kernels' numbers of their modules.

    Attributes:
        num_modules: The number of modules in all layers.
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
    """Bytes of the copies of an operator's factors that the kernels read in another form."""
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
    """Copies of the factors that the kernels read transposed, ``[rank, out]`` or ``[in, out]``."""
    if isinstance(part, Hadamard):
        factors = (part.w1a, part.w2a)
    else:
        factors = (part.w2 if isinstance(part.w2, torch.Tensor) else part.w2[0],)
    return [factor.T.contiguous() for factor in factors]


@dataclass(frozen=True, slots=True)
class InputRows:
    """Rows whose input changes.

    Attributes:
        rows: The rows' numbers, ``[n]`` int64.
        members: The range of the members whose changes are summed, ``[n, 2]`` int64: the first
            number, and the one after the last.
        gained: Adapters whose gains apply to their own changes, each with the positions of its
            rows among ``rows``.
    """

    rows: torch.Tensor
    members: torch.Tensor
    gained: Sequence[tuple[AdapterTable, torch.Tensor]] = ()
    _others: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])

    def others(self, num_rows: int) -> torch.Tensor:
        """The other rows of a step of ``num_rows`` rows; cached, because every layer needs them."""
        if num_rows not in self._others:
            is_other = torch.ones(num_rows, dtype=torch.bool).index_fill_(0, self.rows, False)
            self._others[num_rows] = is_other.nonzero().squeeze(1)
        return self._others[num_rows]


@dataclass(slots=True)
class _Found:
    """Rows of one ``InputRows`` that are still being collected.

    ``tables`` is empty, or contains the adapter of each row.
    """

    rows: list[int]
    members: list[tuple[int, int]]
    tables: list[AdapterTable]

    def close(self) -> InputRows:
        gained = []
        for table in dict.fromkeys(self.tables):
            if table.gains:
                places = [i for i, other in enumerate(self.tables) if other is table]
                gained.append((table, torch.tensor(places)))
        return InputRows(torch.tensor(self.rows), torch.tensor(self.members).view(-1, 2), gained)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """A step's rows whose input changes, by projection.

    Each member ``k`` of a mix can change the input of a slice of the base, for example of the
    queries' slice in the projection ``qkv``: ``x' = x + Σ_k w_k (T_k x − x)``. A row is treated in
    one of three ways:

    - ``common``, if every slice multiplies the same ``x'``: because there is only one slice, or
      because the slices share a gain (LN tuning). The product of all rows uses ``x'`` instead of
      ``x``.
    - ``own``, if the slices multiply different ``x'``. Each slice of the base multiplies its own
      ``x'``, and the product of all rows leaves the row out. The step reads the weight twice.
    - ``added``, if a member has a gain on its result, which must scale only that member's change.
      The product of all rows uses ``x``, and each member's ``w_k g_k ⊙ W (T_k x − x)`` is added
      at the end. A lone member with weight 1 does not need this: its gain scales everything.

    Attributes:
        layout: Shape of the base.
        numbers: The numbers of its modules.
        common: Rows whose changed input is multiplied in the product of all rows.
        own: Rows for which each slice multiplies its own input.
        added: Rows whose changes are separate products; the n-th entry has each mix's n-th change.
    """

    layout: ProjectionLayout
    numbers: ModuleNumbers
    common: Mapping[str, InputRows]
    own: Mapping[str, InputRows]
    added: Mapping[str, Sequence[InputRows]]
    _native: dict[int, NativeStepInputs] = field(default_factory=dict[int, "NativeStepInputs"])

    def native(self, num_rows: int) -> NativeStepInputs | None:
        """``common`` and ``own`` for a step of ``num_rows`` rows, or None if both are empty."""
        if not (self.common or self.own):
            return None
        if num_rows not in self._native:
            self._native[num_rows] = NativeStepInputs.of(self, num_rows)
        return self._native[num_rows]

    @classmethod
    def of(
        cls,
        segments: Sequence[tuple[int, int, Members]],
        tables: Mapping[str, AdapterTable],
        layout: ProjectionLayout,
        numbers: ModuleNumbers,
    ) -> StepInputs:
        """Determine a step's input changes from its segments (first row, end row, mix)."""
        common: dict[str, _Found] = {}
        own: dict[str, _Found] = {}
        added: dict[str, list[_Found]] = {}
        first = 0
        for start, end, mix in segments:
            members = [(tables[key], weight) for key, weight in mix]
            rows = list(range(start, end))
            for name in frozenset().union(*(t.input_changes for t, _ in members)):
                way = _way(name, members, len(layout.columns(name)))
                if way != "added":
                    found = (common if way == "common" else own).setdefault(
                        name, _Found([], [], [])
                    )
                    found.rows += rows
                    found.members += [(first, first + len(mix))] * len(rows)
                    continue
                changes = [k for k, (t, _) in enumerate(members) if name in t.input_changes]
                places = added.setdefault(name, [])
                for position, k in enumerate(changes):
                    if position == len(places):
                        places.append(_Found([], [], []))
                    places[position].rows += rows
                    places[position].members += [(first + k, first + k + 1)] * len(rows)
                    places[position].tables += [members[k][0]] * len(rows)
            first += len(mix)
        return cls(
            layout=layout,
            numbers=numbers,
            common={name: found.close() for name, found in common.items()},
            own={name: found.close() for name, found in own.items()},
            added={name: [one.close() for one in found] for name, found in added.items()},
        )

    def multiply(
        self, rows: RowAdapters, layer: int, projection: str, x: torch.Tensor, base: BaseProduct
    ) -> torch.Tensor:
        """The base's product of a projection, with the changed inputs of ``common`` and ``own``.

        Args:
            rows: The step's segments.
            layer: Layer number.
            projection: Fused projection.
            x: The projection's input, ``[rows, in]``; not changed.
            base: The base projection, without bias.

        Returns:
            ``[rows, sum(out)]``.
        """
        first = self.numbers.first(layer, projection)
        ahead = rows.ahead(first)
        common, own = self.common.get(projection), self.own.get(projection)
        if common is not None:
            changed = rows.input_change(first, x, common.rows, common.members, start=1.0)
            x = x.index_copy(0, common.rows, changed)
        if own is None:
            return base(x, ahead)
        y = x.new_empty(x.shape[0], self.layout.width(projection))
        others = own.others(x.shape[0])
        if others.numel():
            y.index_copy_(0, others, base(x.index_select(0, others), ahead))
        for s, columns in enumerate(self.layout.columns(projection)):
            changed = rows.input_change(first + s, x, own.rows, own.members, start=1.0)
            y[:, columns].index_copy_(0, own.rows, base.part(s)(changed))
        return y

    def add(
        self,
        rows: RowAdapters,
        layer: int,
        projection: str,
        x: torch.Tensor,
        y: torch.Tensor,
        base: BaseProduct,
    ) -> None:
        """Adds the changes of ``added`` rows, each a separate product, to ``y`` in place."""
        first = self.numbers.first(layer, projection)
        slices = self.layout.projections[projection]
        for changing in self.added.get(projection, ()):
            for s, columns in enumerate(self.layout.columns(projection)):
                change = rows.input_change(first + s, x, changing.rows, changing.members, start=0.0)
                product = base.part(s)(change)
                path = self.layout.module(layer, slices[s].path)
                for table, places in changing.gained:
                    ops = table.operators.modules.get(path)
                    if ops is not None and ops.gain is not None:
                        own = product.index_select(0, places).float() * ops.gain
                        product.index_copy_(0, places, own.to(product.dtype))
                y[:, columns].index_add_(0, changing.rows, product)


@dataclass(frozen=True, slots=True)
class NativeStepInputs:
    """The data that ``turret.kernels.cpu.layers`` needs for a step's changed inputs.

    Attributes:
        table: Changed inputs by projection.
        width: The maximum number of elements in a row of changed inputs, over all projections.
    """

    table: ctypes.Array[NativeInputs]
    width: int
    _changes: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, inputs: StepInputs, num_rows: int) -> NativeStepInputs:
        """The table for a step of ``num_rows`` rows."""
        table, width, kept = (NativeInputs * len(PROJECTIONS))(), 0, {}
        for number, name in enumerate(PROJECTIONS):
            common, own = inputs.common.get(name), inputs.own.get(name)
            if common is None and own is None:
                continue
            changes = torch.zeros(num_rows, 3, dtype=torch.int64)
            for found, is_own in ((common, 0), (own, 1)):
                if found is not None:
                    changes[found.rows] = F.pad(found.members, (0, 1), value=is_own)
            slices = inputs.layout.projections[name]
            count = 1 if own is None else len(slices)
            width = max(width, count * slices[0].in_features)
            kept[name] = changes
            table[number] = NativeInputs(changes.data_ptr(), count)
        return cls(table, width, kept)


def _way(name: str, members: Sequence[tuple[AdapterTable, float]], num_slices: int) -> str:
    """The way in which a projection treats rows of this mix: ``common``, ``own`` or ``added``."""
    scaling = [k for k, (table, _) in enumerate(members) if name in table.gains]
    changing = [k for k, (table, _) in enumerate(members) if name in table.input_changes]
    is_lone = scaling == changing and len(changing) == 1 and members[changing[0]][1] == 1.0
    if scaling and not is_lone:
        return "added"
    if num_slices == 1 or all(name in members[k][0].shared_gains for k in changing):
        return "common"
    return "own"


class CpuStore(StepStore):
    """See ``AdapterStore``.

    Args:
        layout: Shape of the base.
        dtype: Serving dtype, bf16.
        device: The CPU.
        max_bytes: Budget for the adapters in the store.
        on_moved: Called with every adapter that enters or leaves.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int,
        on_moved: OnMoved = lambda _: None,
    ) -> None:
        self._layout = layout
        self._numbers = ModuleNumbers(layout)
        self._tables = AdapterTables(layout, self._numbers)
        self._experts = CpuExpertUpdates(layout)
        self._others = Reference(layout, device, lambda one: not has_kernel(one, "cpu"))
        self._last: _Last | None = None
        parts = (self._tables, self._experts, self._others)
        super().__init__(parts, device, max_bytes, on_moved)

    def step(self, members: StepMembers) -> CpuStep:
        segments = self._segments(members)
        tables = {key: self._tables[key] for _, _, mix in segments for key, _ in mix}
        # Decoding requests keep their adapters from step to step, so try to reuse the last step.
        last = self._last
        if last is not None and last.serves(members, tables):
            last.step.rows.restart()
            return last.step
        rows = RowAdapters(
            [
                RowSegment(start, end, [(tables[key].modules, weight) for key, weight in mix])
                for start, end, mix in segments
            ],
            self._numbers.max_slices,
            self._numbers.sizes,
        )
        long = members.long
        step = CpuStep(
            rows=rows,
            layout=self._layout,
            numbers=self._numbers,
            updates=frozenset().union(*(table.updates for table in tables.values())),
            inputs=StepInputs.of(segments, tables, self._layout, self._numbers),
            base_rows=slice(len(members.short), long[0][0] if long else None),
            experts=self._experts.bind(members),
            others=self._others.bind(members),
        )
        self._last = _Last(members, tables, step) if step.is_reusable else None
        return step

    def drop(self, key: str) -> None:
        if self._last is not None and key in self._last.tables:
            self._last = None
        super().drop(key)

    @staticmethod
    def _segments(members: StepMembers) -> list[tuple[int, int, Members]]:
        """The adapted rows as segments: neighbouring short rows with the same mix are joined."""
        segments: list[tuple[int, int, Members]] = []
        for row, mix in enumerate(members.short):
            if segments and segments[-1][2] == mix:
                segments[-1] = (segments[-1][0], row + 1, mix)
            else:
                segments.append((row, row + 1, mix))
        return [*segments, *members.long]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuStep:
    """See ``AdapterStep``.

    Attributes:
        rows: The step's segments, as the kernels read them.
        layout: Shape of the base.
        numbers: The numbers of its modules.
        updates: Projections in which some adapter of the step has an update, gain or bias.
        inputs: Rows whose input changes.
        base_rows: Rows that use no adapter.
        experts: Rows whose adapters change experts, or None.
        others: Rows whose adapters have operators without a compiled kernel, or None.
    """

    rows: RowAdapters
    layout: ProjectionLayout
    numbers: ModuleNumbers
    updates: frozenset[str]
    inputs: StepInputs
    base_rows: slice
    experts: ExpertAdapters | None
    others: StepReference | None

    @property
    def is_reusable(self) -> bool:
        """Whether this step can be used again for the same rows and adapters."""
        return self.others is None and self.experts is None

    @property
    def is_native(self) -> bool:
        """Whether the native call for all layers can compute the step.

        It supports ``rows``, ``experts``, and changed inputs that the base multiplies.
        """
        return self.others is None and not self.inputs.added

    def attend(self, layer: int, q: torch.Tensor, attended: torch.Tensor) -> None:
        if self.others is not None:
            self.others.attend(layer, q, attended)

    def apply_experts(self, pairs: ExpertPairs) -> None:
        if self.experts is not None:
            update = _number(pairs.layer, pairs.projection)
            self.experts.adapt(update, pairs.x, pairs.y, pairs.routing, pairs.rows)

    def project(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        base: BaseProduct,
    ) -> torch.Tensor:
        y = self.inputs.multiply(self.rows, layer, projection, x, base)
        if projection in self.updates:
            self.rows.adapt(self.numbers.shape(layer, projection), x, y, bias)
            if bias is not None:
                y[self.base_rows] += bias
        elif bias is not None:
            y += bias
        self.inputs.add(self.rows, layer, projection, x, y, base)
        if self.others is not None:
            self.others.apply(layer, projection, x, y, base)
        return y


@dataclass(frozen=True, slots=True)
class _Last:
    """The last step and the values from which it was made."""

    members: StepMembers
    tables: dict[str, AdapterTable]
    step: CpuStep

    def serves(self, members: StepMembers, tables: dict[str, AdapterTable]) -> bool:
        # members.scalings are not compared: no step that reads them is reused, and tensors do not
        # compare as one bool.
        return (
            (members.short, members.long) == (self.members.short, self.members.long)
            and tables.keys() == self.tables.keys()
            and all(self.tables[key] is table for key, table in tables.items())
            and self.step.rows.num_threads == num_threads()
        )
