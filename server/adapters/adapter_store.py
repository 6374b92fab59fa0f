"""What the engine and the model need of whatever holds the running adapters' weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from turret.kernels.cpu.row_adapters import Ahead
from turret.server.adapters.bank import StepMembers
from turret.server.adapters.operators import AdapterOperators
from turret.server.adapters.vocabulary_step import VocabularyChange

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
