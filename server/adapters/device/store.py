"""What holds the running adapters' weights: the base class of all stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from turret.kernels.cpu.row_adapters import Ahead
from turret.kernels.expert_routing import Routing
from turret.server.adapters.device.members import StepMembers
from turret.server.adapters.device.vocabulary import VocabularyChange, vocabulary_change
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.token_router import TokenRouter
from turret.server.errors import BudgetExceededError
from turret.server.words import say

if TYPE_CHECKING:
    from turret.kernels.gpu.low_rank import Shrink
    from turret.kernels.gpu.nf4 import Epilogue


class Part(ABC):
    """Some operators of every adapter in a store, by adapter key."""

    @abstractmethod
    def insert(self, key: str, operators: AdapterOperators) -> None:
        """Takes in an adapter's operators of this part's kinds, if it has any."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Forget an adapter; unknown ones are ignored."""

    def extra_bytes(self, operators: AdapterOperators) -> int:
        """Bytes an adapter takes here past those that its operators take in host memory."""
        return 0


class AdapterMemoryError(Exception):
    """The device had no memory for an adapter. Its ``key`` names it; nothing was computed."""

    def __init__(self, key: str) -> None:
        super().__init__(f"no memory for adapter {key}")
        self.key = key


# Called with every adapter that enters or leaves a store.
OnMoved = Callable[[Any], None]


class Resident(Protocol):
    """The attributes of an adapter in host memory that a store uses."""

    bytes_device: int

    @property
    def key(self) -> str: ...
    @property
    def operators(self) -> AdapterOperators | None: ...


class BaseProduct(Protocol):
    """The bias-free base projection; while it computes it may bring in the adapters that follow."""

    def __call__(self, x: torch.Tensor, ahead: Ahead | None = None) -> torch.Tensor: ...

    def part(self, index: int) -> BaseProduct:
        """Slice ``index`` alone."""
        ...

    def alone(self, *, is_decode: bool) -> BaseProduct:
        """The product of other rows than the step's, on the gpu path: all decode, or none does."""
        ...

    def with_shrink(self, x: torch.Tensor, shrink: Shrink) -> tuple[torch.Tensor, torch.Tensor]:
        """The product and what ``shrink`` makes of all rows, on the gpu path."""
        ...

    def ended(
        self, x: torch.Tensor, epilogue: Epilogue, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The product with an epilogue, or None if it cannot be computed in the same launches."""
        ...


class AdapterStep(Protocol):
    """The adapters of one step, as the layers' projections apply them (see ``AdaptedLinear``)."""

    def project(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        base: BaseProduct,
    ) -> torch.Tensor:
        """The adapted projection ``G ⊙ (W x) + b + Σ_k w_k Δ_k(x)``.

        Args:
            layer: Layer number.
            projection: Fused projection (``qkv``, ``o``, ``gate_up``, ``down``).
            x: Its input, ``[rows, in]``; not changed.
            bias: The base's, ``[sum(out)]``, or None.
            base: The base projection, without bias.

        Returns:
            ``[rows, sum(out)]``, contiguous.
        """
        ...

    def attend(self, layer: int, q: torch.Tensor, attended: torch.Tensor) -> None:
        """Add what rows attend to beside their sequences, in place.

        Args:
            layer: Layer number.
            q: Rotated queries, ``[rows, heads, head_dim]``; not changed.
            attended: The result of attention, ``[rows, heads, head_dim]``, contiguous.
        """
        ...

    def apply_experts(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        y: torch.Tensor,
        routing: Routing,
        rows: torch.Tensor | None,
    ) -> None:
        """Add the updates of experts to ``y``, in place.

        Args:
            layer: Layer number.
            projection: Fused projection of experts (``experts_gate_up``, ``experts_down``).
            x: Its input, ``[rows, in]`` or ``[pairs, in]``; not changed.
            y: The results of each pair of row and expert, ``[pairs, out]``, contiguous.
            routing: The pairs.
            rows: The row of ``x`` that each pair reads, ``[pairs]`` int64; None for its own.
        """
        ...


@dataclass(slots=True)
class _Entry:
    """An adapter in a store.

    ``operators`` are those in host memory: what is on the device is held by the parts alone.
    """

    adapter: Resident
    operators: AdapterOperators | None
    needs: tuple[int, ...]
    last_step: int


class AdapterStore:
    """Holds the adapters that run, ready for the device. The engine thread owns it.

    Adapters that left the batch keep their place until it is needed, so a popular adapter is stored
    once.

    Args:
        parts: Hold the operators of the layers' projections.
        device: Where they are applied.
        max_bytes: Budget of what is in the store. The scheduler keeps what runs together within
            it; idle adapters give way.
        on_moved: Called with every adapter that enters or leaves.

    Attributes:
        budgets: Bytes of each kind of memory that adapters take.
    """

    def __init__(
        self, parts: Sequence[Part], device: torch.device, max_bytes: int, on_moved: OnMoved
    ) -> None:
        self.max_bytes = max_bytes
        self.budgets: tuple[int, ...] = (max_bytes,)
        self._parts = parts
        self._device = device
        self._on_moved = on_moved
        self._entries: dict[str, _Entry] = {}
        self._vocabularies: dict[str, VocabularyChange] = {}
        self._routers: dict[str, TokenRouter] = {}
        self._step = 0

    @property
    def adapter_bytes(self) -> int:
        """Total bytes of the adapters in the store."""
        return sum(entry.adapter.bytes_device for entry in self._entries.values())

    def stored_bytes(self, operators: AdapterOperators) -> int:
        """Bytes that an adapter takes in the store."""
        return operators.num_bytes + sum(part.extra_bytes(operators) for part in self._parts)

    def needs(self, operators: AdapterOperators) -> tuple[int, ...]:
        """Bytes that an adapter takes of each kind of memory; see ``budgets``."""
        return (self.stored_bytes(operators),)

    def admit(self, operators: AdapterOperators) -> None:
        """Get ready for an adapter that is being loaded; on the loading thread.

        Raises:
            BudgetExceededError: It could never be in the store.
        """
        for needed, budget in zip(self.needs(operators), self.budgets, strict=True):
            if needed > budget:
                why = say("OVER_DEVICE_MEMORY", bytes=needed, budget_bytes=budget)
                raise BudgetExceededError(why)

    def is_refused(self, key: str) -> bool:
        """Whether the device had no memory for an adapter just now."""
        return False

    def is_near(self, adapter: Resident) -> bool:
        """Whether a step that uses an adapter can begin without waiting for a copy of it.

        If not, the copy has been started. Asked before a request joins others that run.
        """
        return True

    def prepare(self, adapters: Iterable[Resident]) -> None:
        """Make sure every adapter of a step is in it; idle ones may have to leave."""
        self._step += 1
        missing = []
        for adapter in adapters:
            entry = self._entries.get(adapter.key)
            if entry is not None and self._is_current(adapter):
                entry.last_step = self._step
            else:
                missing.append(adapter)
        for adapter in missing:
            self._insert(adapter)

    def drop(self, key: str) -> None:
        """Forget an adapter (unloaded or replaced). Unknown ones are ignored."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            entry.adapter.bytes_device = 0
            for part in self._parts:
                part.remove(key)
            self._vocabularies.pop(key, None)
            self._routers.pop(key, None)
            self._on_moved(entry.adapter)

    def drop_idle(self) -> None:
        """Forget every adapter that the last step did not use: the device is full."""
        while self._drop_idle():
            pass

    def vocabulary(self, key: str) -> VocabularyChange | None:
        """A stored adapter's changes to embedding and head."""
        return self._vocabularies.get(key)

    def router(self, key: str) -> TokenRouter | None:
        """The router that computes a stored adapter's scalings, on the device."""
        return self._routers.get(key)

    def _operators(self, adapter: Resident) -> AdapterOperators:
        """The operators to put into the store."""
        assert adapter.operators is not None, "an adapter is resident while it is in use"
        return adapter.operators

    def _is_current(self, adapter: Resident) -> bool:
        """Whether the stored copy of an adapter can be used as it is."""
        return True

    def _insert(self, adapter: Resident) -> None:
        operators = self._operators(adapter)
        needs = self.needs(operators)
        while not self._has_room(needs) and self._drop_idle():
            pass
        try:
            for part in self._parts:
                part.insert(adapter.key, operators)
            change = vocabulary_change(operators, self._device)
            if operators.router is not None:
                # On a GPU they are views of the upload's memory, which is freed; copy them.
                moved = (
                    tensor.to(self._device, copy=self._device.type != "cpu")
                    for tensor in operators.router.tensors()
                )
                self._routers[adapter.key] = operators.router.with_tensors(moved)
        except (RuntimeError, MemoryError):
            # Leave no trace of an adapter that is not stored: the step may be retried.
            for part in self._parts:
                part.remove(adapter.key)
            raise
        if change is not None:
            self._vocabularies[adapter.key] = change
        self._entries[adapter.key] = _Entry(adapter, adapter.operators, needs, self._step)
        adapter.bytes_device = sum(needs)
        self._on_moved(adapter)

    def _has_room(self, needs: tuple[int, ...]) -> bool:
        taken = zip(*(entry.needs for entry in self._entries.values()), needs, strict=True)
        return all(sum(each) <= most for each, most in zip(taken, self.budgets, strict=True))

    def _drop_idle(self) -> bool:
        """Forget the adapter that was used longest ago and not in this step, if there is one."""
        idle = [e for e in self._entries.values() if e.last_step < self._step]
        if idle:
            self.drop(min(idle, key=lambda e: e.last_step).adapter.key)
        return bool(idle)


class StepStore(AdapterStore, ABC):
    """A store of the CPU's paths: its steps are bound by their members alone.

    Nothing is copied: it reads an adapter's tensors where they lie in host memory.
    """

    @abstractmethod
    def step(self, members: StepMembers) -> AdapterStep:
        """Bind a step's rows to their adapters, all of them prepared."""

    def _is_current(self, adapter: Resident) -> bool:
        """Whether the tensors in the store are still those in host memory."""
        return self._entries[adapter.key].operators is adapter.operators

    def _insert(self, adapter: Resident) -> None:
        self._drop_evicted()
        super()._insert(adapter)

    def _drop_evicted(self) -> None:
        """Drops adapters that left host memory, so that the store does not keep their tensors."""
        gone = [
            key
            for key, entry in self._entries.items()
            if not self._is_current(entry.adapter) and entry.last_step < self._step
        ]
        for key in gone:
            self.drop(key)
