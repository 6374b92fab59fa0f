"""A PEFT LoRA checkpoint: its tensors by role, and the switches they must agree with."""

from __future__ import annotations

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.peft_format.lora_rules import LORA_RULES
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleCheckpoint,
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)

A, B, LORA_BIAS, MAGNITUDE = "lora_A", "lora_B", "lora_B.bias", "lora_magnitude_vector"


def _check(name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings) -> None:
    """The two factors, and the vectors that may be there beside them."""
    if A not in roles or B not in roles:
        missing = A if A not in roles else B
        findings.add(f"{name}.{missing}.weight", "is missing; other LoRA tensors are there")
    else:
        _check_factors(name, roles, module, rank, findings)
    out = module.out_features
    if LORA_BIAS in roles:
        findings.check_shape(f"{name}.{LORA_BIAS}", roles[LORA_BIAS], (out,))
    if MAGNITUDE in roles:
        shapes = (out,), (1, out), (out, 1)
        findings.check_shape(f"{name}.{MAGNITUDE}", roles[MAGNITUDE], *shapes)


def _check_factors(
    name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings
) -> None:
    a, b = roles[A], roles[B]
    for role, tensor in ((A, a), (B, b)):
        if tensor.ndim != 2:
            findings.add(f"{name}.{role}.weight", f"must be 2-D, not {list(tensor.shape)}")
            return
    if rank and a.shape[0] != rank:
        why = f"has rank {a.shape[0]}, the config says {rank}"
        findings.add(f"{name}.{A}.weight", why)
    if a.shape[0] != b.shape[1]:
        findings.add(f"{name}.{B}.weight", f"has rank {b.shape[1]}, lora_A has {a.shape[0]}")
    if a.shape[1] != module.in_features or b.shape[0] != module.out_features:
        adapter = f"{a.shape[1]} -> {b.shape[0]}"
        served = f"{module.in_features} -> {module.out_features}"
        findings.mismatch(name, f"the adapter maps {adapter}, the base model {served}")


_FORMAT = ModuleFormat(
    rules=LORA_RULES,
    roles={
        ".lora_A.weight": A,
        ".lora_B.weight": B,
        ".lora_B.bias": LORA_BIAS,
        # PEFT's file format, PEFT's own parameter name, and the one of the original DoRA code.
        ".lora_magnitude_vector.weight": MAGNITUDE,
        ".lora_magnitude_vector": MAGNITUDE,
        ".weight_m_wdecomp.weight": MAGNITUDE,
    },
    check=_check,
    alpha_key="lora_alpha",
    root_key="use_rslora",
    has_patterns=True,
    bias_only="lora_only",
)


def read_lora(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None
) -> ModuleCheckpoint:
    """Checks a ``LORA`` checkpoint against itself, the base and the server's limit.

    Returns:
        Every module has ``A``, ``[rank, in_features]``, and ``B``, ``[out_features, rank]``, in the
        file's dtype, unscaled; with ``use_dora`` also ``MAGNITUDE``, of ``out_features`` values in
        one of three shapes; with ``lora_bias`` also ``LORA_BIAS``, ``[out_features]``, unscaled.

    Raises:
        AdapterCheckpointError: Unsupported or inconsistent; lists every key and tensor at fault.
        AdapterMismatchError: Sound, but for another base; lists every module that does not fit.
        BudgetExceededError: A rank over ``max_rank``.
    """
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    findings = Findings(checkpoint.path, base.name)
    for key, role in (("use_dora", MAGNITUDE), ("lora_bias", LORA_BIAS)):
        is_on = checkpoint.config.get(key) is True
        for name, roles in found.modules.items():
            if role in roles and not is_on:
                findings.add(f"{name}.{role}", f"is there, but {key} is not true")
            if role not in roles and is_on:
                findings.add(f"{name}.{role}", f"is missing; {key} is true")
    if checkpoint.config.get("use_dora") is True and checkpoint.config.get("lora_bias") is True:
        findings.add("lora_bias", "cannot be combined with use_dora")
    findings.raise_if_any()
    return found
