"""DEFT (and PaRa): a subspace of the outputs is removed from ``W`` and filled again.

``ΔW = Q (s R − Fᵀ W)``: with ``relu``, ``Q = P`` and ``F = relu(P)``; with ``qr``, both are the
orthonormal factor of ``P``. With ``para``, the subspace is only removed, and there is no ``R``.
``s`` is ``alpha / r``, or 1 without ``alpha``.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_P, _R = "deft_P", "deft_R"
# PEFT caps the rank at the number of outputs.
_RANK = Dim(lambda m: min(m.rank, m.outputs))


def _operators(m: Module) -> Piece:
    # The rows of R belong to the columns of Q, whose signs depend on the factorisation. Therefore
    # factor P as PEFT does, in fp32.
    p, is_qr = m.tensors[_P].to(torch.float32), m.config["decomposition_method"] == "qr"
    left = torch.linalg.qr(p)[0] if is_qr else p
    taken = left if is_qr else p.relu()
    wide = torch.promote_types(m.tensors[_P].dtype, torch.float32)
    a = -times_weight(taken.T.to(wide), m.rows())
    if _R in m:
        scaling = m.config["alpha"] / p.shape[1] if m.config.get("alpha") else 1.0
        a += m.tensors[_R].to(wide) * scaling
    return low_rank(a, left.to(wide))


METHOD = LinearMethod(
    name="deft",
    peft_types={"DEFT"},
    keys={
        "alpha": optional(fault_of_number),
        "decomposition_method": fault_of_choice("relu", "qr"),
        "para": fault_of_bool,
    },
    ignored={"deft_dropout": DROPOUT, "init_scale": START},
    bias=("deft_only",),
    rank_of=_RANK.of,
    required=("decomposition_method", "para"),
    tensors={_P: (OUT, _RANK), _R: when(lambda m: not m.config["para"], (_RANK, IN))},
    operators=_operators,
)
