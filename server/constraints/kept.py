"""The constraints that were compiled lately, of all vocabularies together."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turret.server.constraints.constraint import Constraint

MAX_CACHED = 64
MAX_CACHED_BYTES = 64 << 20


class KeptConstraints:
    """Keeps compiled constraints, those asked for last, within one budget. One event loop's.

    Attributes:
        num_bytes: About what they take.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._kept: OrderedDict[tuple[int, bytes], Constraint] = OrderedDict()
        self._owners = itertools.count()

    def __len__(self) -> int:
        return len(self._kept)

    def new_owner(self) -> int:
        """A number for one more vocabulary: each has forms of its own."""
        return next(self._owners)

    def find(self, owner: int, digest: bytes) -> Constraint | None:
        """A compiled form; it counts as asked for."""
        found = self._kept.get((owner, digest))
        if found is not None:
            self._kept.move_to_end((owner, digest))
        return found

    def keep(self, owner: int, digest: bytes, constraint: Constraint) -> None:
        """Keep one that is not there, in place of those that nobody asked for the longest."""
        self._kept[owner, digest] = constraint
        self.num_bytes += constraint.num_bytes
        while len(self._kept) > MAX_CACHED or self.num_bytes > MAX_CACHED_BYTES:
            self._drop(next(iter(self._kept)))

    def forget(self, owner: int) -> None:
        """Drop all of one vocabulary."""
        for key in [key for key in self._kept if key[0] == owner]:
            self._drop(key)

    def _drop(self, key: tuple[int, bytes]) -> None:
        self.num_bytes -= self._kept.pop(key).num_bytes
