"""Trains adapters on the weights that the server serves.

This file defines the types that callers of ``TrainingService`` pass and receive, the losses, and
the methods that can be trained. Importing it does not load torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from turret.lazy_torch import torch
from turret.server.adapters.lowering import LinearMethod
from turret.server.adapters.methods import METHODS as SERVED
from turret.server.adapters.methods.prompt_kit import SoftTokens

# Longer sequences are rejected, because the memory for the backward pass of attention grows with
# the square of a sequence's length.
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
    """The config of a new adapter in training.

    Attributes:
        method: A name in ``METHODS``, such as ``lora``.
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


# Losses of single tokens, as functions of their log probabilities.
#
# Losses are sums over tokens, not means. ``r = exp(lp − q)`` is the probability ratio, where
# ``lp`` is the log probability and ``q`` the one with which the token was sampled (``logprobs``).
# ``A`` is the advantage.

Inputs: TypeAlias = "Mapping[str, torch.Tensor]"
LossSettings = Mapping[str, float]
TARGETS = "target_tokens"
_SAMPLED = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


class Loss(NamedTuple):
    """A loss.

    Attributes:
        of: Computes the loss of each token from its log probability and inputs, and the settings.
        inputs: The names of the inputs that the loss needs in addition to ``TARGETS``.
        settings: The names of the loss's settings, with their defaults.
    """

    of: Callable[[torch.Tensor, Inputs, LossSettings], torch.Tensor]
    inputs: tuple[str, ...]
    settings: Mapping[str, float]


def _cross_entropy(lp: torch.Tensor, given: Inputs, settings: LossSettings) -> torch.Tensor:
    return -given["weights"] * lp


def _ratio(lp: torch.Tensor, given: Inputs) -> torch.Tensor:
    return (lp - given["logprobs"]).exp()


def _clipped(ratio: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    return ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])


def _importance_sampling(lp: torch.Tensor, given: Inputs, settings: LossSettings) -> torch.Tensor:
    return -_ratio(lp, given) * given["advantages"]


def _ppo(lp: torch.Tensor, given: Inputs, settings: LossSettings) -> torch.Tensor:
    ratio, advantages = _ratio(lp, given), given["advantages"]
    return -torch.minimum(ratio * advantages, _clipped(ratio, settings) * advantages)


def _cispo(lp: torch.Tensor, given: Inputs, settings: LossSettings) -> torch.Tensor:
    return -_clipped(_ratio(lp, given).detach(), settings) * lp * given["advantages"]


def _dro(lp: torch.Tensor, given: Inputs, settings: LossSettings) -> torch.Tensor:
    distance = lp - given["logprobs"]
    return -(lp * given["advantages"] - 0.5 * settings["beta"] * distance * distance)


# PPO: arXiv 1707.06347; CISPO: arXiv 2506.13585; DRO: arXiv 2405.19107.
LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(_cross_entropy, ("weights",), {}),
    "importance_sampling": Loss(_importance_sampling, _SAMPLED, {}),
    "ppo": Loss(_ppo, _SAMPLED, _CLIP),
    "cispo": Loss(_cispo, _SAMPLED, _CLIP),
    "dro": Loss(_dro, _SAMPLED, {"beta": 0.05}),
}


# Trained methods whose files another method reads: the name of that method, and the config keys in
# which they differ from it.
_VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "rslora": ("lora", {"use_rslora": True}),
}


def _trained() -> Iterator[str]:
    for name, method in SERVED.items():
        # Variants of LoRA inherit its ``start``. They do not accept the config that it makes, so
        # they cannot be trained.
        start = method.start if isinstance(method, LinearMethod | SoftTokens) else None
        if start is not None and method.accepts(start.config(1, ())):
            yield name


METHODS = tuple(sorted((*_trained(), *_VARIANTS)))


def served_method(name: str) -> tuple[LinearMethod | SoftTokens, Mapping[str, Any]]:
    """The method that serves the adapters of a trained method.

    Args:
        name: The trained method, one of ``METHODS``.

    Returns:
        The serving method, and the config keys that the trained method adds.
    """
    served, changes = _VARIANTS.get(name, (name, {}))
    method = SERVED[served]
    assert isinstance(method, LinearMethod | SoftTokens)
    return method, changes
