"""Tables by slot that kernels find through an adapter's slot in the pack.

Where a kernel goes by the segment table, whose components are adapters of the pack, a shelf of its
own has a map from their slots to its own: a shelf is as large as the adapters on it are many.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from turret.server.adapters.device.gpu.pack import GpuPack
from turret.server.adapters.device.hadamard_shelf import grown
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.part import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators

# Shapes of a module's tensors, and whether it has a gain.
_Form = tuple[tuple[tuple[int, ...], ...], bool]
# The tensors of a module that go on a shelf, or None.
TensorsOf = Callable[[ModuleOperators], tuple[torch.Tensor, ...] | None]


class PlacedShelf:
    """Tensors of one module kind and form.

    Attributes:
        has_gain: Whether the modules have gains.
        tables: ``[layers, slots, …]``.
        places: By slot of the pack, the slot here or -1; int32.
        slots: By adapter key.
        layers: Those in which some adapter has these tensors.
    """

    def __init__(
        self, num_layers: int, form: _Form, dtype: torch.dtype, device: torch.device
    ) -> None:
        shapes, self.has_gain = form
        self.layers: set[int] = set()
        self.slots: dict[str, int] = {}
        like = {"dtype": dtype, "device": device}
        self.tables = [torch.zeros(num_layers, 0, *shape, **like) for shape in shapes]
        self.places = torch.full((0,), -1, dtype=torch.int32, device=device)

    def clear(self, places: Sequence[int], num_places: int) -> None:
        """Nobody in these slots of the pack, which has so many, is on the shelf."""
        if num_places > len(self.places):
            more = self.places.new_full((num_places - len(self.places),), -1)
            self.places = torch.cat((self.places, more))
        for place in places:
            self.places[place].fill_(-1)

    def put(self, key: str, place: int, found: Mapping[int, tuple[torch.Tensor, ...]]) -> None:
        """Take in an adapter's tensors, by layer; ``place`` is its slot in the pack."""
        slot = next(i for i in range(len(self.slots) + 1) if i not in self.slots.values())
        held = self.tables[0].shape[1]
        if slot >= held:
            self.tables = [grown(table, max(4, 2 * held)) for table in self.tables]
        # Whoever had the slot before is gone.
        self.places.masked_fill_(self.places == slot, -1)
        for table in self.tables:
            table[:, slot] = 0
        for layer, tensors in found.items():
            self.layers.add(layer)
            for table, tensor in zip(self.tables, tensors, strict=True):
                table[layer, slot] = tensor
        # A number in the launch: nothing is uploaded.
        self.places[place].fill_(slot)
        self.slots[key] = slot

    def addresses(self) -> list[object]:
        """Where its tables are, and how large."""
        return [(t.data_ptr(), t.shape) for t in (*self.tables, self.places)]


@dataclass(frozen=True, slots=True)
class StepPlaced:
    """The shelves that a step uses.

    Attributes:
        shelves: By (projection, slice), with the most members of a mix that are on the shelf.
        signature: Names them: the launches of a step.
    """

    shelves: Mapping[tuple[str, int], Sequence[tuple[PlacedShelf, int]]]
    signature: Hashable

    def of(self, layer: int, projection: str, s: int) -> list[tuple[PlacedShelf, int]]:
        """Those of one module."""
        found = self.shelves.get((projection, s), ())
        return [(shelf, count) for shelf, count in found if layer in shelf.layers]

    def changes(self, projection: str, *, has_gain: bool | None = None) -> bool:
        """Whether a projection has shelves: any, or such whose modules have gains or have none."""
        return any(
            has_gain in (None, shelf.has_gain)
            for (name, _), shelves in self.shelves.items()
            if name == projection
            for shelf, _ in shelves
        )

    def without_gain(self, key: str) -> set[str]:
        """Projections in which an adapter has tensors and no gain."""
        return {
            name
            for (name, _), shelves in self.shelves.items()
            if any(key in shelf.slots and not shelf.has_gain for shelf, _ in shelves)
        }


class PlacedShelves(Part):
    """All shelves of one operator; made when an adapter needs them.

    Args:
        layout: Shape of the base.
        pack: Knows every adapter's slot; an adapter enters it first.
        tensors_of: Which tensors of a module go on a shelf.
        dtype: Serving dtype.
        device: Where the tables are.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        pack: GpuPack,
        tensors_of: TensorsOf,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._layout = layout
        self._pack = pack
        self._tensors_of = tensors_of
        self._like = (dtype, device)
        self._shelves: dict[tuple[str, int, _Form], PlacedShelf] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        found: dict[tuple[str, int, _Form], dict[int, tuple[torch.Tensor, ...]]] = {}
        for name in self._layout.projections:
            for layer, s, ops in self._layout.of(operators, name):
                tensors = self._tensors_of(ops)
                if tensors is not None:
                    form = tuple(tuple(t.shape) for t in tensors), ops.gain is not None
                    found.setdefault((name, s, form), {})[layer] = tensors
        for shape in found:
            if shape not in self._shelves:
                self._shelves[shape] = PlacedShelf(self._layout.num_layers, shape[2], *self._like)
        for shape, shelf in self._shelves.items():
            # The adapter's slots of the pack may be those of one that is gone.
            shelf.clear(self._pack.slots(key), self._pack.num_slots)
            if shape in found:
                shelf.put(key, self._pack.places[key].slot, found[shape])

    def remove(self, key: str) -> None:
        for shelf in self._shelves.values():
            shelf.slots.pop(key, None)

    def bind(self, mixes: Sequence[Members]) -> StepPlaced:
        """The shelves that the mixes of a step use."""
        shelves: dict[tuple[str, int], list[tuple[PlacedShelf, int]]] = {}
        signature = []
        for shape, shelf in sorted(self._shelves.items()):
            counts = (sum(key in shelf.slots for key, _ in mix) for mix in mixes)
            count = max(counts, default=0)
            if count:
                shelves.setdefault(shape[:2], []).append((shelf, count))
                known = tuple(sorted(shelf.layers)), tuple(shelf.addresses())
                signature.append((shape, count, known))
        return StepPlaced(shelves, tuple(signature))
