"""DeLoRA (arXiv 2503.18225): ``Δ(x) = B diag(λ / (r ‖a_i‖ ‖b_i‖)) A (n ⊙ x)``.

Direction and strength are separate: ``λ`` bounds the update. The file contains ``n``, the norms of
the columns of the weight on which the adapter was trained.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

# PEFT clamps norms to this minimum.
_MIN_NORM = 1e-4


def _operators(m: Module) -> Piece:
    a, b, strength, norms = m.wide("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    lengths = a.norm(dim=1).clamp(min=_MIN_NORM) * b.norm(dim=0).clamp(min=_MIN_NORM)
    return low_rank(a * norms, b * (strength / len(a) / lengths))


METHOD = LinearMethod(
    name="delora",
    peft_types={"DELORA"},
    ignored={"delora_lambda": IN_TENSORS, "lambda_pattern": IN_TENSORS, "module_dropout": DROPOUT},
    bias=("delora_only",),
    has_patterns=True,
    tensors={
        "delora_A": (R, IN),
        "delora_B": (OUT, R),
        "delora_lambda": (1,),
        "delora_w_norm": (IN,),
    },
    operators=_operators,
)
