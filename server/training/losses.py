"""Losses of single tokens, as functions of their log probabilities.

All losses are sums over tokens, not means. ``r = exp(lp − q)`` is the probability ratio, where
``lp`` is the log probability and ``q`` the one with which the token was sampled (``logprobs``).
``A`` is the advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from turret.lazy_torch import torch

Inputs: TypeAlias = "Mapping[str, torch.Tensor]"
LossSettings = Mapping[str, float]
TARGETS = "target_tokens"
_SAMPLED = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


class Loss(NamedTuple):
    """A loss.

    Attributes:
        of: The loss of each token, from log probabilities, inputs and settings; elementwise.
        inputs: The inputs that it needs in addition to ``TARGETS``.
        settings: The names of its settings, with their defaults.
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
