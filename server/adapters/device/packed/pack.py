"""The packed matrices of all fused projections, and which adapter lies where in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from turret.kernels.adapters.segmented_expand import rank_window
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.packed.placement import Place, Placement
from turret.server.adapters.device.packed.projection import PackedProjection
from turret.server.adapters.device.part import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators

P = TypeVar("P", bound=PackedProjection)


@dataclass(frozen=True, slots=True)
class PackedKinds:
    """Which packed operators some adapters have, in any layer.

    Attributes:
        low_rank: (Projection, slice) with a low-rank update.
        gains: Projections with a gain.
        input_gains: Projections with an input gain.
        biases: Projections with a bias.
    """

    low_rank: frozenset[tuple[str, int]]
    gains: frozenset[str]
    input_gains: frozenset[str]
    biases: frozenset[str]

    @classmethod
    def of(cls, layout: ProjectionLayout, operators: AdapterOperators) -> PackedKinds:
        found = [
            (name, s, ops)
            for name in layout.projections
            for _, s, ops in layout.of(operators, name)
        ]
        return cls(
            frozenset((name, s) for name, s, ops in found if ops.low_rank is not None),
            frozenset(name for name, _, ops in found if ops.gain is not None),
            frozenset(name for name, _, ops in found if ops.input_gain is not None),
            frozenset(name for name, _, ops in found if ops.bias is not None),
        )

    @classmethod
    def union(cls, kinds: Iterable[PackedKinds]) -> PackedKinds:
        all_of = list(kinds)
        return cls(
            frozenset().union(*(k.low_rank for k in all_of)),
            frozenset().union(*(k.gains for k in all_of)),
            frozenset().union(*(k.input_gains for k in all_of)),
            frozenset().union(*(k.biases for k in all_of)),
        )


class Pack(Part, Generic[P]):
    """Low-rank updates side by side in wide matrices; gains and biases in tables.

    An adapter owns the same rank range in every module, as wide as its own largest rank.

    Args:
        layout: Shape of the base.
        projections: The matrices, by name, as their constructor made them.

        window: See ``Placement``; None for that of the libraries' products.

    Attributes:
        projections: See above.
    """

    def __init__(
        self, layout: ProjectionLayout, projections: Mapping[str, P], window: int | None = None
    ) -> None:
        self.projections = projections
        self._layout = layout
        (dtype,) = {projection.dtype for projection in projections.values()}
        self._placement = Placement(rank_window(dtype) if window is None else window)
        self._kinds: dict[str, PackedKinds] = {}
        # Bytes that one rank takes over all modules.
        self._rank_bytes = dtype.itemsize * sum(
            layout.num_layers * (len(slices) * slices[0].in_features + layout.width(name))
            for name, slices in layout.projections.items()
        )

    @property
    def places(self) -> Mapping[str, Place]:
        """Where each adapter lies, by key."""
        return self._placement.places

    @property
    def num_slots(self) -> int:
        """Slots of the tables."""
        return self._placement.num_slots

    def kinds(self, keys: Iterable[str]) -> PackedKinds:
        """Which operators these adapters have between them."""
        return PackedKinds.union(self._kinds[key] for key in keys)

    def has_room(self, operators: AdapterOperators) -> bool:
        """Whether its ranks are free.

        Idle adapters give way before the pack grows: every step reads the span of ranks that its
        adapters lie in, so a dense pack is a fast one.
        """
        return self._placement.has_room(Placement.width_of(operators.rank))

    def extra_bytes(self, operators: AdapterOperators) -> int:
        """Bytes of ranks that modules do not use: an adapter's ranks are as many in every one."""
        width = Placement.width_of(operators.rank)
        return width * self._rank_bytes - operators.num_low_rank_bytes

    def insert(self, key: str, operators: AdapterOperators) -> None:
        place = self._place(key, Placement.width_of(operators.rank))
        self._kinds[key] = PackedKinds.of(self._layout, operators)
        for projection in self.projections.values():
            projection.put_low_rank(operators, place.rank_start, place.rank_end)
            projection.put_tables(operators, place.slot, self._placement.num_slots)

    def _place(self, key: str, width: int) -> Place:
        """A place of so many ranks."""
        if not self._placement.has_room(width):
            self._make_room(width)
        return self._placement.put(key, width)

    def _make_room(self, width: int) -> None:
        moves = self._placement.grow(width)
        for projection in self.projections.values():
            projection.grow(self._placement.capacity, moves)

    def remove(self, key: str) -> None:
        self._placement.remove(key)
        self._kinds.pop(key, None)
