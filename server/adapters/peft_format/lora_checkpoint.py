"""A PEFT LoRA checkpoint: its tensors by role, and the switches they must agree with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.no_adapter import (
    MISSING_FACTOR,
    OTHER_TRAINING,
    lacks_switch,
    lacks_switched,
)
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.peft_format.config.lora_rules import LORA_RULES, VARIANTS
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleCheckpoint,
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.target_parameters import name_modules
from turret.server.errors import AdapterCheckpointError

A, B, LORA_BIAS, MAGNITUDE = "lora_A", "lora_B", "lora_B.bias", "lora_magnitude_vector"
DIAGONAL = "lora_diag"
_VELORA = "lora_velora_embed"
_MONTECLORA = tuple(
    f"lora_monteclora_sampler.{part}"
    for part in ("expert_weights", "expert_weights_prior", "gaussian_var_prior", "std_prior")
)
# Tensors that a switch needs.
_SWITCHED = {"use_dora": MAGNITUDE, "lora_bias": LORA_BIAS, "kasa_config": DIAGONAL}
# Tensors that training needs, by the switch that puts them into the file.
_TRAINING = {"velora_config": (_VELORA,), "monteclora_config": _MONTECLORA}
_MORE = {**_TRAINING, "kasa_config": (DIAGONAL,)}

CheckFactors = Callable[[str, Roles, BaseModule, int, Findings], None]


def check_plain_factors(
    name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings
) -> None:
    """``A`` ``[rank, in_features]`` and ``B`` ``[out_features, rank]``."""
    a, b = roles[A], roles[B]
    for role, tensor in ((A, a), (B, b)):
        if tensor.ndim != 2:
            findings.add(f"{name}.{role}.weight", f"must be 2-D, not {list(tensor.shape)}")
            return
    if rank and a.shape[0] != rank:
        why = f"has rank {a.shape[0]}, the config says {rank}; {OTHER_TRAINING}"
        findings.add(f"{name}.{A}.weight", why)
    if a.shape[0] != b.shape[1]:
        findings.add(f"{name}.{B}.weight", f"has rank {b.shape[1]}, lora_A has {a.shape[0]}")
    if a.shape[1] != module.in_features or b.shape[0] != module.out_features:
        adapter = f"{a.shape[1]} -> {b.shape[0]}"
        served = f"{module.in_features} -> {module.out_features}"
        findings.mismatch(name, f"the adapter maps {adapter}, the base model {served}")


def lora_format(
    config: Mapping[str, Any],
    check_factors: CheckFactors = check_plain_factors,
    *,
    rank_of: Callable[[Roles, int], int] = lambda _roles, rank: rank,
    also_required: tuple[str, ...] = (),
) -> ModuleFormat:
    """How LoRA and its variants write a checkpoint.

    Args:
        config: Says which tensors may be there beside the factors.
        check_factors: Called where ``A`` and ``B`` are there, as ``ModuleFormat.check`` is.
        rank_of: As in ``ModuleFormat``.
        also_required: As in ``ModuleFormat``.
    """

    def check(name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings) -> None:
        if A not in roles or B not in roles:
            missing = A if A not in roles else B
            findings.add(f"{name}.{missing}.weight", MISSING_FACTOR)
        else:
            check_factors(name, roles, module, rank, findings)
        out = module.out_features
        if LORA_BIAS in roles:
            findings.check_shape(f"{name}.{LORA_BIAS}", roles[LORA_BIAS], (out,))
        if MAGNITUDE in roles:
            shapes = (out,), (1, out), (out, 1)
            findings.check_shape(f"{name}.{MAGNITUDE}", roles[MAGNITUDE], *shapes)
        if DIAGONAL in roles and rank:
            findings.check_shape(f"{name}.{DIAGONAL}", roles[DIAGONAL], (rank,), of_base=False)

    more = [role for key, roles in _MORE.items() if config.get(key) for role in roles]
    return ModuleFormat(
        rules=LORA_RULES,
        roles={
            ".lora_A.weight": A,
            ".lora_B.weight": B,
            ".lora_B.bias": LORA_BIAS,
            # PEFT's file format, PEFT's own parameter name, and the one of the original DoRA code.
            ".lora_magnitude_vector.weight": MAGNITUDE,
            ".lora_magnitude_vector": MAGNITUDE,
            ".weight_m_wdecomp.weight": MAGNITUDE,
            **{f".{role}": role for role in more},
        },
        check=check,
        rank_of=rank_of,
        also_required=also_required,
        alpha_key="lora_alpha",
        root_key="use_rslora",
        has_patterns=True,
        bias_only="lora_only",
    )


def read_lora(
    checkpoint: AdapterCheckpoint,
    base: BaseModel,
    max_rank: int | None,
    form: ModuleFormat | None = None,
) -> ModuleCheckpoint:
    """Checks a ``LORA`` checkpoint against itself, the base and the server's limit.

    Returns:
        Every module has ``A``, ``[rank, in_features]``, and ``B``, ``[out_features, rank]``, in the
        file's dtype, unscaled; with ``use_dora`` also ``MAGNITUDE``, of ``out_features`` values in
        one of three shapes; with ``lora_bias`` also ``LORA_BIAS``, ``[out_features]``, unscaled;
        with ``kasa_config`` also ``DIAGONAL``, ``[rank]``. Factors are of other shapes where
        ``form`` says so, which is ``lora_format`` of the config if it is None.

    Raises:
        AdapterCheckpointError: Unsupported or inconsistent; lists every key and tensor at fault.
        AdapterMismatchError: Sound, but for another base; lists every module that does not fit.
        BudgetExceededError: A rank over ``max_rank``.
    """
    config, findings = checkpoint.config, Findings(checkpoint.path, base.name)
    checkpoint = name_modules(checkpoint, base, findings)
    try:
        form = lora_format(config) if form is None else form
        found = read_module_checkpoint(checkpoint, base, form, max_rank)
    except AdapterCheckpointError as error:
        for field, why in error.violations:
            findings.add(field, why)
        findings.raise_if_any()
        raise
    for key, role in _SWITCHED.items():
        is_on = bool(config.get(key))
        for name, roles in found.modules.items():
            if role in roles and not is_on:
                findings.add(f"{name}.{role}", lacks_switch(key))
            if role not in roles and is_on:
                findings.add(f"{name}.{role}", lacks_switched(key))
    variants = [key for key in VARIANTS if config.get(key)]
    for key in variants[1:]:
        findings.add(key, f"cannot be combined with {variants[0]}")
    if config.get("use_dora") is True and config.get("lora_bias") is True:
        findings.add("lora_bias", "cannot be combined with use_dora")
    findings.raise_if_any()
    dropped = {role for training in _TRAINING.values() for role in training}
    modules = {
        name: {role: tensor for role, tensor in roles.items() if role not in dropped}
        for name, roles in found.modules.items()
    }
    return replace(found, modules=modules)
