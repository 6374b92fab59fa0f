"""OSF (arXiv 2504.07097): replaces the tail of the weight's singular value decomposition.

``ΔW = U diag(S) V − (U diag(S) V)₀``: the file contains the trained tail, which replaces the tail
of the served weight.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_U, _S, _V = (f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low"))
# The number of trained singular values. PEFT never trains all of them.
_N = extent(_S, 0)


def _check(m: Module) -> None:
    count, least = _N.of(m), min(m.inputs, m.outputs)
    if count >= least:
        m.misfit(say("WRONG_COUNT", found=count, what="values", expected=f"fewer than {least}"), _S)


def _operators(m: Module) -> Piece:
    m.warn(say("DECOMPOSED_FROM_BASE"))
    trained_u, trained_s, trained_v = m.wide(_U, _S, _V)
    # The signs of singular vectors, which depend on the library, cancel in their products.
    u, s, v = m.decomposed()
    kept = len(s) - len(trained_s)
    tail = (u[:, kept:] * s[kept:]).to(trained_u) @ v[kept:].to(trained_u)
    return Dense((trained_u * trained_s) @ trained_v - tail)


METHOD = LinearMethod(
    name="osf",
    peft_types={"OSF"},
    ignored={
        "effective_rank": IN_TENSORS,
        "rank_pattern": IN_TENSORS,
        "target_svd_config": "PEFT ignores it",
    },
    rank=None,
    tensors={_S: (_N,), _U: (OUT, _N), _V: (_N, IN)},
    check=_check,
    is_dense=always,
    operators=_operators,
)
