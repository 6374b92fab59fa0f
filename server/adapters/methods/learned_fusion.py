"""Learned fusion (AdapterFusion, arXiv 2005.00247, section 3.2) of adapters with low-rank updates.

There are ``K`` frozen components and, per target module, a trained query ``Wq`` and key ``Wk``::

    α = softmax_k((Wq x) · (Wk Δ_k(x)))          y += Σ_k α_k Δ_k(x)

``Δ_k(x) = B_k A_k x`` is the component's own update, including its scale. It is 0 if the component
does not adapt the module. The paper's value matrix is the identity here. ``Wk B_k`` is folded at
load, so the score is computed in rank space (``kernels/fusion_gate.py``).

The checkpoint holds ``…fusion_query.weight`` ``[d_k, in]`` and ``…fusion_key.weight`` ``[d_k,
out]`` per module; the components are registered adapters, which the config identifies by digest.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *


def _operators(m: Module) -> Pieces:
    components = m.once(components_of)
    updates = [update_of(component, m.name) for component in components]
    if not any(update is not None for update in updates):
        m.fault("fusion_query.weight", say("UNEXPECTED_TENSOR", by=COMPONENTS_KEY))
        return ()
    query, keys = m.tensors["fusion_query.weight"], m.tensors["fusion_key.weight"]
    return gate_of(updates, lambda b: query_score(query, keys, b, m.reading.dtype))


METHOD = LinearMethod(
    name="learned_fusion",
    peft_types={"TURRET_FUSION"},
    keys={COMPONENTS_KEY: fault_of_components},
    # d_k counts as the rank, because a query costs as much as a factor A of rank d_k.
    rank="d_k",
    rank_name="d_k",
    required=(COMPONENTS_KEY,),
    tensors={"fusion_query.weight": (R, IN), "fusion_key.weight": (R, OUT)},
    operators=_operators,
)
