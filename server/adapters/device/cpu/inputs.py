"""Changes of inputs by adapters on the CPU path: input gains and input blocks.

With ``x' = x + Σ_k w_k (T_k x − x)``, the mix of a row determines which of three ways is used:

- ``common``: if every slice takes the same ``x'``, because there is only one slice or the slices
  share a gain (LN tuning), the base multiplies ``x'`` instead of ``x``, in the product with all
  other rows;
- ``own``: otherwise each slice of the base multiplies its own ``x'``, and the row is left out of
  the common product: the weight is read twice in the step, and no row is multiplied twice;
- ``added``: if there is a gain, and a change of another member, which the gain must not scale, the
  changes are separate products that are added last: ``Σ_k w_k g_k ⊙ W (T_k x − x)``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from turret.kernels.cpu.layers import PROJECTIONS, NativeInputs
from turret.kernels.cpu.row_adapters import RowAdapters
from turret.server.adapters.device.cpu.tables import AdapterTable, ModuleNumbers
from turret.server.adapters.device.store import BaseProduct, Members, ProjectionLayout


@dataclass(frozen=True, slots=True)
class InputRows:
    """Rows whose input changes.

    Attributes:
        rows: The rows' numbers, ``[n]`` int64.
        members: First and last number of the members whose changes are summed, ``[n, 2]`` int64.
        gained: Adapters whose gains apply to their own changes, with their positions among the
            rows.
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
    """Rows that are still being collected."""

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
    """A step's rows whose input changes, by projection; see the module docstring.

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
        """See ``AdapterStep.multiply``."""
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
    # The gain of a lone adapter applies to its whole result.
    is_lone = scaling == changing and len(changing) == 1 and members[changing[0]][1] == 1.0
    if scaling and not is_lone:
        return "added"
    if num_slices == 1 or all(name in members[k][0].shared_gains for k in changing):
        return "common"
    return "own"
