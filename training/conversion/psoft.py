"""PSOFT (openreview FSHrinMArK): ``y += s B (R − I) A x``, with ``B A`` from ``W``'s SVD.

The file holds the parameters of ``R``, but not the factors ``A`` and ``B``. These are computed by
the same decomposition as in PEFT when it loads the adapter. The linear algebra library determines
the signs of the singular vectors, and so the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turret.server.adapters.methods.kit import (
    DROPOUT,
    LinearFormat,
    Module,
    R,
    fault_of_bool,
    fault_of_choice,
    fault_of_integer,
    fault_of_number,
    fault_of_seed,
    optional,
    torch,
    when,
)
from turret.server.adapters.operators.low_rank import LoraModule
from turret.training.conversion import peft_generator

_TURN, _OUT, _IN = "psoft_R.weight", "psoft_R.vector_b", "psoft_R.vector_a"
# Maximum number of iterations, and of terms of a series, in a config.
_MOST_STEPS = 100
# PEFT's defaults for keys that its older versions did not write.
DEFAULTS: Mapping[str, Any] = {
    "ab_svd_init": "psoft_init",
    "psoft_svd": "full",
    "psoft_svd_lowrank_niter": 10,
    "random_seed": 0,
    "psoft_orth": True,
    "psoft_mag_a": True,
    "psoft_mag_b": True,
    "use_cayley_neumann": False,
    "num_cayley_neumann_terms": 5,
    "cayley_neumann_eps": None,
}


def _said(m: Module, name: str) -> Any:
    return m.config.get(name, DEFAULTS[name])


def convert(m: Module) -> LoraModule:
    """Convert the update of one module, including the scaling."""
    config, rank = {**DEFAULTS, **m.config}, m.config["r"]
    left, values, right = _svd(m.weight(), rank, config)
    values = values / m.scaling
    if config["ab_svd_init"] == "psoft_init":
        a, b = right, left * values
    else:
        root = values.sqrt()
        a, b = root[:, None] * right, left * root
    turn = rotation(m.tensors, rank, config) - torch.eye(rank, dtype=torch.float64)
    wide = b.cpu().to(torch.float64) @ turn * m.scaling
    return LoraModule(a.cpu().float(), wide.float(), None)


def _svd(
    weight: torch.Tensor, rank: int, config: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values of a weight and their vectors, by the same calls as in PEFT.

    Returns:
        The left vectors ``[out, r]``, the values ``[r]`` and the right vectors ``[r, in]``.
    """
    if config["psoft_svd"] == "full":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        with peft_generator(config["random_seed"], weight.device):
            niter = config["psoft_svd_lowrank_niter"]
            left, values, columns = torch.svd_lowrank(weight, q=rank, niter=niter)
        right = columns.T
    return left[:, :rank], values[:rank], right[:rank]


def rotation(
    roles: Mapping[str, torch.Tensor], rank: int, config: Mapping[str, Any]
) -> torch.Tensor:
    """The matrix ``R`` of the formula, ``[r, r]`` fp64."""
    turn = roles[_TURN].to(torch.float64)
    if config["psoft_orth"]:
        rows, columns = torch.triu_indices(rank, rank, 1)
        upper = torch.zeros(rank, rank, dtype=torch.float64)
        upper[rows, columns] = turn
        turn = _orthogonal(upper - upper.T, config)
    if config["psoft_mag_b"]:
        turn = roles[_OUT].to(torch.float64)[:, None] * turn
    return turn * roles[_IN].to(torch.float64) if config["psoft_mag_a"] else turn


def _orthogonal(skew: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """``(I + Q)(I − Q)⁻¹``, or the first terms of its series with the last one halved."""
    eye = torch.eye(len(skew), dtype=skew.dtype)
    if not config["use_cayley_neumann"]:
        return torch.linalg.solve(eye - skew, eye + skew, left=False)
    eps, terms = config["cayley_neumann_eps"], config["num_cayley_neumann_terms"]
    norm = skew.norm()
    if eps is not None and norm > eps:
        skew = skew * (eps / (norm + 1e-12))
    total, power = eye, eye
    # PEFT's series includes Q³ whenever it includes Q², and does not halve a lone Q.
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    for exponent in range(1, last + 1):
        power = power @ skew
        total = total + (1.0 if exponent == last > 2 else 2.0) * power
    return total


FORMAT = LinearFormat(
    name="psoft",
    peft_types={"PSOFT"},
    keys={
        "ab_svd_init": fault_of_choice("psoft_init", "pissa_init"),
        "psoft_svd": fault_of_choice("full", "lowrank"),
        "psoft_svd_lowrank_niter": fault_of_integer(0, _MOST_STEPS),
        "random_seed": fault_of_seed,
        "psoft_orth": fault_of_bool,
        "psoft_mag_a": fault_of_bool,
        "psoft_mag_b": fault_of_bool,
        "use_cayley_neumann": fault_of_bool,
        "num_cayley_neumann_terms": fault_of_integer(1, _MOST_STEPS),
        "cayley_neumann_eps": optional(fault_of_number),
    },
    ignored={"psoft_dropout": DROPOUT},
    alpha="psoft_alpha",
    most_rank=min,
    tensors={
        _TURN: lambda m: (m.rank * (m.rank - 1) // 2,) if _said(m, "psoft_orth") else (R, R),
        _OUT: when(lambda m: _said(m, "psoft_mag_b"), (R,)),
        _IN: when(lambda m: _said(m, "psoft_mag_a"), (R,)),
    },
)
