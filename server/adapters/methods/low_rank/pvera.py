"""PVeRA: VeRA with a distribution in the middle; inference uses its mean.

``Δ(x) = λ_b ⊙ B (λ_d ⊙ (A x))`` with the first ``r`` of ``2 r`` shared rows of ``A`` and values of
``λ_d``; the others are the logarithm of the variance.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_A, _B = "base_model.pvera_A", "base_model.pvera_B"


def _projections(adapter: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    if is_saved(adapter):
        return adapter.shared[_A], adapter.shared[_B]
    adapter.warn(drawn("pvera_A and pvera_B"))
    return fixed_projections(adapter, 2 * adapter.rank)


def _operators(m: Module) -> Piece:
    a, b = m.once(_projections)
    wide = torch.promote_types(a.dtype, torch.float32)
    lambda_b, lambda_d = (m.tensors[f"pvera_lambda_{x}"].to(wide) for x in "bd")
    b = lambda_b[:, None] * b[: m.outputs].to(wide) * lambda_d[: m.rank]
    return low_rank(a[: m.rank, : m.inputs], b)


METHOD = LinearMethod(
    name="pvera",
    peft_types={"PVERA"},
    keys=TARGETS
    | LAYERS
    | CONV1D
    | {"r": is_rank, "save_projection": is_bool, "projection_prng_key": is_seed},
    ignored={
        "generator_seed": "seeds the sampling, which is off",
        "pvera_dropout": DROPOUT,
        "d_initial": START,
        "init_weights": START,
    },
    refused={
        "sample_at_inference": (
            (False, None),
            "it draws another update at every call; set it to false",
        )
    },
    bias=("pvera_only",),
    conflicts=needs_seed,
    tensors={"pvera_lambda_b": (OUT,), "pvera_lambda_d": (2 * R,)},
    shared={_A: when(is_saved, (2 * R, IN)), _B: when(is_saved, (OUT, R))},
    operators=_operators,
)
