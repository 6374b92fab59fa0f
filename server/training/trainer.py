"""What a caller passes to ``TrainingService``, and what it returns. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
