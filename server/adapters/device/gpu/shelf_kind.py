"""What a kind of operator brings for its shelves on the gpu path."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

import torch

from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators

S = TypeVar("S")
# What has a shelf of its own in a projection: a slice, a rank, shapes.
K = TypeVar("K", bound=Hashable)


class GpuShelfKind(ABC, Generic[S, K]):
    """Makes the shelves of one kind of operator; see ``ShelfKind``.

    Attributes:
        name: Of the operator.
    """

    name: str
    least_slots = 4

    def __init__(self, layout: ProjectionLayout, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self.dtype, self.device = dtype, device

    def projections(self) -> Iterable[str]:
        """Those that may have such a shelf."""
        return self.layout.projections

    @abstractmethod
    def keys(self, operators: AdapterOperators, projection: str) -> set[K]:
        """What an adapter needs shelves of in a projection."""

    @abstractmethod
    def make(self, projection: str, key: K) -> S:
        """An empty shelf."""

    def shelves_of(self, operators: AdapterOperators) -> Iterable[tuple[Hashable, Callable[[], S]]]:
        for projection in self.projections():
            for key in sorted(self.keys(operators, projection), key=repr):
                yield (
                    (self.name, projection, key),
                    functools.partial(self.make, projection, key),
                )

    @staticmethod
    def extra_bytes(ops: ModuleOperators) -> int:
        """The tensors lie on the device as they are."""
        return 0
