"""What the engine and the model need of whatever holds the running adapters' weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import torch

from turret.kernels.cpu.row_adapters import Ahead
from turret.server.adapters.device.extras import Extras
from turret.server.adapters.device.members import StepMembers
from turret.server.adapters.device.vocabulary import VocabularyChange
from turret.server.adapters.operators import AdapterOperators

# Told of every adapter that entered or left a store.
OnMoved = Callable[[Any], None]


class Resident(Protocol):
    """What a store needs of an adapter in host memory."""

    bytes_device: int

    @property
    def key(self) -> str: ...
    @property
    def operators(self) -> AdapterOperators | None: ...


class BaseProduct(Protocol):
    """The bias-free base projection; while it computes it may bring in the adapters that follow."""

    def __call__(self, x: torch.Tensor, ahead: Ahead | None = None) -> torch.Tensor: ...


class AdapterStep(Protocol):
    """The adapters of one step, as the model's layers apply them."""

    def project(
        self,
        layer: int,
        group: str,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        base: BaseProduct,
    ) -> torch.Tensor:
        """``y = G ⊙ base(x) + b + Σ_k w_k Δ_k(x)`` for every row of the step.

        Args:
            layer: Layer number.
            group: Fused projection (``qkv``, ``o``, ``gate_up``, ``down``).
            x: Its input, ``[rows, in]``; not changed.
            bias: The base's, ``[sum(out)]``, or None.
            base: Multiplies ``[rows, in]`` by the base weight, ``[rows, sum(out)]``.

        Returns:
            ``[rows, sum(out)]``.
        """
        ...


class AdapterStore(Protocol):
    """Holds the adapters that run, ready for the device. The engine thread owns it.

    Attributes:
        max_bytes: Budget of the adapters in it.
    """

    max_bytes: int

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapters that are in it."""
        ...

    def stored_bytes(self, operators: AdapterOperators) -> int:
        """Bytes an adapter takes in it."""
        ...

    def unserved(self, operators: AdapterOperators) -> str | None:
        """Why its kernels do not serve an adapter, or None."""
        ...

    def prepare(self, adapters: Iterable[Resident]) -> None:
        """Make sure every adapter of a step is in it; idle ones may have to leave."""
        ...

    def drop(self, key: str) -> None:
        """Forget an adapter (unloaded or replaced). Unknown ones are ignored."""
        ...

    def vocabulary(self, key: str) -> VocabularyChange | None:
        """What a stored adapter does to embedding and head."""
        ...

    def step(self, members: StepMembers) -> AdapterStep:
        """Bind a step's rows to their adapters, all of them prepared."""
        ...


class Entry(Protocol):
    """An adapter in a store."""

    @property
    def adapter(self) -> Resident: ...

    last_step: int


E = TypeVar("E", bound=Entry)


class StoredAdapters(ABC, Generic[E]):
    """The bookkeeping that all stores share; see ``AdapterStore``.

    Adapters that left the batch keep their place until it is needed, so a popular adapter is stored
    once.

    Args:
        max_bytes: Budget of what is in the store. The scheduler keeps what runs together within
            it; idle adapters give way.
        unstacked: Holds the operators that are no low-rank products.
        on_moved: Told of every adapter that entered or left.
    """

    def __init__(self, max_bytes: int, unstacked: Extras, on_moved: OnMoved) -> None:
        self.max_bytes = max_bytes
        self._unstacked = unstacked
        self._on_moved = on_moved
        self._entries: dict[str, E] = {}
        self._step = 0

    @property
    def adapter_bytes(self) -> int:
        return sum(entry.adapter.bytes_device for entry in self._entries.values())

    @abstractmethod
    def stored_bytes(self, operators: AdapterOperators) -> int: ...

    @abstractmethod
    def _store(self, adapter: Resident, operators: AdapterOperators) -> None:
        """Make the adapter's entry; there is room for it."""

    def _operators(self, adapter: Resident) -> AdapterOperators:
        """What goes into the store."""
        assert adapter.operators is not None, "an adapter is resident while it is in use"
        return adapter.operators

    def unserved(self, operators: AdapterOperators) -> str | None:
        return None

    def prepare(self, adapters: Iterable[Resident]) -> None:
        self._step += 1
        missing = []
        for adapter in adapters:
            entry = self._entries.get(adapter.key)
            if entry is not None and self._is_current(entry):
                entry.last_step = self._step
            else:
                missing.append(adapter)
        for adapter in missing:
            self._insert(adapter)

    def drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            entry.adapter.bytes_device = 0
            self._unstacked.remove(key)
            self._on_moved(entry.adapter)

    def vocabulary(self, key: str) -> VocabularyChange | None:
        return self._unstacked.vocabulary(key)

    def _is_current(self, entry: E) -> bool:
        """Whether an entry can be used as it is."""
        return True

    def _insert(self, adapter: Resident) -> None:
        operators = self._operators(adapter)
        num_bytes = self.stored_bytes(operators)
        while self.adapter_bytes + num_bytes > self.max_bytes and self._drop_idle():
            pass
        self._store(adapter, operators)
        self._unstacked.insert(adapter.key, operators)
        adapter.bytes_device = num_bytes
        self._on_moved(adapter)

    def _drop_idle(self) -> bool:
        """Forget the adapter that was used longest ago and not in this step, if there is one."""
        idle = [e for e in self._entries.values() if e.last_step < self._step]
        if idle:
            self.drop(min(idle, key=lambda e: e.last_step).adapter.key)
        return bool(idle)
