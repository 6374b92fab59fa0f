"""The adapters of the running steps: the base class of stores, and code that all paths share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from turret.kernels.cpu.row_adapters import Ahead
from turret.kernels.expert_routing import Routing
from turret.kernels.fusion_gate import MAX_COMPONENTS
from turret.server.adapters.device.vocabulary import VocabularyChange, vocabulary_change
from turret.server.adapters.operators import Operator
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.circulant import Circulant
from turret.server.adapters.operators.dense import Dense
from turret.server.adapters.operators.gate import Gate, QueryScore
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.input_blocks import InputBlocks
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import ExpertLowRank, LowRank
from turret.server.adapters.operators.pair_rotation import PairRotation
from turret.server.adapters.operators.sparse import Sparse
from turret.server.adapters.operators.token_router import TokenRouter
from turret.server.adapters.operators.vectors import Bias, Gain, InputGain
from turret.server.errors import BudgetExceededError
from turret.server.words import say

if TYPE_CHECKING:
    from turret.kernels.gpu.low_rank import Shrink
    from turret.kernels.gpu.nf4 import Epilogue


# The kernels that replace an operator's ``add``.
#
# Add a kernel only if a measurement justifies it. ``bench/results/history.md`` has the measurements
# of the CPU path, except for pairs and dense updates, which have not been measured separately. On
# the GPU path nothing has been measured, so there are kernels for the operators that most
# checkpoints consist of. All other operators use ``add``, for the rows of one mix at a time
# (``reference.py``). On the GPU path, a step that needs ``add`` is not captured.


class Kernel(NamedTuple):
    """A path's kernel for one kind of operator.

    Attributes:
        files: The kernel's file below ``kernels/cpu/c``, or its module below ``kernels/gpu``.
        serves: Returns whether the kernel supports an operator of its kind.
    """

    files: str
    serves: Callable[[Any], bool] = lambda operator: True


KERNELS: Mapping[type[Operator], Mapping[str, Kernel]] = {
    LowRank: {
        "cpu": Kernel("adapters/low_rank.c"),
        "gpu": Kernel("low_rank"),
    },
    ExpertLowRank: {
        "cpu": Kernel("adapters/experts.c"),
        "gpu": Kernel("experts"),
    },
    Gain: {
        "cpu": Kernel("adapters/adapters.c"),
        "gpu": Kernel("low_rank"),
    },
    Bias: {
        "cpu": Kernel("adapters/adapters.c"),
        "gpu": Kernel("low_rank"),
    },
    Hadamard: {
        "cpu": Kernel("adapters/hadamard.c"),
        "gpu": Kernel("hadamard", lambda update: update.rank <= 64),
    },
    Kronecker: {
        "cpu": Kernel("adapters/kronecker.c"),
        "gpu": Kernel("kronecker", lambda update: max(update.w1.shape[1], update.rank) <= 128),
    },
    InputGain: {"cpu": Kernel("adapters/input_change.c")},
    InputBlocks: {"cpu": Kernel("adapters/input_change.c")},
    PairRotation: {"cpu": Kernel("adapters/pairs.c")},
    Circulant: {"cpu": Kernel("adapters/circulant.c")},
    Sparse: {"cpu": Kernel("adapters/sparse.c")},
    Dense: {"cpu": Kernel("adapters/dense.c")},
    Gate: {
        "gpu": Kernel(
            "fusion_gate",
            lambda gate: (
                isinstance(gate.score, QueryScore) and len(gate.rank_indptr) - 1 <= MAX_COMPONENTS
            ),
        )
    },
}


def has_kernel(operator: Operator, path: str) -> bool:
    """Whether a path's kernels apply an operator; if not, its ``add`` does."""
    kernel = KERNELS.get(type(operator), {}).get(path)
    return kernel is not None and kernel.serves(operator)


# The base's fused projections, as stores of adapters see them.


@dataclass(frozen=True, slots=True)
class SliceShape:
    """One module of a fused projection: its path inside the layer and its sizes."""

    path: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """A fused projection of all experts: its path inside the layer and the sizes of each expert."""

    path: str
    count: int
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class ProjectionLayout:
    """Shape of the base for stores: the slices of each fused projection, in every layer.

    ``experts`` are the fused projections of mixtures of experts. A layer may lack some projections
    of either kind.
    """

    num_layers: int
    projections: Mapping[str, tuple[SliceShape, ...]]
    experts: Mapping[str, ExpertShape] = field(default_factory=dict)
    layer_prefix: str = "model.layers"
    _columns: Mapping[str, tuple[slice, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        columns = {}
        for name, slices in self.projections.items():
            ends = accumulate((shape.out_features for shape in slices), initial=0)
            columns[name] = tuple(slice(*pair) for pair in pairwise(ends))
        object.__setattr__(self, "_columns", columns)

    def module(self, layer: int, path: str) -> str:
        return f"{self.layer_prefix}.{layer}.{path}"

    def columns(self, projection: str) -> tuple[slice, ...]:
        """The columns of each slice in the projection's result."""
        return self._columns[projection]

    def width(self, projection: str) -> int:
        """Number of columns of the projection's result."""
        return self._columns[projection][-1].stop

    def of(
        self, operators: AdapterOperators, projection: str
    ) -> list[tuple[int, int, ModuleOperators]]:
        """An adapter's operators in one projection, as (layer, slice, operators)."""
        found = []
        for layer in range(self.num_layers):
            for s, shape in enumerate(self.projections[projection]):
                ops = operators.modules.get(self.module(layer, shape.path))
                if ops is not None:
                    found.append((layer, s, ops))
        return found

    def of_experts(
        self, operators: AdapterOperators, projection: str
    ) -> list[tuple[int, ExpertLowRank]]:
        """An adapter's updates of one projection of the experts, as (layer, update)."""
        path = self.experts[projection].path
        experts = operators.experts or {}
        names = ((layer, self.module(layer, path)) for layer in range(self.num_layers))
        return [(layer, experts[name]) for layer, name in names if name in experts]


# The adapters that each row of a step uses.


# The mix of a row or segment as (adapter key, weight) pairs, in the request's order.
Members = Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class StepMembers:
    """The adapters that the rows of a step use.

    Attributes:
        short: The mix of each row of the short segments, which are the step's first rows.
        long: First row, end row and mix of each long segment.
        scalings: For adapters with a ``TokenRouter``, the scalings of every row of the step,
            ``[rows, modules, components]`` fp32, with any values in rows without the adapter.
    """

    short: Sequence[Members]
    long: Sequence[tuple[int, int, Members]]
    scalings: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def runs(self) -> list[tuple[int, int, Members]]:
        """All rows as runs: first row, end, and mix."""
        return [*((row, row + 1, mix) for row, mix in enumerate(self.short)), *self.long]


class Part(ABC):
    """The operators of certain kinds, for every adapter in a store, by adapter key."""

    @abstractmethod
    def insert(self, key: str, operators: AdapterOperators) -> None:
        """Stores an adapter's operators of this part's kinds, if it has any."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Forget an adapter; an unknown key is ignored."""

    def extra_bytes(self, operators: AdapterOperators) -> int:
        """Bytes that an adapter takes here in addition to its operators' bytes in host memory."""
        return 0


class AdapterMemoryError(Exception):
    """The device had no memory for the adapter with this ``key``; nothing was computed."""

    def __init__(self, key: str) -> None:
        super().__init__(f"no memory for adapter {key}")
        self.key = key


# A function that is called with every adapter that enters or leaves a store.
OnMoved = Callable[[Any], None]


class Resident(Protocol):
    """The attributes of an adapter in host memory that a store uses."""

    bytes_device: int

    @property
    def key(self) -> str: ...
    @property
    def operators(self) -> AdapterOperators | None: ...


class BaseProduct(Protocol):
    """The bias-free base projection, which may prefetch the adapters for it while it computes."""

    def __call__(self, x: torch.Tensor, ahead: Ahead | None = None) -> torch.Tensor: ...

    def part(self, index: int) -> BaseProduct:
        """The product for slice ``index`` alone."""
        ...

    def alone(self, *, is_decode: bool) -> BaseProduct:
        """On the gpu path, the product for rows other than the step's own rows in their order.

        Either all of these rows decode, or none does.
        """
        ...

    def with_shrink(self, x: torch.Tensor, shrink: Shrink) -> tuple[torch.Tensor, torch.Tensor]:
        """On the gpu path, the product, and the result of ``shrink`` on all rows."""
        ...

    def with_epilogue(
        self, x: torch.Tensor, epilogue: Epilogue, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The product with an epilogue, or None if it cannot be computed in the same launches."""
        ...


@dataclass(frozen=True, slots=True)
class ExpertPairs:
    """A projection of experts in one step: its pairs of a row and an expert.

    Attributes:
        layer: Layer number.
        projection: Fused projection of experts (``experts_gate_up``, ``experts_down``).
        x: The projection's input, ``[rows, in]`` or ``[pairs, in]``; not changed.
        y: The results of the pairs, ``[pairs, out]``, contiguous.
        routing: The pairs.
        rows: The row of ``x`` that each pair reads, ``[pairs]`` int64; None if each pair has its
            own.
    """

    layer: int
    projection: str
    x: torch.Tensor
    y: torch.Tensor
    routing: Routing
    rows: torch.Tensor | None


class AdapterStep(Protocol):
    """The adapters of one step, for the layers' projections (see ``AdaptedLinear``)."""

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
            x: The projection's input, ``[rows, in]``; not changed.
            bias: The base's bias, ``[sum(out)]``, or None.
            base: The base projection, without bias.

        Returns:
            ``[rows, sum(out)]``, contiguous.
        """
        ...

    def attend(self, layer: int, q: torch.Tensor, attended: torch.Tensor) -> None:
        """Add the attention to adapters' constant keys, which no sequence contains, in place.

        Args:
            layer: Layer number.
            q: Rotated queries, ``[rows, heads, head_dim]``; not changed.
            attended: The result of attention, ``[rows, heads, head_dim]``, contiguous.
        """
        ...

    def apply_experts(self, pairs: ExpertPairs) -> None:
        """Add the updates of experts to ``pairs.y``, in place."""
        ...


@dataclass(slots=True)
class _Entry:
    """An adapter in a store.

    ``operators`` are the ones in host memory. Those on the device are only in the store's parts.
    """

    adapter: Resident
    operators: AdapterOperators | None
    needs: tuple[int, ...]
    last_step: int


class AdapterStore:
    """Holds the running adapters in the form that the device uses. The engine thread owns it.

    An adapter that no running request uses stays until its place is needed, so that a popular
    adapter is not stored again for each request.

    Args:
        parts: The holders of the operators of the layers' projections.
        device: The device on which operators are applied.
        max_bytes: The budget of the store. The scheduler keeps the adapters that run together
            within it; idle ones are evicted if needed.
        on_moved: Called with every adapter that enters or leaves.

    Attributes:
        budgets: The number of bytes of each kind of memory that adapters may take.
        vocabularies: The changes to the embedding and the head, by adapter key.
        routers: The routers that compute scalings, on the device, by adapter key.
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
        self.vocabularies: dict[str, VocabularyChange] = {}
        self.routers: dict[str, TokenRouter] = {}
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
        """Prepare for an adapter that is being loaded; called on the loading thread.

        Raises:
            BudgetExceededError: The adapter could never be in the store.
        """
        for needed, budget in zip(self.needs(operators), self.budgets, strict=True):
            if needed > budget:
                why = say("OVER_DEVICE_MEMORY", bytes=needed, budget_bytes=budget)
                raise BudgetExceededError(why)

    def is_refused(self, key: str) -> bool:
        """Whether the device recently had no memory for an adapter."""
        return False

    def is_near(self, adapter: Resident) -> bool:
        """Whether a step that uses an adapter can begin without waiting for a copy of it.

        If not, the copy has been started. Called before a request joins the running ones.
        """
        return True

    def prepare(self, adapters: Iterable[Resident]) -> None:
        """Make sure that every adapter of a step is in the store; idle ones may be evicted."""
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
        """Forget an adapter that was unloaded or replaced. An unknown key is ignored."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            entry.adapter.bytes_device = 0
            for part in self._parts:
                part.remove(key)
            self.vocabularies.pop(key, None)
            self.routers.pop(key, None)
            self._on_moved(entry.adapter)

    def drop_idle(self) -> None:
        """Forget every adapter that the last step did not use, because the device is full."""
        while self._drop_idle():
            pass

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
                # On a GPU, copy the router's tensors: they are views of the upload's memory, which
                # is freed.
                moved = (
                    tensor.to(self._device, copy=self._device.type != "cpu")
                    for tensor in operators.router.tensors()
                )
                self.routers[adapter.key] = operators.router.with_tensors(moved)
        except (RuntimeError, MemoryError):
            # Leave no trace of an adapter that could not be stored, because the step may be
            # retried.
            for part in self._parts:
                part.remove(adapter.key)
            raise
        if change is not None:
            self.vocabularies[adapter.key] = change
        self._entries[adapter.key] = _Entry(adapter, adapter.operators, needs, self._step)
        adapter.bytes_device = sum(needs)
        self._on_moved(adapter)

    def _has_room(self, needs: tuple[int, ...]) -> bool:
        taken = zip(*(entry.needs for entry in self._entries.values()), needs, strict=True)
        return all(sum(each) <= most for each, most in zip(taken, self.budgets, strict=True))

    def _drop_idle(self) -> bool:
        """Forget the least recently used adapter, if there is one that this step does not use."""
        idle = [e for e in self._entries.values() if e.last_step < self._step]
        if idle:
            self.drop(min(idle, key=lambda e: e.last_step).adapter.key)
        return bool(idle)


class StepStore(AdapterStore, ABC):
    """A store that needs only a step's members to bind the step.

    On the CPU, the store reads the tensors of adapters in place in host memory.
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
