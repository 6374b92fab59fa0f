"""FRoD (doi 10.1609/aaai.v40i31.39813): ``y = U (S + diag(l)) Vᵀ x + b`` instead of ``W x + b``.

The file has ``V``, which modules of one kind share, the sparse ``S``, and ``l``; ``U`` is solved
from the weight: the columns of ``W V⁻ᵀ``, each divided by its length. So the error of a 4-bit
weight goes into ``U``, and the worse ``V`` is conditioned the more of it reaches what was trained:
what it comes to is estimated, told, and refused where most of the update would be noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.dense import dense
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rejected, Rules
from turret.server.adapters.peft_format.config.selection_rules import (
    CONV1D_RULES,
    DROPOUT,
    LAYER_RULES,
    START,
    TARGET_RULES,
    bias_rules,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_L, _VALUES = "frod_lambda_l", "frod_lambda_s_values"
_V, _PLACES, _SIZE = "frod_V", "frod_s_indices", "frod_s_size"
_SHARED = re.compile(rf"base_model\.({_V}|{_PLACES}|{_SIZE})\.(\w+)")
_IN_FILE = Irrelevant("the file holds what it made")
# NF4 with blocks of 64 moves normally distributed weights by so much, relative to their size.
_NF4_ERROR = 0.094
# Beyond it more of the update is noise than was trained.
_MOST_NOISE = 0.5

FROD_RULES: Rules = {
    **TARGET_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    **bias_rules("frod_only"),
    "save_projection": Rejected(
        (True, None),
        "leaves V to be decomposed from the weights it was trained on; save it with"
        " save_projection on the base model it was trained on",
    ),
    "projection_prng_key": _IN_FILE,
    "sparse_rate": _IN_FILE,
    "regularization_alpha": _IN_FILE,
    "progressbar": Irrelevant("shows how far PEFT is"),
    "runtime_offload_base_weight": Irrelevant("says where PEFT keeps weights"),
    "frod_dropout": DROPOUT,
    "init_weights": START,
}


def _check(name: str, roles: Roles, module: BaseModule, _rank: int, findings: Findings) -> None:
    values = roles.get(_VALUES)
    count = values.shape[0] if values is not None and values.ndim == 1 else 0
    shapes = {_L: (Served(module.in_features),), _VALUES: (count,)}
    check_roles(name, roles, shapes, findings)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    form = ModuleFormat(
        rules=FROD_RULES,
        roles={f".{role}": role for role in (_L, _VALUES)},
        check=_check,
        rank_key=None,
        bias_only="frod_only",
        shared=frozenset(name for name in checkpoint.tensors if _SHARED.fullmatch(name)),
    )
    found = read_module_checkpoint(checkpoint, base, form, max_rank)
    findings = Findings(checkpoint.path, base.name)
    _check_shared(found.shared, found.modules, base, findings)
    findings.raise_if_any()
    operators = {}
    trained = moved = 0.0
    # One V after another: its inverse is as large as a weight, in fp64.
    for kind in dict.fromkeys(_name(_V, name) for name in found.modules):
        inverse, info = torch.linalg.inv_ex(found.shared[kind].to(torch.float64))
        if int(info) or not bool(torch.isfinite(inverse).all()):
            findings.add(kind, "is singular")
            continue
        for name in [name for name in found.modules if _name(_V, name) == kind]:
            shared = {part: found.shared[_name(part, name)] for part in (_V, _PLACES)}
            served = base.modules[name].dequantize()
            update, noise = _update(found.modules[name], shared, inverse, served)
            trained, moved = trained + float(update.square().sum()), moved + noise**2
            operators[name] = dense(update, base.dtype)
    share = (moved / trained) ** 0.5 if trained else 0.0
    if share > _MOST_NOISE:
        why = f"turns the error of 4-bit weights into {share:.0%} of the update it was trained for"
        findings.add(f"base_model.{_V}", why)
    findings.raise_if_any()
    warning = (
        "its U is not in the file; it was solved from the weights served, whose 4-bit error moves"
        f" its update by about {share:.0%}"
    )
    ordered = {name: operators[name] for name in found.modules}
    return finish(checkpoint, base, ordered, found=found, warnings=(warning,))


def _name(part: str, module: str) -> str:
    """The name of a tensor that all modules of one kind share; kinds are as PEFT names them."""
    *_, folder, leaf = ("", *module.split("."))
    kind = leaf if not folder or folder.isdigit() else f"{folder}_{leaf}"
    return f"base_model.{part}.{kind}"


def _check_shared(
    shared: Roles, modules: Mapping[str, Roles], base: BaseModel, findings: Findings
) -> None:
    wanted = {_name(part, name) for name in modules for part in (_V, _PLACES, _SIZE)}
    for name in sorted(shared.keys() - wanted):
        findings.add(name, "belongs to no module")
    for name in sorted(wanted - shared.keys()):
        findings.add(name, "is missing; modules share it")
    for name, roles in modules.items():
        if findings.fields:
            return
        size, count = base.modules[name].in_features, len(roles[_VALUES])
        places, sizes = shared[_name(_PLACES, name)], shared[_name(_SIZE, name)]
        findings.check_shape(_name(_V, name), shared[_name(_V, name)], (size, size))
        if places.is_floating_point() or places.shape != (2, count):
            findings.add(_name(_PLACES, name), f"must be [2, {count}] integers")
        elif bool(((places < 0) | (places >= size)).any()):
            findings.add(_name(_PLACES, name), f"are not within [{size}, {size}]")
        if sizes.shape != (2,) or sizes.tolist() != [size, size]:
            findings.add(_name(_SIZE, name), f"must be [{size}, {size}]")


def _update(
    roles: Roles, shared: Roles, inverse: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The update, fp64, and the expected norm of what NF4's error makes of it.

    With ``W = U diag(l₀) Vᵀ`` it is ``U C Vᵀ``, ``C = S + diag(l − l₀)``; an error ``E`` of the
    weight adds ``E V⁻ᵀ diag(1 / l₀) C Vᵀ``.
    """
    weight, v = weight.to(torch.float64), shared[_V].to(torch.float64)
    columns = weight @ inverse.T
    lengths = columns.norm(dim=0)
    scale = torch.where(lengths > 1e-12, 1.0 / lengths, 0.0)
    middle = torch.diag(roles[_L].to(torch.float64) - lengths * (scale > 0))
    places = shared[_PLACES].to(torch.int64)
    middle.index_put_((places[0], places[1]), roles[_VALUES].to(torch.float64), accumulate=True)
    change = scale[:, None] * (middle @ v.T)
    root = weight.square().mean().sqrt() * len(weight) ** 0.5
    noise = _NF4_ERROR * float(root * (inverse.T @ change).norm())
    return columns @ change, noise


METHOD = Method(
    "frod",
    {"FROD"},
    FROD_RULES,
    lower,
    integers=(_PLACES, _SIZE),
    is_dense=lambda _config: True,
)
