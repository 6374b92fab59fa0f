"""VeRA (arXiv 2310.11454): ``Δ(x) = λ_b ⊙ B (λ_d ⊙ (A x))`` with A, B that all modules share.

Each module multiplies the corner of A and B that fits its sizes, so it has a low-rank update with
the two vectors folded in.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_A, _B = "base_model.vera_A", "base_model.vera_B"


def _projections(adapter: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    if is_saved(adapter):
        return adapter.shared[_A], adapter.shared[_B]
    adapter.warn(drawn("vera_A and vera_B"))
    return fixed_projections(adapter, adapter.rank)


def _operators(m: Module) -> Piece:
    a, b = m.once(_projections)
    wide = torch.promote_types(a.dtype, torch.float32)
    lambda_b, lambda_d = (m.tensors[f"vera_lambda_{x}"].to(wide) for x in "bd")
    # Fold both vectors into b: a is then rounded as in PEFT, and b only once.
    return low_rank(a[:, : m.inputs], lambda_b[:, None] * b[: m.outputs].to(wide) * lambda_d)


METHOD = LinearMethod(
    name="vera",
    peft_types={"VERA"},
    keys=EXCLUDE
    | LAYERS
    | CONV1D
    | {"r": is_rank, "save_projection": is_bool, "projection_prng_key": is_seed},
    ignored={"vera_dropout": DROPOUT, "d_initial": START, "init_weights": START},
    bias=("vera_only",),
    conflicts=needs_seed,
    tensors={"vera_lambda_b": (OUT,), "vera_lambda_d": (R,)},
    shared={_A: when(is_saved, (R, IN)), _B: when(is_saved, (OUT, R))},
    operators=_operators,
)
