"""The methods that can be trained, by their names in the config."""

from __future__ import annotations

from collections.abc import Mapping

from turret.training.methods.learned_fusion import LEARNED_FUSION
from turret.training.methods.linear import (
    ALORA,
    DORA,
    HRA,
    IA3,
    LORA,
    MISS,
    OFT,
    RSLORA,
    SHIRA,
    VBLORA,
)
from turret.training.methods.lycoris import LOHA, LOKR
from turret.training.methods.method import P_TUNING, PREFIX_TUNING, PROMPT_TUNING, TrainingMethod

METHODS: Mapping[str, TrainingMethod] = {
    method.name: method
    for method in (
        *(LORA, RSLORA, DORA, ALORA, MISS, OFT, HRA, VBLORA, SHIRA),
        *(LOHA, LOKR, IA3, PREFIX_TUNING, PROMPT_TUNING, P_TUNING, LEARNED_FUSION),
    )
}
