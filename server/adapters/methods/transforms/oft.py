"""OFT (arXiv 2306.07280): the base multiplies ``x R``, ``R`` block-diagonal, in three layouts.

- PEFT from 0.16: ``oft_R.weight``, the upper triangle of a skew ``Q`` per block. ``R`` is Cayley's
  ``(I − Q)(I + Q)⁻¹``, or with ``use_cayley_neumann`` a series of ``(I + Q)(I − Q)⁻¹``, which PEFT
  changed with 0.18: ``I + 2Q + … + 2Qᵗ⁻¹`` before, and half of its last term since. An adapter
  means the series it was trained with, which ``peft_version`` tells.
- The same with ``block_share``: one block that serves all.
- PEFT 0.14 and 0.15: ``oft_r``, whose skew part is ``Q``, and ``oft_s``, a gain.

Before 0.14 PEFT turned outputs; those files have no ``oft_block_size``.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.lowering.rotations import cayley
from turret.server.adapters.operators.adapter_operators import InputBlocks, ModuleOperators
from turret.server.adapters.peft_format.config.rules import (
    Rules,
    Used,
    is_bool,
    is_count,
    is_number,
    is_optional_text,
    is_rank,
)
from turret.server.adapters.peft_format.config.selection_rules import (
    CONV1D_RULES,
    DROPOUT,
    LAYER_RULES,
    SELECTION_RULES,
    START,
    bias_rules,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.refusals.limits import check_rank
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_TRIANGLE, _MATRIX, _SCALE = "oft_R.weight", "oft_r", "oft_s"
# From here on the series ends with half a term.
_NEW_SERIES = (0, 18)


def _is_pattern(value: Any) -> str | None:
    return "is not served" if value else None


OFT_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    **bias_rules("oft_only"),
    "r": Used(is_count),
    "oft_block_size": Used(is_count),
    "block_share": Used(is_bool),
    "coft": Used(is_bool),
    "eps": Used(is_number),
    "use_cayley_neumann": Used(is_bool),
    "num_cayley_neumann_terms": Used(is_rank),
    "peft_version": Used(is_optional_text),
    "rank_pattern": Used(_is_pattern),
    "alpha_pattern": Used(_is_pattern),
    "module_dropout": DROPOUT,
    "init_weights": START,
}


def _block_size(config: Mapping[str, Any], in_features: int) -> int:
    """As PEFT chooses it: one of both is given, and made to divide the inputs."""
    if config["oft_block_size"]:
        return dividing(in_features, config["oft_block_size"])
    return in_features // dividing(in_features, config["r"])


def dividing(in_features: int, wanted: int) -> int:
    """The divisor of the inputs next to a number, the smaller of two; PEFT turns blocks of it."""
    if wanted >= in_features:
        return in_features
    lower = next(n for n in range(wanted, 0, -1) if in_features % n == 0)
    higher = next(n for n in range(wanted, in_features + 1) if in_features % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _check(
    name: str,
    roles: Roles,
    module: BaseModule,
    _rank: int,
    findings: Findings,
    *,
    config: Mapping[str, Any],
) -> None:
    keys = {"r", "oft_block_size", "block_share"}
    if findings.fields & keys:
        return
    if bool(config["r"]) == bool(config["oft_block_size"]):
        findings.add("oft_block_size", "one of r and oft_block_size must be 0, and only one")
        return
    size = _block_size(config, module.in_features)
    count = 1 if config["block_share"] else module.in_features // size
    if all(len(roles[role]) != 1 for role in (_TRIANGLE, _MATRIX) if role in roles):
        count = Served(count) if count != 1 else count
    if _MATRIX in roles or _SCALE in roles:
        old = {_MATRIX: (count, size, size), _SCALE: (Served(module.out_features), 1)}
        check_roles(name, roles, old, findings)
    else:
        check_roles(name, roles, {_TRIANGLE: (count, size * (size - 1) // 2)}, findings)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    form = ModuleFormat(
        rules=OFT_RULES,
        roles={f".{role}": role for role in (_TRIANGLE, _MATRIX, _SCALE)},
        check=functools.partial(_check, config=config),
        rank_key=None,
        bias_only="oft_only",
        also_required=("r", "oft_block_size", "coft", "block_share"),
    )
    found = read_module_checkpoint(checkpoint, base, form, max_rank)
    _check_series(checkpoint, base)
    sizes = [_block_size(config, base.modules[name].in_features) for name in found.modules]
    check_rank(checkpoint.path, max(sizes), max_rank, name="block size")
    operators = {}
    for name, roles in found.modules.items():
        module = base.modules[name]
        gain = roles[_SCALE].reshape(-1).to(torch.float32) if _SCALE in roles else None
        change = _rotation(roles, _block_size(config, module.in_features), module, config)
        operators[name] = ModuleOperators(
            input_blocks=InputBlocks(change.to(base.dtype).contiguous()), gain=gain
        )
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


def _check_series(checkpoint: AdapterCheckpoint, base: BaseModel) -> None:
    """What decides how ``R`` is made of ``Q`` must be there."""
    findings, config = Findings(checkpoint.path, base.name), checkpoint.config
    needed = ["num_cayley_neumann_terms"] if config.get("use_cayley_neumann") else []
    for key in (*needed, *(["eps"] if config["coft"] else [])):
        if key not in config:
            findings.add(key, "is required")
    findings.raise_if_any()


def _rotation(
    roles: Roles, size: int, module: BaseModule, config: Mapping[str, Any]
) -> torch.Tensor:
    """``R − I``, ``[blocks, size, size]`` fp64."""
    if _MATRIX in roles:
        matrix = roles[_MATRIX].to(torch.float64)
        if config["coft"]:
            matrix = _projected(matrix, config["eps"] * _outputs_per_block(module, size) ** 2)
        return cayley(0.5 * (matrix - matrix.transpose(1, 2)))
    skew = _skew(roles[_TRIANGLE].to(torch.float64), size)
    if config["coft"]:
        skew = _projected(skew, config["eps"])
    if not config.get("use_cayley_neumann"):
        return cayley(skew)
    return _series(skew, config["num_cayley_neumann_terms"], _is_new(config.get("peft_version")))


def _series(skew: torch.Tensor, terms: int, is_new: bool) -> torch.Tensor:
    """The first powers of ``(I + Q)(I − Q)⁻¹ − I = 2 (Q + Q² + …)``."""
    # As PEFT counts them: from 0.18 on there are Q to Q³ as soon as there is Q².
    last = max(terms - 1, 3) if is_new and terms > 2 else terms - 1
    power, total = torch.eye(skew.shape[1], dtype=skew.dtype), torch.zeros_like(skew)
    for exponent in range(1, last + 1):
        power = power @ skew
        total = total + (1.0 if is_new and exponent == last > 2 else 2.0) * power
    return total


def _is_new(version: str | None) -> bool:
    """Whether a version of PEFT, written since 0.18, has the series of 0.18."""
    parts = re.match(r"(\d+)\.(\d+)", version or "")
    return parts is not None and (int(parts[1]), int(parts[2])) >= _NEW_SERIES


def _skew(triangle: torch.Tensor, size: int) -> torch.Tensor:
    rows, columns = torch.triu_indices(size, size, 1)
    upper = torch.zeros(len(triangle), size, size, dtype=triangle.dtype)
    upper[:, rows, columns] = triangle
    return upper - upper.transpose(1, 2)


def _projected(blocks: torch.Tensor, eps: float) -> torch.Tensor:
    """Blocks no farther from zero than ``eps`` over the root of their number (``coft``)."""
    limit = eps / math.sqrt(len(blocks))
    norms = blocks.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norms <= limit, blocks, limit * (blocks / norms))


def _outputs_per_block(module: BaseModule, size: int) -> int:
    return math.ceil(module.out_features / (module.in_features // size))


METHOD = Method("oft", {"OFT"}, OFT_RULES, lower)
