"""KaSA (arXiv 2412.06071, ``kasa_config``): LoRA with a diagonal, on a weight without its noise.

``ΔW = s·B diag(σ) A − W_r``, where ``W_r`` is the part of the served weight that belongs to its
``r`` smallest singular values. The update has rank ``2 r``. The signs of singular vectors cancel in
``W_r``, so it does not depend on the library that computes them.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.lora import DIAGONAL, A, B, with_bias
from turret.server.adapters.methods.lora import METHOD as LORA


def _check(m: Module) -> None:
    smaller = min(m.inputs, m.outputs)
    if m.rank >= smaller:
        m.misfit(say("NOT_IN_RANGE", least=1, most=smaller - 1, value=m.rank), "rank")


def _operators(m: Module) -> Iterator[Piece]:
    a, b, diagonal = m.wide(A, B, DIAGONAL)
    rank = len(diagonal)
    u, s, v = m.decomposed()
    noise = (-u[:, -rank:] * s[-rank:]).to(b)
    a = torch.cat((a, v[-rank:].to(a)))
    return with_bias(m, low_rank(a, torch.cat((b * diagonal * m.scaling, noise), dim=1)))


METHOD = replace(
    LORA,
    name="kasa",
    accepts=lambda config: isinstance(config.get("kasa_config"), Mapping),
    rank_of=lambda m: 2 * m.rank,
    check=_check,
    operators=_operators,
)
