"""HiRA (ICLR 2025): ``y = (W + W ⊙ B A) x + b``, the weight times a low-rank matrix, elementwise.

``(W ⊙ B A) x = Σ_r b_r ⊙ W (a_r ⊙ x)``: the base multiplies ``r`` more rows for a token, and no
matrix as large as the weight is computed. There is no scale.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *


def _rank(m: Module) -> int:
    """The module's rank. Unless the base is in 4 bits, PEFT 0.21 uses r, not rank_pattern."""
    return m.config["r"] if m.extent("hira_A", 0) == m.config["r"] else m.rank


_R = Dim(_rank)

METHOD = LinearMethod(
    name="hira",
    peft_types={"HIRA"},
    ignored={"hira_dropout": DROPOUT},
    has_patterns=True,
    rank_of=_rank,
    tensors={"hira_A": (_R, IN), "hira_B": (OUT, _R)},
    operators=lambda m: ModulatedBase(m.tensors["hira_A"], m.tensors["hira_B"].T),
)
