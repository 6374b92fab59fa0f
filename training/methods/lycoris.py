"""LoHa (arXiv 2108.06098) and LoKr (2309.14859).

PEFT attaches them to dense modules only; ``training/lycoris`` has the layers for 4-bit ones.
"""

from __future__ import annotations

import peft
from peft.tuners.lokr.layer import factorization

from turret.training.lycoris import register_nf4_layers
from turret.training.methods.method import PeftMethod, Settings
from turret.training.models.base_model import TrainingBase
from turret.training.settings.presets import expand_targets
from turret.training.settings.ranks import highest_loha_rank, module_sizes

register_nf4_layers()


def _own_rank(config: Settings, base: TrainingBase) -> float:
    return float(config.rank)


def _loha_rank(config: Settings, base: TrainingBase) -> int:
    targets = expand_targets(base.arch.projections, config.targets)
    return max(
        1, min(_RANK, highest_loha_rank(tuple(module_sizes(base.arch.projections, targets))))
    )


_RANK = 8
_DEFAULTS = {"targets": ("all-linear",), "rank": _RANK, "alpha": _own_rank, "dropout": 0.0}


def _loha_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    return peft.LoHaConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        alpha=config.alpha,
        rank_dropout=config.dropout,
        target_modules=list(config.targets),
    )


def _lokr_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    return peft.LoKrConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        alpha=config.alpha,
        rank_dropout=config.dropout,
        target_modules=list(config.targets),
        decompose_both=config.decompose_both,
        decompose_factor=config.decompose_factor,
    )


def _decomposed_rank(config: Settings, base: TrainingBase) -> int:
    """The rank where PEFT decomposes the large factor of a module; else it only divides alpha."""
    for _, *sides in module_sizes(base.arch.projections, config.targets):
        if config.rank < max(factorization(side, config.decompose_factor)[1] for side in sides) / 2:
            return config.rank
    return 0


LOHA = PeftMethod(
    name="loha",
    learning_rate=2e-3,
    defaults={**_DEFAULTS, "rank": _loha_rank},
    peft_config=_loha_config,
)
LOKR = PeftMethod(
    name="lokr",
    learning_rate=2e-3,
    defaults={**_DEFAULTS, "decompose_both": False, "decompose_factor": -1},
    peft_config=_lokr_config,
    rank_served=_decomposed_rank,
)
