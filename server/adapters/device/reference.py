"""Applies adapters by their operators' own ``add``.

The torch path applies all operators in this way, and the other paths those without a kernel.

The rows of a step are grouped by mix. A group's calls use only its own rows and its own adapters'
tensors. In each call, the bits of a row do not depend on the other rows. The members of a mix are
added in the request's order, in fp32, with one rounding at the end. A row therefore has the same
bits as if it were computed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from turret.server.adapters.device import (
    BaseProduct,
    ExpertPairs,
    Members,
    OnMoved,
    Part,
    ProjectionLayout,
    StepMembers,
    StepStore,
)
from turret.server.adapters.operators import BaseRows, Operator
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.constant_kv import ConstantKv
from turret.server.adapters.operators.low_rank import ExpertLowRank

O = TypeVar("O", bound=Operator)  # noqa: E741
_Place = tuple[int, str]  # layer, projection


@dataclass(frozen=True, slots=True)
class _Module:
    """Operators of one slice of a projection, and the gain of the whole module."""

    slice: int
    operators: Sequence[Operator]
    gain: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Held:
    """The operators of one adapter that ``Reference`` applies."""

    modules: dict[_Place, list[_Module]] = field(default_factory=dict)
    experts: dict[_Place, ExpertLowRank] = field(default_factory=dict)
    attention: dict[int, ConstantKv] = field(default_factory=dict)

    def operators(self) -> Iterable[Operator]:
        yield from (op for found in self.modules.values() for one in found for op in one.operators)
        yield from self.experts.values()
        yield from self.attention.values()


@dataclass(frozen=True, slots=True)
class _SameMix:
    """Rows that share a mix.

    Attributes:
        rows: The rows' numbers, ``[n]`` int64, or a run of rows.
        members: Adapters, their mix weights, and the rows' scalings from a first pass or None.
        is_decode: On the gpu path, True if all of the rows decode and False if none does; see
            ``server/models/weights/nf4_gpu.py``. None on other paths.
    """

    rows: torch.Tensor | slice
    members: Sequence[tuple[_Held, float, torch.Tensor | None]]
    is_decode: bool | None

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        rows = self.rows
        return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)

    def scatter(self, values: torch.Tensor, part: torch.Tensor) -> None:
        if isinstance(self.rows, slice):
            values[self.rows] = part
        else:
            values.index_copy_(0, self.rows, part.to(values.dtype))

    def are_among(self, rows: torch.Tensor) -> torch.Tensor:
        """Whether each row number belongs to the group, bool."""
        if isinstance(self.rows, slice):
            return (rows >= self.rows.start) & (rows < self.rows.stop)
        return torch.isin(rows, self.rows)

    def modules(self, place: _Place) -> dict[int, list[tuple[_Module, float, torch.Tensor | None]]]:
        """The operators to apply by slice, in the request's order."""
        found: dict[int, list[tuple[_Module, float, torch.Tensor | None]]] = {}
        for held, weight, scalings in self.members:
            for module in held.modules.get(place, ()):
                found.setdefault(module.slice, []).append((module, weight, scalings))
        return found


@dataclass(frozen=True, slots=True)
class StepReference:
    """The rows of a step that ``add`` computes; on the torch path, this is the ``AdapterStep``.

    Attributes:
        groups: The groups; a row is in at most one.
        columns: The columns of each slice, by projection.
    """

    groups: Sequence[_SameMix]
    columns: Mapping[str, Sequence[slice]]

    def apply(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        y: torch.Tensor,
        base: BaseProduct,
        *,
        is_result: bool = False,
    ) -> None:
        """Add the updates of one layer's fused projection to ``y``, in place.

        Args:
            layer: Layer number.
            projection: Fused projection.
            x: The projection's input, ``[rows, in]``.
            y: The sum so far, ``[rows, sum(out)]``.
            base: The bias-free base projection.
            is_result: Whether ``y`` is just the base's result on ``x``.
        """
        for group in self.groups:
            found = group.modules((layer, projection))
            inputs = group.gather(x) if found else x
            for s, parts in found.items():
                view = y[:, self.columns[projection][s]]
                before, product = group.gather(view), base.part(s)
                if group.is_decode is not None:
                    product = product.alone(is_decode=group.is_decode)
                rows = BaseRows(inputs, product, result=before if is_result else None)
                total = before.to(torch.float32, copy=True)
                for module, weight, scalings in parts:
                    rows.gain, rows.scalings = module.gain, scalings
                    for operator in module.operators:
                        operator.add(total, inputs, rows, weight)
                group.scatter(view, total)

    def project(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        base: BaseProduct,
    ) -> torch.Tensor:
        """See ``AdapterStep``."""
        y = base(x)
        self.apply(layer, projection, x, y, base, is_result=True)
        if bias is not None:
            y += bias
        return y

    def apply_experts(self, pairs: ExpertPairs) -> None:
        """Add the updates of experts to ``pairs.y``, in place; see ``AdapterStep``."""
        place, routing, y = (pairs.layer, pairs.projection), pairs.routing, pairs.y
        for group in self.groups:
            found = [(held.experts.get(place), weight) for held, weight, _ in group.members]
            updates = [(update, weight) for update, weight in found if update is not None]
            chosen = group.are_among(routing.rows) if updates else routing.rows
            for expert, run in routing.runs if updates else ():
                numbers = chosen[run].nonzero().squeeze(1) + run.start
                if not numbers.numel():
                    continue
                places = numbers if pairs.rows is None else pairs.rows.index_select(0, numbers)
                inputs = pairs.x.index_select(0, places)
                total = y.index_select(0, numbers).float()
                for update, weight in updates:
                    update.expert(expert).add(total, inputs, BaseRows(inputs, _no_base), weight)
                y.index_copy_(0, numbers, total.to(y.dtype))

    def attend(self, layer: int, q: torch.Tensor, attended: torch.Tensor) -> None:
        """Add the attention to adapters' constant keys, in place; see ``AdapterStep``."""
        for group in self.groups:
            found = [(held.attention.get(layer), weight) for held, weight, _ in group.members]
            for constants, weight in found:
                if constants is not None:
                    change = constants.attend(group.gather(q)).mul_(weight)
                    group.scatter(attended, group.gather(attended).float() + change)


def _no_base(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("an expert's update does not need the base")


class Reference(Part):
    """The operators in a store that their own ``add`` applies, by adapter key.

    Args:
        layout: Shape of the base.
        device: The device on which operators are applied; on the CPU, the tensors in host memory
            are used without a copy.
        takes: Selects the operators to store.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        device: torch.device,
        takes: Callable[[Operator], bool] = lambda operator: True,
    ) -> None:
        self._layout = layout
        self._device = device
        self._takes = takes
        self._held: dict[str, _Held] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        held = _Held()
        for name in self._layout.projections:
            for layer, s, ops in self._layout.of(operators, name):
                taken = [self._moved(part) for part in ops.operators if self._takes(part)]
                if taken:
                    gain = None if ops.gain is None else self._own(ops.gain)
                    module = _Module(s, taken, gain)
                    held.modules.setdefault((layer, name), []).append(module)
        for name in self._layout.experts:
            for layer, update in self._layout.of_experts(operators, name):
                if self._takes(update):
                    held.experts[layer, name] = self._moved(update)
        for layer, constants in (operators.attention or {}).items():
            if self._takes(constants):
                held.attention[layer] = self._moved(constants)
        for operator in held.operators():
            operator.prepare()
        if held.modules or held.experts or held.attention:
            self._held[key] = held

    def _moved(self, operator: O) -> O:
        if self._device.type == "cpu":
            return operator
        return operator.with_tensors(self._own(tensor) for tensor in operator.tensors())

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; on a GPU a copy, because an upload's memory is freed."""
        return tensor.to(self._device, copy=self._device.type != "cpu")

    def remove(self, key: str) -> None:
        self._held.pop(key, None)

    def extra_bytes(self, operators: AdapterOperators) -> int:
        others = (*(operators.experts or {}).values(), *(operators.attention or {}).values())
        more = sum(part.prepared_bytes for part in others if self._takes(part))
        for ops in operators.modules.values():
            taken = [part for part in ops.operators if self._takes(part)]
            more += sum(part.prepared_bytes for part in taken)
            if taken and ops.gain is not None and self._device.type != "cpu":
                more += ops.gain.nbytes
        return more

    def bind(self, members: StepMembers, num_decode: int | None = None) -> StepReference | None:
        """The step's rows, or None if no row's adapter has operators here.

        Args:
            members: The mixes of the step's rows.
            num_decode: On the gpu path, the number of leading rows that decode.
        """
        if not self._held:
            return None
        runs: dict[tuple[Members, bool | None], list[tuple[int, int]]] = {}
        for start, end, mix in members.runs:
            # Skip members of weight 0: where their update overflows, 0 · ∞ would add NaN.
            own = tuple((key, weight) for key, weight in mix if weight and key in self._held)
            if own:
                is_decode = None if num_decode is None else start < num_decode
                runs.setdefault((own, is_decode), []).append((start, end))
        if not runs:
            return None
        columns = {name: self._layout.columns(name) for name in self._layout.projections}
        groups = [
            self._group(mix, found, is_decode, members.scalings)
            for (mix, is_decode), found in runs.items()
        ]
        return StepReference(groups, columns)

    def _group(
        self,
        mix: Members,
        runs: Sequence[tuple[int, int]],
        is_decode: bool | None,
        scalings: Mapping[str, torch.Tensor],
    ) -> _SameMix:
        if len(runs) == 1:
            rows = slice(*runs[0])
        else:
            numbers = [row for start, end in runs for row in range(start, end)]
            rows = torch.tensor(numbers, device=self._device)
        group = _SameMix(rows, (), is_decode)
        members = [
            (self._held[key], weight, group.gather(scalings[key]) if key in scalings else None)
            for key, weight in mix
        ]
        return _SameMix(rows, members, is_decode)


class ReferenceStore(StepStore):
    """The torch path's store.

    On a CPU, the torch path serves float32 and float16, and every dtype without compiled kernels.
    On the gpu path, this store holds the adapters in training.

    Args:
        layout: Shape of the base.
        dtype: Serving dtype.
        device: The device of the model.
        max_bytes: Budget of the adapters in the store.
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
        self._reference = Reference(layout, device)
        super().__init__((self._reference,), device, max_bytes, on_moved)

    def step(self, members: StepMembers) -> StepReference:
        return self._reference.bind(members) or StepReference((), {})
