"""HRA (arXiv 2405.17484): the input is reflected at learned planes, one after another.

PEFT's layer multiplies the base's weight by a matrix of the reflections, which a packed weight does
not allow, and keeps a matrix of ``in × in`` for each reflection until the backward pass: gigabytes
for the smallest model. The layer here reflects the input. All else is PEFT's, the files too.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft.tuners.hra import layer as hra

from turret.training.methods.method import PeftMethod, Settings
from turret.training.models.base_model import TrainingBase
from turret.training.settings.config import MethodConfig


class ReflectedLinear(hra.HRALinear):
    """A linear module, packed or not, with an HRA adapter on it."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``W R x + b``; ``[..., in]`` → ``[..., out]``, in the dtype of ``x``."""
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.hra_u:
                    x = reflect(x, self.hra_u[name])
        return self.base_layer(x, *args, **kwargs)


def reflect(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``R x`` with ``R = Π (I − 2 v_i v_iᵀ)``, ``v_i`` the columns of ``u`` at length 1.

    As ``I − V T Vᵀ``, where ``T⁻¹`` is the upper triangle of ``Vᵀ V`` with halves on its diagonal
    (the compact WY form: Schreiber, Van Loan 1989; Joffrain et al. 2006).

    Args:
        x: ``[..., in]``, any float dtype.
        u: ``[in, r]`` fp32, no column of zeros.

    Returns:
        ``[..., in]`` in the dtype of ``x``; computed in that of ``u``.
    """
    v = u / u.norm(dim=0)
    overlaps = (v.T @ v).triu(1)
    triangle = overlaps + 0.5 * torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    flat = x.to(v.dtype).flatten(0, -2)
    shares = torch.linalg.solve_triangular(triangle, (flat @ v).T, upper=True)
    return (flat - shares.T @ v.T).view(x.shape).to(x.dtype)


def _hra_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    return peft.HRAConfig(task_type="CAUSAL_LM", r=config.rank, target_modules=list(config.targets))


class _HraMethod(PeftMethod):
    def attach(self, model: Any, config: MethodConfig, base: TrainingBase) -> Any:
        attached = super().attach(model, config, base)
        for layer in attached.modules():
            if isinstance(layer, hra.HRALinear):
                layer.__class__ = ReflectedLinear
        return attached


HRA = _HraMethod(
    name="hra",
    learning_rate=5e-3,
    defaults={"targets": ("all-linear",), "rank": 8},
    peft_config=_hra_config,
)
