"""RandLoRA (arXiv 2502.00987): ``ΔW = s·Σ_n B_n diag(λ_n) A diag(γ_n)``, fixed random bases.

``A`` and ``B`` are shared by all modules, each of which takes the corner that fits its sizes, and
transposed where it has more inputs than outputs. As many bases are summed as make the full rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.dense import dense
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.lowering.shared_factors import drawn_warning
from turret.server.adapters.peft_format.config.rules import (
    Rules,
    Used,
    is_bool,
    is_number,
    is_optional_bool,
    is_seed,
)
from turret.server.adapters.peft_format.config.selection_rules import (
    CONV1D_RULES,
    DROPOUT,
    LAYER_RULES,
    RANK,
    START,
    TARGET_RULES,
    bias_rules,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleCheckpoint,
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_LAMBDA, _GAMMA = "randlora_lambda", "randlora_gamma"
_COPIES = ("randlora_A", "randlora_B")
# Any base may have bases of so many, wider than its weights or not.
_SMALL_RANK = 512
_A, _B = (f"base_model.{name}" for name in _COPIES)
# One more than half of the values are zero in a sparse basis, and all but a few in a very sparse.
_SPARSITY = 3

RANDLORA_RULES: Rules = {
    **TARGET_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    **bias_rules("randlora_only"),
    "r": RANK,
    "randlora_alpha": Used(is_number),
    "save_projection": Used(is_bool),
    "projection_prng_key": Used(is_seed),
    "sparse": Used(is_optional_bool),
    "very_sparse": Used(is_optional_bool),
    "randlora_dropout": DROPOUT,
    "init_weights": START,
}


def _check(name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings) -> None:
    least = min(module.in_features, module.out_features)
    bases = -(-least // max(rank, 1))
    shapes = {_LAMBDA: (rank, Served(bases)), _GAMMA: (Served(bases), Served(least))}
    own = {role: tensor for role, tensor in roles.items() if role not in _COPIES}
    check_roles(name, own, shapes, findings)


_FORMAT = ModuleFormat(
    rules=RANDLORA_RULES,
    # PEFT writes the shared matrices once more for every module.
    roles={f".{role}": role for role in (_LAMBDA, _GAMMA, *_COPIES)},
    check=_check,
    # It says how large a basis is; the update has any rank.
    rank_of=lambda _roles, _rank: 0,
    bias_only="randlora_only",
    shared=frozenset({_A, _B}),
    also_required=("randlora_alpha",),
)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    findings = Findings(checkpoint.path, base.name)
    a, b = _bases(config, found, base, findings)
    findings.raise_if_any()
    scaling = config["randlora_alpha"] / config["r"]
    operators = {}
    for name, roles in found.modules.items():
        module = base.modules[name]
        shape = (module.out_features, module.in_features)
        operators[name] = dense(_update(roles, a, b, shape) * scaling, base.dtype)
    warnings = drawn_warning(config, "randlora_A and randlora_B")
    return finish(
        checkpoint, base, operators, found=found, warnings=warnings, depends_on_base=False
    )


def _update(roles: Roles, a: torch.Tensor, b: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The sum of a module's bases, ``[out_features, in_features]``, not yet scaled."""
    wide = torch.promote_types(roles[_LAMBDA].dtype, torch.float32)
    lambdas, gamma = roles[_LAMBDA].to(wide), roles[_GAMMA].to(wide)
    count = len(gamma)
    scaled = lambdas[:, :, None] * a[:, :, : min(shape)].to(wide) * gamma
    # PEFT flattens one by ranks first and the other by bases first; what it trained is that.
    update = b[: max(shape), :count].to(wide).flatten(1) @ scaled.flatten(0, 1)
    return update if shape[1] == min(shape) else update.T


def _bases(
    config: Mapping[str, Any], found: ModuleCheckpoint, base: BaseModel, findings: Findings
) -> tuple[torch.Tensor, torch.Tensor]:
    """``A`` ``[r, 1, least]`` and ``B`` ``[most, bases, r]``, saved or drawn again."""
    modules = [base.modules[name] for name in found.modules]
    sides = [max(m.in_features for m in modules), max(m.out_features for m in modules)]
    rank, least, most = config["r"], min(sides), max(sides)
    nothing = torch.empty(0), torch.empty(0)
    if rank > max(most, _SMALL_RANK):
        # Its bases would be larger than any weight, and a file without them as small as ever.
        findings.add("r", f"is {rank}; the largest side of a weight it adapts is {most}")
        return nothing
    shapes = {_A: (rank, 1, least), _B: (most, -(-least // rank), rank)}
    if not config.get("save_projection", True):
        _check_drawn(config, found, findings)
        return nothing if findings.fields else _draw(config, shapes[_A], shapes[_B])
    for name, shape in shapes.items():
        if name not in found.shared:
            findings.add(name, "is missing; save_projection is true")
        else:
            whole = found.shared[name]
            # The rank is the config's, the other sizes are the base's.
            fits = whole.ndim == 3 and whole.shape[0 if name == _A else 2] == rank
            findings.check_shape(name, whole, shape, of_base=fits)
    if findings.fields or findings.mismatched:
        return nothing
    for role, whole in zip(_COPIES, (found.shared[_A], found.shared[_B]), strict=True):
        copies = {name: roles[role] for name, roles in found.modules.items() if role in roles}
        for name in found.modules.keys() - copies.keys() if copies else ():
            findings.add(f"{name}.{role}", "is missing; other modules have it")
        for name, copy in copies.items():
            if not torch.equal(copy, whole):
                findings.add(f"{name}.{role}", f"differs from base_model.{role}")
    return found.shared[_A], found.shared[_B]


def _check_drawn(config: Mapping[str, Any], found: ModuleCheckpoint, findings: Findings) -> None:
    copies = [f"{name}.{role}" for name, roles in found.modules.items() for role in roles]
    for name in (*found.shared, *copies):
        if name.endswith(_COPIES):
            findings.add(name, "is there, but save_projection is false")
    if "projection_prng_key" not in config:
        findings.add("projection_prng_key", "is required; save_projection is false")


def _draw(
    config: Mapping[str, Any], a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's bases, in bf16 as on every machine that has it: the rounded values are those."""
    generator = torch.Generator(device="cpu").manual_seed(config["projection_prng_key"])
    if config.get("sparse") or config.get("very_sparse"):
        sparsity = math.sqrt(a[2]) if config.get("very_sparse") else _SPARSITY
        first, second = torch.rand(a, generator=generator), torch.rand(b, generator=generator)
        return _ternary(first, sparsity), _ternary(second, sparsity)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.empty(shape, dtype=torch.bfloat16)
        return nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)

    first = draw(*a)
    second = torch.cat([draw(b[0], 1, b[2]) for _ in range(b[1])], dim=1)
    return first / first.std(), second / second.std()


def _ternary(uniform: torch.Tensor, sparsity: float) -> torch.Tensor:
    share = 1 / (2 * sparsity)
    signs = (uniform > 1 - share).float() - (uniform < share).float()
    return signs / signs.std()


METHOD = Method("randlora", {"RANDLORA"}, RANDLORA_RULES, lower, is_dense=lambda _config: True)
