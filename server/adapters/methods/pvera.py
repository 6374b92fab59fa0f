"""PVeRA: VeRA whose inner vector is drawn from a distribution; inference uses the mean.

``Δ(x) = λ_b ⊙ B (λ_d ⊙ (A x))``, where ``A`` and ``λ_d`` are the first ``r`` of ``2 r`` rows and
values in the file. The other half computes the logarithm of the variance.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.vera import method

_PVERA = method("pvera", copies=2)

METHOD = replace(
    _PVERA,
    ignored={**_PVERA.ignored, "generator_seed": "seed of the sampling, which is off"},
    refused={
        "sample_at_inference": (
            (False, None),
            "it draws a new update at every call; set it to false",
        )
    },
)
