"""The interface of training: adapters in training, their passes, steps and snapshots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    # The protocols import this module before torch is loaded.
    import torch


# The backward pass of attention needs memory for the square of a sequence's length.
MAX_SEQUENCE_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Datum:
    """One sequence with the inputs of its loss.

    Attributes:
        tokens: The token ids that the model reads.
        inputs: Tensors of the loss by name, one number per token: ``target_tokens`` int64, and
            those of ``weights``, ``logprobs``, ``advantages`` that the loss needs, fp32.
    """

    tokens: Sequence[int]
    inputs: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class DatumLoss:
    """The result of one sequence, one number per token.

    Attributes:
        logprobs: The log probability of each target, fp32, bit-identical to that of sampling.
        losses: The loss of each token, fp32.
    """

    logprobs: torch.Tensor
    losses: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamParams:
    """One step of AdamW (arXiv 1711.05101); ``grad_clip_norm`` 0 disables clipping."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


# Outside these ranges, float32 overflows or divides by zero.
ADAM_RANGES: Mapping[str, tuple[float, float]] = {
    "learning_rate": (0.0, 1e4),
    "beta1": (0.0, 0.999999),
    "beta2": (0.0, 0.999999),
    "eps": (1e-30, 1e4),
    "weight_decay": (0.0, 1e4),
    "grad_clip_norm": (0.0, math.inf),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """A new adapter in training.

    Attributes:
        method: ``lora``, ``dora``, …
        rank: The rank.
        seed: Determines the initial tensors; None for a random seed.
        alpha: The numerator of the scaling; None for 32.
        targets: The last parts of the paths of the trained modules; empty if the next three
            attributes choose them.
        attention: Whether the projections of attention are trained.
        mlp: Whether the projections of MLPs are trained.
        unembed: Whether the head is trained.
    """

    method: str = "lora"
    rank: int
    seed: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    attention: bool = True
    mlp: bool = True
    unembed: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """A generation that was registered for sampling, and the size of its files in bytes."""

    generation: int
    size: int


class AdapterTraining(Protocol):
    """Adapters in training, by an id that is never used twice.

    Calls for the same adapter must not overlap. Calls for different adapters run together.
    """

    async def create(self, config: LearnerConfig, owner: str = "") -> int:
        """Create an adapter, and return its id.

        Args:
            config: Its config.
            owner: The client, which may have half of the memory; empty if all callers count as one
                client.

        Raises:
            InvalidRequestError: The config is not supported.
            BudgetExceededError: There is no memory for it.
        """
        ...

    async def drop(self, adapter_id: int) -> None:
        """Forget an adapter, and end its pass. Unknown ones are ignored."""
        ...

    async def pass_over(
        self,
        adapter_id: int,
        data: Sequence[Datum],
        loss: str,
        config: Mapping[str, float],
        *,
        is_forward_only: bool = False,
    ) -> list[DatumLoss]:
        """Compute the losses, and add their gradients to those since the last step.

        Args:
            adapter_id: The id of the adapter.
            data: Sequences of at most ``MAX_SEQUENCE_TOKENS``, whose tokens are in the vocabulary
                and whose inputs are finite. A long list is divided into passes.
            loss: A name in ``LOSSES``.
            config: Settings of the loss. Missing ones have their defaults.
            is_forward_only: Whether to compute no gradients.

        Raises:
            UnavailableError: The adapter was dropped meanwhile, or the server is shutting down.
        """
        ...

    async def step(self, adapter_id: int, adam: AdamParams) -> dict[str, float]:
        """Apply an optimizer step, after which the gradients are zero; returns metrics."""
        ...

    async def save(self, adapter_id: int, folder: Path, *, with_optimizer: bool) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``, and the optimizer."""
        ...

    async def load(self, adapter_id: int, folder: Path, *, with_optimizer: bool) -> None:
        """Continue from the files of ``save``. The config must be the same."""
        ...

    async def publish(self, adapter_id: int, name: str) -> Published:
        """Register the current tensors as a generation of an adapter name, for sampling."""
        ...

    async def serve(self, folder: Path, name: str) -> Published:
        """Register the files of ``save`` under an adapter's name, for sampling.

        Raises:
            AdapterCheckpointError: The files are not those of an adapter.
        """
        ...

    async def withdraw(self, name: str) -> None:
        """Unregister a name of ``publish`` or ``serve``, and end the requests that use it.

        Unknown names are ignored.
        """
        ...
