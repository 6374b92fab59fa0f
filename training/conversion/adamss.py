"""AdaMSS: ``y[rows_i] += B_i A_i V [x, 1]`` for clusters of rows, with ``V`` from the weight's SVD.

The file holds ``A``, ``B``, ``V`` and only the sizes of the clusters. The rows of each cluster are
computed again from the left singular vectors, with PEFT's own steps, which need scikit-learn. A
comparison with ``V`` shows whether the base is the one that the adapter was trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

from turret.server.adapters.methods.kit import (
    ANY,
    Dim,
    LinearFormat,
    Module,
    extent,
    fault_of_integer,
    fault_of_seed,
    optionally,
    torch,
)
from turret.server.adapters.operators.low_rank import LoraModule
from turret.training.conversion import peft_generator
from turret.training.words import RunError, say

_DOWN = "adamss_newB"
_MAX_CLUSTERS = 4096
# PEFT always clusters with these settings, regardless of the config.
_CLUSTERING: Any = {"init": "random", "n_init": 1, "max_iter": 10, "random_state": 123456789}
# Maximum distance of unit vectors from those in the file, which bf16 moves by up to 4e-3.
_FAR = 2e-2
_TRAINING = "chooses what is trained; the tensors show the result"

_fault_of_count = fault_of_integer(1, _MAX_CLUSTERS)
# Config keys that only training uses.
_CHOOSING = (
    *("use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"),
    *("asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"),
    *("use_dynamic_rank", "svd_threshold"),
)
_WIDTH = Dim(lambda m: m.inputs + bool(m.has_bias), is_served=True)
_RANK = Dim(lambda m: min(m.rank, m.outputs, _WIDTH.of(m)), is_served=True)


def format_of(config: Mapping[str, Any]) -> LinearFormat:
    """The format of the checkpoint."""
    count = config.get("num_subspaces", 5)
    some = range(count if _fault_of_count(count) is None else 0)
    return LinearFormat(
        name="adamss",
        peft_types={"ADAMSS"},
        keys={"num_subspaces": _fault_of_count, "random_seed": fault_of_seed},
        ignored={
            "subspace_rank": "the tensors show the rank of every cluster",
            **dict.fromkeys(_CHOOSING, _TRAINING),
        },
        required=("num_subspaces",),
        tensors={
            _DOWN: (_RANK, _WIDTH),
            **{f"adamss_A.{i}": optionally((extent(f"adamss_B.{i}", 1), _RANK)) for i in some},
            **{f"adamss_B.{i}": optionally(ANY) for i in some},
        },
        check=_check,
    )


def _clusters(m: Module) -> int:
    return len(m.tensors) // 2


def _check(m: Module) -> None:
    total = 0
    for i in range(_clusters(m)):
        if f"adamss_A.{i}" not in m or len(m.tensors[f"adamss_B.{i}"].shape) != 2:
            why = "no two-dimensional adamss_B matches it"
            m.fault(f"adamss_A.{i}", say("INVALID_TENSOR", why=why))
            return
        total += m.extent(f"adamss_B.{i}", 0)
    if _clusters(m) > m.outputs:
        # PEFT creates no empty clusters.
        expected = f"at least {_clusters(m)}, one for each cluster"
        why = say("WRONG_COUNT", found=m.outputs, what="outputs", expected=expected)
        m.reading.fault(m.name, why)
    if total != m.outputs:
        m.misfit(say("WRONG_COUNT", found=m.outputs, what="outputs", expected=total))


def convert(m: Module) -> LoraModule:
    """Convert the update of one module.

    Raises:
        RunError: The base is not the one used in training, or gives clusters of other sizes.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    # In the formula, ``down`` is V, and ``ups`` and ``downs`` are the B and A of the clusters.
    down = m.exact(_DOWN)
    ups = [m.exact(f"adamss_B.{i}") for i in range(_clusters(m))]
    downs = [m.exact(f"adamss_A.{i}") for i in range(len(ups))]
    weight = m.weight()
    # Move the bias to the weight's device: PEFT decomposes the weight with the bias as a column.
    bias = None if not m.has_bias else m.bias()
    if bias is not None:
        weight = torch.cat((weight, bias.to(weight)[:, None]), dim=1)
    left = _left_vectors(weight, down, m.config.get("random_seed", 0), m.name)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        means = KMeans(len(ups), **_CLUSTERING)
        labels = torch.from_numpy(means.fit_predict(left.numpy()))
    rows = [(labels == i).nonzero()[:, 0] for i in range(len(ups))]
    if [len(some) for some in rows] != [len(up) for up in ups]:
        counts = {"expected": list(map(len, rows)), "found": list(map(len, ups))}
        raise RunError(say("ADAMSS_CLUSTERS", name=m.name, **counts))
    starts = [0, *accumulate(len(one) for one in downs)]
    # ``inner`` holds every B, in the rows of its cluster and in the columns that match its A.
    inner = torch.zeros(m.outputs, starts[-1], dtype=torch.float64)
    for some, up, (start, end) in zip(rows, ups, pairwise(starts), strict=True):
        inner[some, start:end] = up
    a, b = torch.cat(downs) @ down, inner
    if len(down) < starts[-1]:
        a, b = down, inner @ torch.cat(downs)
    if bias is None:
        return LoraModule(a.float(), b.float(), None)
    return LoraModule(a[:, :-1].float().contiguous(), b.float(), (b @ a[:, -1]).float())


def _left_vectors(weight: torch.Tensor, down: torch.Tensor, seed: int, path: str) -> torch.Tensor:
    """The left singular vectors that belong to ``down``, ``[out, r]`` on the CPU.

    Among a weight's smaller singular vectors, ``svd_lowrank`` finds those to which its random start
    leads. If the training drew another start (on another device, or with a version without a seed),
    the vectors follow from ``down``: ``W V = U S``, or ``Wᵀ U = V S``. For another weight, the
    results are not orthogonal.

    Raises:
        RunError: The weight has no such vectors.
    """
    with peft_generator(seed, weight.device):
        left, _, right = torch.svd_lowrank(weight, q=len(down), niter=2)
    # A singular vector may have either sign; the distances between rows stay the same.
    if _are_near(right.T.cpu().to(torch.float64), down):
        return left.cpu()
    wide = weight.cpu().to(torch.float64)
    # The approximation is exact for the longer side only.
    if wide.shape[0] < wide.shape[1]:
        solved = wide @ down.T
    else:
        solved = torch.linalg.lstsq(wide.T, down.T, driver="gelsd").solution
    found = solved / solved.norm(dim=0)
    excess = (found.T @ found - torch.eye(len(down), dtype=torch.float64)).abs().max()
    if float(excess) > _FAR:
        raise RunError(say("ADAMSS_OTHER_WEIGHT", path=path))
    return found.float()


def _are_near(vectors: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether the rows of two matrices have the same or opposite directions."""
    lengths = vectors.norm(dim=1) * others.norm(dim=1)
    return bool(((vectors * others).sum(1).abs() > (1 - _FAR**2 / 2) * lengths).all())
