"""AdaMSS: rows of the weight in clusters, ``y[rows_i] += B_i A_i V [x, 1]``, ``V`` of its SVD.

The file holds ``A``, ``B`` and ``V``, and of the clusters their sizes alone. Which rows they have
is found again from the left singular vectors, by PEFT's own steps. ``V`` tells whether the base is
the one that was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from turret.server.adapters.base import BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.peft_format.config.rules import (
    Irrelevant,
    Rules,
    Used,
    is_rank,
    is_seed,
)
from turret.server.adapters.peft_format.config.selection_rules import (
    LAYER_RULES,
    RANK,
    START,
    TARGET_RULES,
)
from turret.server.adapters.peft_format.module_checkpoint import ModuleFormat, Roles
from turret.training.conversion.clusters import cluster_rows
from turret.training.conversion.made_lora import MadeLora, peft_generator
from turret.training.errors import RunError

_DOWN = "adamss_newB"
_MAX_CLUSTERS = 4096
# PEFT's own, whatever the config says.
_CLUSTER_SEED = 123456789
# How far unit vectors may be from those in the file, which bf16 moves by up to 4e-3.
_FAR = 2e-2
_TRAINING = Irrelevant("chooses what is trained; the tensors show the result")


def _is_few(value: Any) -> str | None:
    if problem := is_rank(value):
        return problem
    return None if value <= _MAX_CLUSTERS else f"must be at most {_MAX_CLUSTERS}"


_RULES: Rules = {
    **TARGET_RULES,
    **LAYER_RULES,
    "r": RANK,
    "num_subspaces": Used(_is_few),
    "random_seed": Used(is_seed),
    "subspace_rank": Irrelevant("the tensors show the rank of every cluster"),
    "init_weights": START,
    **dict.fromkeys(
        (
            *("use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"),
            *("asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"),
            *("use_dynamic_rank", "svd_threshold"),
        ),
        _TRAINING,
    ),
}


def format_of(config: Mapping[str, Any]) -> ModuleFormat:
    """How its checkpoint is written."""
    count = config.get("num_subspaces", 5)
    names = [_DOWN]
    if _is_few(count) is None:
        names += [f"adamss_{factor}.{i}" for factor in "AB" for i in range(count)]
    return ModuleFormat(
        rules=_RULES,
        roles={f".{name}": name for name in names},
        check=_check,
        also_required=("num_subspaces",),
    )


def _check(name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings) -> None:
    width = module.in_features + (module.bias is not None)
    rank = min(rank, module.out_features, width)
    if _DOWN not in roles or len(roles) % 2 == 0:
        findings.add(f"{name}.{_DOWN}", "or a factor of a cluster is missing")
        return
    findings.check_shape(f"{name}.{_DOWN}", roles[_DOWN], (rank, width))
    total = 0
    for i in range(len(roles) // 2):
        down, up = roles.get(f"adamss_A.{i}"), roles.get(f"adamss_B.{i}")
        if down is None or up is None or down.ndim != 2 or up.ndim != 2:
            findings.add(f"{name}.adamss_A.{i}", "or its adamss_B is missing or no matrix")
            return
        findings.check_shape(f"{name}.adamss_A.{i}", down, (up.shape[1], rank), of_base=False)
        total += len(up)
    if len(roles) // 2 > module.out_features:
        # PEFT makes no cluster without rows.
        findings.add(name, f"has {module.out_features} outputs, fewer than clusters in the file")
    if total != module.out_features:
        findings.mismatch(name, f"has {module.out_features} outputs, its clusters {total}")


def convert(
    roles: Roles, module: BaseModule, _scaling: float, config: Mapping[str, Any], path: str
) -> MadeLora:
    """One module's update.

    Raises:
        RunError: The base is another than the file's, or gives clusters of other sizes.
    """
    down = roles[_DOWN].to(torch.float64)
    ups = [roles[f"adamss_B.{i}"].to(torch.float64) for i in range(len(roles) // 2)]
    downs = [roles[f"adamss_A.{i}"].to(torch.float64) for i in range(len(ups))]
    left = _left_vectors(module, down, config.get("random_seed", 0), path)
    labels = cluster_rows(left.numpy(), len(ups), _CLUSTER_SEED)
    rows = [np.flatnonzero(labels == i) for i in range(len(ups))]
    if [len(some) for some in rows] != [len(up) for up in ups]:
        raise RunError(
            f"{path}: the base gives clusters of {[len(some) for some in rows]} rows, the file has"
            f" {[len(up) for up in ups]}; {_ADVICE}"
        )
    starts = np.cumsum([0, *(len(one) for one in downs)]).tolist()
    inner = torch.zeros(module.out_features, starts[-1], dtype=torch.float64)
    for some, up, (start, end) in zip(rows, ups, pairwise(starts), strict=True):
        inner[torch.from_numpy(some), start:end] = up
    a, b = torch.cat(downs) @ down, inner
    if len(down) < starts[-1]:
        a, b = down, inner @ torch.cat(downs)
    if module.bias is None:
        return MadeLora(a.float(), b.float(), None)
    return MadeLora(a[:, :-1].float().contiguous(), b.float(), (b @ a[:, -1]).float())


_ADVICE = (
    "name the base it was trained on, in the dtype of training (--dtype), on its device (--device)"
)


def _left_vectors(module: BaseModule, down: torch.Tensor, seed: int, path: str) -> torch.Tensor:
    """The left singular vectors that belong to ``down``, ``[out, r]`` on the CPU.

    Of a weight's smaller singular vectors ``svd_lowrank`` finds those that its random start leads
    to. Where another start was drawn (on another device, or by a version without a seed) they
    follow from ``down``: ``W V = U S``, or ``Wᵀ U = V S``. Of another weight they are not
    orthogonal.

    Raises:
        RunError: The weight has no such vectors.
    """
    weight = module.dequantize()
    if module.bias is not None:
        weight = torch.cat((weight, module.bias[:, None]), dim=1)
    with peft_generator(seed, weight.device):
        left, _, right = torch.svd_lowrank(weight, q=len(down), niter=2)
    # Either of two opposite vectors is one, and the distances between rows are the same.
    if _are_near(right.T.cpu().to(torch.float64), down):
        return left.cpu()
    wide = weight.cpu().to(torch.float64)
    # The approximation is exact from one side: the longer one.
    if wide.shape[0] < wide.shape[1]:
        solved = wide @ down.T
    else:
        solved = torch.linalg.lstsq(wide.T, down.T, driver="gelsd").solution
    found = solved / solved.norm(dim=0)
    excess = (found.T @ found - torch.eye(len(down), dtype=torch.float64)).abs().max()
    if float(excess) > _FAR:
        raise RunError(f"{path}: adamss_newB is of another weight; {_ADVICE}")
    return found.float()


def _are_near(vectors: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether rows have the directions of others, or the opposite ones."""
    lengths = vectors.norm(dim=1) * others.norm(dim=1)
    return bool(((vectors * others).sum(1).abs() > (1 - _FAR**2 / 2) * lengths).all())
