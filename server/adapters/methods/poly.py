"""Poly (arXiv 2202.13914): ``Δ(x) = x A_t B_t / r``, where each task ``t`` mixes factors of skills.

Each split of a factor has its own mix: ``A_t = Σ_s w_ts A_s`` with ``w_t = σ(l_t) / Σ σ(l_t)`` over
the skills ``s``; likewise ``B_t``. An adapter serves one of the tasks in its file.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
_COUNTS = ("n_tasks", "n_skills", "n_splits")
_TASKS, _SKILLS, _SPLITS = map(key, _COUNTS)
# PEFT adds this to the sum that it divides by.
_EPSILON = 1e-12


def _operators(m: Module) -> Piece:
    a, b, logits = m.wide(_A, _B, _LOGITS)
    splits, skills, _, rank = a.shape
    weights = logits[m.reading.task].view(splits, skills).sigmoid()
    weights = weights / (weights.sum(-1, keepdim=True) + _EPSILON)
    a = torch.einsum("qs,qsdr->qdr", weights, a).reshape(-1, rank)
    b = torch.einsum("qs,qsrd->qrd", weights, b).transpose(0, 1).reshape(rank, -1)
    return low_rank(a.T, b.T * (1.0 / rank))


METHOD = LinearMethod(
    name="poly",
    peft_types={"POLY"},
    keys={"poly_type": fault_of_choice("poly"), **dict.fromkeys(_COUNTS, fault_of_rank)},
    required=_COUNTS,
    tasks="n_tasks",
    tensors={
        _A: (_SPLITS, _SKILLS, IN / _SPLITS, R),
        _B: (_SPLITS, _SKILLS, R, OUT / _SPLITS),
        _LOGITS: (_TASKS, _SPLITS * _SKILLS),
    },
    operators=_operators,
)
