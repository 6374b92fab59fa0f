"""X-LoRA's router, which computes the weight of each component of an adapter for each token."""

from __future__ import annotations

from dataclasses import dataclass

from turret.lazy_torch import torch
from turret.server.adapters.operators import Tensors


@dataclass(frozen=True, slots=True)
class TokenRouter(Tensors):
    """The network that computes a token's scalings of ``K`` components in ``L`` modules.

    ``h`` is the token's hidden state after a first pass.
    ``z = W_n relu(… relu(W_1 h + b_1) …) + b_n`` has ``K`` values for each module, or ``K`` values
    that all modules share. The scalings are ``scale · softmax(z / T)`` or ``scale · z``, and only
    the ``top_k`` largest may be kept.

    Attributes:
        weights: ``[out, in]`` each, fp32, contiguous, padded with zeros to multiples of 16.
        biases: ``[out]`` each, fp32, padded likewise.
        components: ``K``.
        modules: ``L``.
        is_shared: Whether all modules have the same scalings.
        temperature: ``T``; None for no softmax.
        top_k: The number of largest scalings of a token that are kept in a module; None for all.
        is_renormalised: Whether the kept scalings other than 0 are replaced with their softmax.
        scale: The factor in the formula.
        first_pass: The scaling of each component in the first pass, the same in every module; None
            if the base computes the first pass.
    """

    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...]
    components: int
    modules: int
    is_shared: bool
    temperature: float | None
    top_k: int | None
    is_renormalised: bool
    scale: float
    first_pass: tuple[float, ...] | None = None
