"""Input blocks on the gpu path: tables by slot, and which adapters have them.

Changes of inputs without a gain add up before the base multiplies them, once for each slice. A
member with a gain has a product of its own, under its gain.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from turret.kernels.gpu.adapters.input_blocks import gained_add, input_blocks
from turret.kernels.gpu.tables.segment_table import SegmentTable
from turret.server.adapters.device.gpu.pack import GpuPack
from turret.server.adapters.device.hadamard_shelf import grown
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.part import Part
from turret.server.adapters.device.store import BaseProduct
from turret.server.adapters.operators import AdapterOperators, ModuleOperators

# Projection, slice, number and size of the blocks, whether the module has a gain.
_Shape = tuple[str, int, int, int, bool]


class InputShelf:
    """Blocks of one module kind and shape.

    Attributes:
        blocks: ``[layers, slots, count, size, size]``.
        places: By slot of the pack, the slot here or -1; int32.
        slots: By adapter key.
        layers: Those in which some adapter has blocks.
    """

    def __init__(
        self, layout: ProjectionLayout, shape: _Shape, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape
        self.layers: set[int] = set()
        self.slots: dict[str, int] = {}
        _, _, count, size, _ = shape
        self.blocks = torch.zeros(
            layout.num_layers, 0, count, size, size, dtype=dtype, device=device
        )
        self.places = torch.full((0,), -1, dtype=torch.int32, device=device)

    def put(
        self, key: str, place: int, num_places: int, found: Mapping[int, ModuleOperators]
    ) -> None:
        """Take in an adapter's blocks, by layer; ``place`` is its slot in the pack."""
        slot = next(i for i in range(len(self.slots) + 1) if i not in self.slots.values())
        if slot >= self.blocks.shape[1]:
            self.blocks = grown(self.blocks, max(4, 2 * self.blocks.shape[1]))
        if num_places > len(self.places):
            more = self.places.new_full((num_places - len(self.places),), -1)
            self.places = torch.cat((self.places, more))
        # Whoever had the place in the pack before is gone.
        self.places.masked_fill_(self.places == slot, -1)
        self.blocks[:, slot] = 0
        for layer, ops in found.items():
            assert ops.input_blocks is not None
            self.layers.add(layer)
            self.blocks[layer, slot] = ops.input_blocks.blocks
        self.places[place] = slot
        self.slots[key] = slot

    def addresses(self) -> list[object]:
        """Where its tables are, and how large."""
        return [(t.data_ptr(), t.shape) for t in (self.blocks, self.places)]


@dataclass(frozen=True, slots=True)
class GpuStepInputs:
    """The shelves that a step uses.

    Attributes:
        shelves: By (projection, slice), with the most members of a mix that are on the shelf.
        signature: Names them: the launches of a step.
    """

    shelves: Mapping[tuple[str, int], Sequence[tuple[InputShelf, int]]]
    signature: Hashable

    def changes(self, projection: str) -> bool:
        return any(name == projection for name, _ in self.shelves)

    def add_changes(
        self,
        layer: int,
        projection: str,
        s: int,
        x: torch.Tensor,
        u: torch.Tensor | None,
        table: SegmentTable,
    ) -> torch.Tensor | None:
        """What changes the input of a slice without a gain, added to ``u``.

        Args:
            layer: Layer number.
            projection: Fused projection.
            s: Slice.
            x: Its input, ``[rows, in]``.
            u: Changes that are known, or None.
            table: The step's segments.

        Returns:
            ``[rows, in]``, or None if nothing does.
        """
        for shelf, _ in self.shelves.get((projection, s), ()):
            if layer in shelf.layers and not shelf.shape[-1]:
                u = torch.zeros_like(x) if u is None else u
                input_blocks(x, u, shelf.blocks[layer], shelf.places, table)
        return u

    def add_gained(
        self,
        layer: int,
        projection: str,
        s: int,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        gain_delta: torch.Tensor | None,
        base: BaseProduct,
        table: SegmentTable,
    ) -> None:
        """Add the changes of members that have gains to the slice's ``y``, in place."""
        for shelf, count in self.shelves.get((projection, s), ()):
            if layer in shelf.layers and shelf.shape[-1]:
                assert gain_delta is not None
                for nth in range(count):
                    u = torch.zeros_like(x)
                    input_blocks(x, u, shelf.blocks[layer], shelf.places, table, nth)
                    gained_add(y, base.part(s)(u), gain_delta, shelf.places, table, nth)


class GpuInputShelves(Part):
    """All shelves of input blocks; made when an adapter needs them.

    Args:
        layout: Shape of the base.
        pack: Knows every adapter's slot; an adapter enters it first.
        dtype: Serving dtype.
        device: Where the tables are.
    """

    def __init__(
        self, layout: ProjectionLayout, pack: GpuPack, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layout = layout
        self._pack = pack
        self._dtype, self._device = dtype, device
        self._shelves: dict[_Shape, InputShelf] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        found: dict[_Shape, dict[int, ModuleOperators]] = {}
        for name in self._layout.projections:
            for layer, s, ops in self._layout.of(operators, name):
                if ops.input_blocks is not None:
                    count, size, _ = ops.input_blocks.blocks.shape
                    shape = (name, s, count, size, ops.gain is not None)
                    found.setdefault(shape, {})[layer] = ops
        for shape, modules in found.items():
            if shape not in self._shelves:
                like = (self._dtype, self._device)
                self._shelves[shape] = InputShelf(self._layout, shape, *like)
            place = self._pack.places[key].slot
            self._shelves[shape].put(key, place, self._pack.num_slots, modules)
        self._forget_place(key, found)

    def _forget_place(self, key: str, found: Mapping[_Shape, object]) -> None:
        """On the other shelves the adapter's slot of the pack may be that of one that is gone."""
        place = self._pack.places[key].slot
        for shape, shelf in self._shelves.items():
            if shape not in found and place < len(shelf.places):
                shelf.places[place] = -1

    def remove(self, key: str) -> None:
        for shelf in self._shelves.values():
            shelf.slots.pop(key, None)

    def bind(self, mixes: Sequence[Members]) -> GpuStepInputs:
        """The shelves that the mixes of a step use."""
        shelves: dict[tuple[str, int], list[tuple[InputShelf, int]]] = {}
        for shape, shelf in sorted(self._shelves.items()):
            counts = (sum(key in shelf.slots for key, _ in mix) for mix in mixes)
            count = max(counts, default=0)
            if count:
                shelves.setdefault(shape[:2], []).append((shelf, count if shape[-1] else 1))
        used = [pair for found in shelves.values() for pair in found]
        return GpuStepInputs(
            shelves,
            tuple(
                (shelf.shape, count, tuple(sorted(shelf.layers)), tuple(shelf.addresses()))
                for shelf, count in used
            ),
        )
