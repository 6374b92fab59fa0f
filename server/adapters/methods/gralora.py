"""GraLoRA (arXiv 2505.20355): a low-rank update in each of ``k × k`` blocks of the weight.

``y_j = s Σ_n B_j[n] A_n[j] x_n`` with ``s = alpha / (r + hybrid_r)``, plus ``s B A x`` of rank
``hybrid_r`` over the whole weight. Together these are one low-rank update of rank
``k·r + hybrid_r``, whose factors are 0 outside the blocks.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_A, _B = "gralora_A", "gralora_B"
_A_WHOLE, _B_WHOLE = "gralora_A_general.weight", "gralora_B_general.weight"
_K, _WHOLE = key("gralora_k"), key("hybrid_r")


def _conflicts(config: Mapping[str, Any]) -> Iterable[tuple[str, Text]]:
    rank, blocks = config.get("r", 0), config.get("gralora_k", 1)
    if rank % blocks:
        yield "r", say("NOT_DIVISIBLE", size=rank, what="rank components", by=blocks)


def _has_whole(m: Module) -> bool:
    return m.config["hybrid_r"] > 0


def _operators(m: Module) -> Piece:
    """The factors of all blocks in one pair of matrices, with ``r/k`` ranks per pair of blocks."""
    a, b = m.tensors[_A], m.tensors[_B]
    blocks, inputs, rank = a.shape
    outputs, part = b.shape[2], rank // blocks
    wide_a = a.new_zeros(blocks, blocks, part, blocks, inputs)
    wide_b = b.new_zeros(blocks, outputs, blocks, blocks, part)
    # Shapes: a is [n, i, (j, p)], b is [j, (n, p), o].
    for n in range(blocks):
        wide_a[:, n, :, n] = a[n].view(inputs, blocks, part).permute(1, 2, 0)
    for j in range(blocks):
        wide_b[j, :, j] = b[j].view(blocks, part, outputs).permute(2, 0, 1)
    whole_a = wide_a.view(blocks * rank, blocks * inputs)
    whole_b = wide_b.view(blocks * outputs, blocks * rank)
    if _A_WHOLE in m:
        whole_a = torch.cat((whole_a, m.tensors[_A_WHOLE].to(whole_a.dtype)))
        whole_b = torch.cat((whole_b, m.tensors[_B_WHOLE].to(whole_b.dtype)), dim=1)
    scaling = m.config["alpha"] / (m.config["r"] + m.config["hybrid_r"])
    return low_rank(whole_a, whole_b.to(torch.promote_types(b.dtype, torch.float32)) * scaling)


METHOD = LinearMethod(
    name="gralora",
    peft_types={"GRALORA"},
    keys={"hybrid_r": fault_of_count, "alpha": fault_of_number, "gralora_k": fault_of_rank},
    ignored={"gralora_dropout": DROPOUT},
    bias=("gralora_only",),
    required=("alpha", "gralora_k", "hybrid_r"),
    conflicts=_conflicts,
    rank_of=lambda m: m.config["gralora_k"] * m.rank + m.config["hybrid_r"],
    tensors={
        _A: (_K, IN / _K, R),
        _B: (_K, R, OUT / _K),
        _A_WHOLE: when(_has_whole, (_WHOLE, IN)),
        _B_WHOLE: when(_has_whole, (OUT, _WHOLE)),
    },
    operators=_operators,
)
