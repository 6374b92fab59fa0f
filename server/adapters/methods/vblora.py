"""VB-LoRA (arXiv 2405.15179): ``Δ(x) = B A x``, both factors composed from one bank of vectors.

A sub-vector of a factor is ``Σ_t softmax(l)_t bank[t]`` over the ``topk`` largest logits. The file
contains the logits or, with ``save_only_topk_weights``, the indices of the largest logits and all
but the last of their softmax values.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_BANK = "base_model.vblora_vector_bank"
_A, _B = "vblora_logits_A", "vblora_logits_B"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_SIZES = ("num_vectors", "vector_length", "topk")
_VECTORS, _LENGTH, _TOPK = map(key, _SIZES)
_KEPT = "save_only_topk_weights"


def _conflicts(config: Mapping[str, Any]) -> Iterable[tuple[str, Text]]:
    vectors, topk = config.get("num_vectors", 1), config.get("topk", 1)
    if topk > vectors:
        yield "topk", say("NOT_IN_RANGE", least=1, most=vectors, value=topk)


def _has_logits(m: Module) -> bool:
    return not m.config.get(_KEPT)


def _operators(m: Module) -> Pieces:
    if not _has_logits(m):
        for factor in (_A, _B):
            _check_indices(m, f"{factor}{_INDICES}")
        if m.reading.findings.fields:
            return ()
    a, b = (_vectors(m, factor) for factor in (_A, _B))
    # The first axis of B counts the pieces of a column, and the second the ranks.
    return low_rank(a.flatten(1), b.transpose(1, 2).flatten(0, 1))


def _check_indices(m: Module, role: str) -> None:
    ordered, vectors = m.tensors[role].long().sort(-1).values, m.config["num_vectors"]
    if ordered.numel() and not 0 <= int(ordered.min()) <= int(ordered.max()) < vectors:
        m.fault(role, say("INVALID_INDICES", limits=vectors))
    elif bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        m.fault(role, say("INVALID_TENSOR", why="one place has the same index twice"))


def _vectors(m: Module, factor: str) -> torch.Tensor:
    """The sub-vectors of a factor, ``[…, vector_length]``."""
    bank = m.reading.wide(_BANK)
    if factor in m:
        kept, chosen = m.tensors[factor].to(bank.dtype).topk(m.config["topk"], dim=-1)
        weights = kept.softmax(-1)
    else:
        chosen = m.tensors[factor + _INDICES].long()
        part = m.tensors[factor + _WEIGHTS].to(bank.dtype)
        # The file leaves out the last weight, because all weights add up to 1.
        weights = torch.cat((part, 1.0 - part.sum(-1, keepdim=True)), dim=-1)
    return (weights.unsqueeze(-1) * bank[chosen]).sum(-2)


METHOD = LinearMethod(
    name="vblora",
    peft_types={"VBLORA"},
    keys={_KEPT: fault_of_bool, **dict.fromkeys(_SIZES, fault_of_rank)},
    ignored={"vblora_dropout": DROPOUT, "init_vector_bank_bound": START, "init_logits_std": START},
    bias=("vblora_only",),
    required=_SIZES,
    conflicts=_conflicts,
    tensors={
        _A: when(_has_logits, (R, IN / _LENGTH, _VECTORS)),
        _B: when(_has_logits, (OUT / _LENGTH, R, _VECTORS)),
        _A + _INDICES: when(_KEPT, indices(R, IN / _LENGTH, _TOPK)),
        _A + _WEIGHTS: when(_KEPT, (R, IN / _LENGTH, _TOPK + -1)),
        _B + _INDICES: when(_KEPT, indices(OUT / _LENGTH, R, _TOPK)),
        _B + _WEIGHTS: when(_KEPT, (OUT / _LENGTH, R, _TOPK + -1)),
    },
    shared={_BANK: (_VECTORS, _LENGTH)},
    operators=_operators,
)
