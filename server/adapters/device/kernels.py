"""Where a kernel replaces an operator's ``add``.

A kernel is earned by a measurement. ``bench/results/history.md`` has those of the CPU path; pairs
and dense updates have none of their own yet. On the GPU path nothing has been measured, so kernels
serve the operators that most checkpoints are made of. Everything else is ``add``, for the rows of
one mix at a time (``reference.py``); on the GPU path, a step that needs it is not captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from turret.server.adapters.operators.circulant import Circulant
from turret.server.adapters.operators.dense import Dense
from turret.server.adapters.operators.gate import Gate, QueryScore
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.input_blocks import InputBlocks
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import ExpertLowRank, LowRank
from turret.server.adapters.operators.operator import Operator
from turret.server.adapters.operators.pair_rotation import PairRotation
from turret.server.adapters.operators.sparse import Sparse
from turret.server.adapters.operators.vectors import Bias, Gain, InputGain


class Kernel(NamedTuple):
    """A kernel.

    Attributes:
        files: The kernel's files below ``kernels/cpu/c`` or ``kernels/gpu``.
        serves: Whether it takes an operator of its kind.
    """

    files: str
    serves: Callable[[Any], bool] = lambda operator: True


KERNELS: Mapping[type[Operator], Mapping[str, Kernel]] = {
    LowRank: {
        "cpu": Kernel("adapters/low_rank.c"),
        "gpu": Kernel("low_rank"),
    },
    ExpertLowRank: {
        "cpu": Kernel("adapters/experts.c"),
        "gpu": Kernel("experts"),
    },
    Gain: {
        "cpu": Kernel("adapters/adapters.c"),
        "gpu": Kernel("low_rank"),
    },
    Bias: {
        "cpu": Kernel("adapters/adapters.c"),
        "gpu": Kernel("low_rank"),
    },
    Hadamard: {
        "cpu": Kernel("adapters/hadamard.c"),
        "gpu": Kernel("hadamard", lambda update: update.rank <= 64),
    },
    Kronecker: {
        "cpu": Kernel("adapters/kronecker.c"),
        "gpu": Kernel("kronecker", lambda update: max(update.w1.shape[1], update.rank) <= 128),
    },
    InputGain: {"cpu": Kernel("adapters/input_change.c")},
    InputBlocks: {"cpu": Kernel("adapters/input_change.c")},
    PairRotation: {"cpu": Kernel("adapters/pairs.c")},
    Circulant: {"cpu": Kernel("adapters/circulant.c")},
    Sparse: {"cpu": Kernel("adapters/sparse.c")},
    Dense: {"cpu": Kernel("adapters/dense.c")},
    Gate: {"gpu": Kernel("fusion_gate", lambda gate: isinstance(gate.score, QueryScore))},
}


def has_kernel(operator: Operator, path: str) -> bool:
    """Whether a path's kernels apply an operator; if not, its ``add`` does."""
    kernel = KERNELS.get(type(operator), {}).get(path)
    return kernel is not None and kernel.serves(operator)
